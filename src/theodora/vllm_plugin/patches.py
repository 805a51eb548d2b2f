"""Which methods of vLLM are replaced: the whole list, with the reason for each. Written for vLLM 0.32."""

from __future__ import annotations

import copy
from typing import Any

from theodora.vllm_plugin import layers, loading, proof

_MARK = "_theodora_dora"


def patch_vllm(versions: str) -> bool:
    """Replace these methods, once in a process.

    Args:
        versions: vLLM's own, and those that the tests ran on, in words.

    Returns:
        False if it was done before.

    Raises:
        ImportError, AttributeError: this vLLM lacks one of the places; nothing was changed.
    """
    from vllm.lora import lora_model, model_manager, peft_helper, utils, worker_manager
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if getattr(utils, _MARK, False):
        return False
    # Everything is looked up before anything is changed.
    validate = peft_helper.PEFTHelper._validate_features
    parse = utils.parse_fine_tuned_lora_name
    parse_in_model = lora_model.parse_fine_tuned_lora_name
    from_tensors = lora_model.LoRAModel.from_lora_tensors.__func__
    load = worker_manager.WorkerLoRAManager._load_adapter
    managers = (worker_manager.WorkerLoRAManager, worker_manager.LRUCacheWorkerLoRAManager)
    apply = {cls: cls._apply_adapters for cls in managers}  # each has its own way
    create = {cls: cls.create_lora_manager for cls in managers}
    activate = model_manager.LoRAModelManager.activate_adapter
    process = UnquantizedLinearMethod.process_weights_after_loading
    classes = layers.with_dora(utils._all_lora_classes)
    if parse_in_model is not parse:
        raise AttributeError("vllm.lora.lora_model has a parse_fine_tuned_lora_name of its own")

    def validate_features(self: Any) -> list[str]:
        """All of vLLM's complaints but the one about DoRA."""
        plain = copy.copy(self)
        plain.use_dora = False
        return validate(plain)

    def parse_name(name: str, weights_mapper: Any = None) -> tuple[str, bool]:
        """A magnitude belongs to the module that its lora_B belongs to."""
        return parse(loading.as_lora_b(name), weights_mapper)

    def from_lora_tensors(cls: Any, lora_model_id: int, tensors: Any, peft_helper: Any, **options: Any) -> Any:
        """Take the magnitudes out of the file, and attach them to the adapter."""
        magnitudes, others = loading.split(tensors, parse_name, peft_helper, options)
        lora = from_tensors(cls, lora_model_id, others, peft_helper, **options)
        loading.attach_magnitudes(lora, magnitudes, peft_helper)
        return lora

    def load_adapter(self: Any, lora_request: Any) -> Any:
        """Refuse, before anything changes, what would not be served right."""
        lora = load(self, lora_request)
        loading.check(lora, self._adapter_manager, self.lora_config, lora_request.lora_path)
        return lora

    def in_order(original: Any) -> Any:
        def apply_adapters(self: Any, adapter_requests: Any) -> None:
            """One order on all ranks, which a set has not: where the input is cut, loading sums norms over them."""
            original(self, sorted(filter(None, adapter_requests), key=lambda request: request.lora_int_id))

        return apply_adapters

    def activate_adapter(self: Any, lora_id: int) -> bool:
        """After A and B, put g into the adapter's slot."""
        done = activate(self, lora_id)
        if done:
            loading.fill_slot(self, self._registered_adapters[lora_id], self.lora_index_to_id.index(lora_id))
        return done

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        """Note ‖W‖² while W is there: on a CPU vLLM packs weights and throws the originals away."""
        layers.note_row_norms(layer)
        process(self, layer)

    def then_prove(original: Any) -> Any:
        def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
            """Try the layers that were just made; until then none of them serves DoRA."""
            made = original(self, model, vllm_config)
            if not getattr(self._adapter_manager, _MARK, False):  # one class's method may call the other's
                setattr(self._adapter_manager, _MARK, True)
                proof.prove(self._adapter_manager, vllm_config.model_config.dtype, versions)
            return made

        return create_lora_manager

    peft_helper.PEFTHelper._validate_features = validate_features
    utils.parse_fine_tuned_lora_name = parse_name
    lora_model.parse_fine_tuned_lora_name = parse_name
    lora_model.LoRAModel.from_lora_tensors = classmethod(from_lora_tensors)
    worker_manager.WorkerLoRAManager._load_adapter = load_adapter
    for cls, original in apply.items():
        cls._apply_adapters = in_order(original)
    for cls, original in create.items():
        cls.create_lora_manager = then_prove(original)
    model_manager.LoRAModelManager.activate_adapter = activate_adapter
    UnquantizedLinearMethod.process_weights_after_loading = process_weights_after_loading
    utils._all_lora_classes = classes
    setattr(utils, _MARK, True)
    return True
