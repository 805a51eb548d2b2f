"""A stand-in for vLLM where there is none: the places that the plug-in touches, as in vLLM 0.32, on one rank.

`make test-vllm` runs the plug-in in vLLM itself; what is held here, in seconds, is the plug-in's own part. Run this
file anew (`runpy`) for a vLLM in which nothing was replaced.
"""

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import nn


class UnquantizedLinearMethod:
    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        y = x @ layer.weight.T
        return y if bias is None else y + bias


class _Linear(nn.Module):
    tp_size, tp_rank = 1, 0

    def __init__(self, inside, outs):
        super().__init__()
        self.input_size, self.output_size, self.output_sizes = inside, sum(outs), list(outs)
        self.weight = nn.Parameter(torch.randn(sum(outs), inside) / inside**0.5)
        self.quant_method = UnquantizedLinearMethod()


class ColumnParallelLinear(_Linear):
    pass


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(ColumnParallelLinear):
    pass


class RowParallelLinear(_Linear):
    pass


class ReplicatedLinear(_Linear):
    pass


class BaseLinearLayerWithLoRA(nn.Module):
    def __init__(self, base, slices):
        super().__init__()
        self.base_layer, self.output_slices, self.n_slices = base, tuple(slices), len(slices)
        self.tp_size, self.tp_rank, self.device = 1, 0, torch.device("cpu")

    def create_lora_weights(self, max_loras, lora_config):
        rank, inside = lora_config.max_lora_rank, self.base_layer.input_size
        self.lora_a_stacked = tuple(torch.zeros(max_loras, 1, rank, inside) for _ in self.output_slices)
        self.lora_b_stacked = tuple(torch.zeros(max_loras, 1, size, rank) for size in self.output_slices)

    def reset_lora(self, index):
        for stacked in (*self.lora_a_stacked, *self.lora_b_stacked):
            stacked[index] = 0

    def set_lora(self, index, a, b):
        self.reset_lora(index)
        for n, (a_RI, b_OR) in enumerate(zip(a, b, strict=True)):
            if a_RI is not None:
                self.lora_a_stacked[n][index, 0, : len(a_RI)] = a_RI
                self.lora_b_stacked[n][index, 0, :, : b_OR.shape[1]] = b_OR

    def apply(self, x, bias=None):
        return self._apply_lora_to_output(x, self.base_layer.quant_method.apply(self.base_layer, x, bias))

    def _apply_lora_to_output(self, x, output):
        output, start = output.clone(), 0
        slot_T = self.punica_wrapper._token_lora_indices[: len(x)]
        for a, b, size in zip(self.lora_a_stacked, self.lora_b_stacked, self.output_slices, strict=True):
            added = torch.einsum("ti,tri,tor->to", x, a[slot_T, 0], b[slot_T, 0])  # slot -1 is the last: as on a CPU
            output[:, start : start + size] += added
            start += size
        return output


NAMES = (
    *("ColumnParallelLinear", "MergedColumnParallelLinear", "MergedColumnParallelLinearVariableSlice"),
    *("QKVParallelLinear", "MergedQKVParallelLinear", "RowParallelLinear", "ReplicatedLinear"),
)


@dataclass
class LoRAMapping:
    index_mapping: tuple
    prompt_mapping: tuple
    is_prefill: bool = False


class Punica:
    def __init__(self):
        self._token_lora_indices = torch.full((64,), -1)

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size):
        slots = [lora_index_to_id.index(id) if id else -1 for id in mapping.index_mapping]
        self._token_lora_indices[: len(slots)] = torch.tensor(slots)


@dataclass
class PEFTHelper:
    r: int
    lora_alpha: float
    target_modules: object
    use_dora: bool = False

    def _validate_features(self):
        return ["vLLM does not yet support DoRA."] if self.use_dora else []


def parse_fine_tuned_lora_name(name, weights_mapper=None):
    module, kind, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
    assert kind in ("lora_A", "lora_B"), f"{name} is unsupported"
    return module, kind == "lora_A"


class LoRAModel:
    def __init__(self, id, loras):
        self.id, self.loras = id, loras

    @classmethod
    def from_lora_tensors(cls, lora_model_id, tensors, peft_helper, **options):
        loras = {}
        for name, tensor in tensors.items():
            module, is_a = parse_fine_tuned_lora_name(name)
            lora = loras.setdefault(module, SimpleNamespace(scaling=peft_helper.lora_alpha / peft_helper.r))
            setattr(lora, "lora_a" if is_a else "lora_b", tensor)
        return cls(lora_model_id, loras)


class LoRAModelManager:
    """Of a model with a packed layer of three slices and one that is not packed; two of each, of which one is tried."""

    max_num_seqs, max_num_batched_tokens, vocab_size = 4, 64, 32

    def __init__(self, classes, slots=3, rank=4):
        self.lora_slots, self.model = slots, nn.Module()
        self.lora_config = SimpleNamespace(max_lora_rank=rank, lora_dtype=torch.float32, fully_sharded_loras=False)
        by_name = {cls.__name__.replace("WithDora", "").replace("WithLoRA", ""): cls for cls in classes}
        self.modules, self.packed_modules, punica = {}, {}, Punica()
        for number in range(2):
            qkv, o = f"layers.{number}.qkv_proj", f"layers.{number}.o_proj"
            self.modules[qkv] = by_name["MergedQKVParallelLinear"](QKVParallelLinear(8, [6, 4, 4]), [6, 4, 4])
            self.modules[o] = by_name["RowParallelLinear"](RowParallelLinear(6, [8]), [8])
            self.packed_modules[qkv] = [qkv.replace("qkv", part) for part in "qkv"]
        for module in self.modules.values():
            module.create_lora_weights(slots, self.lora_config)
            module.punica_wrapper = punica
        self.remove_all_adapters()

    def add_adapter(self, lora):
        for each in lora.loras.values():
            each.lora_b = each.lora_b * each.scaling
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id):
        index = self.lora_index_to_id.index(None)
        self.lora_index_to_id[index] = lora_id
        loras = self._registered_adapters[lora_id].loras
        for name, module in self.modules.items():
            parts = [loras.get(part) for part in self.packed_modules.get(name, [name])]
            module.set_lora(index, *([getattr(part, key, None) for part in parts] for key in ("lora_a", "lora_b")))
        return True

    def remove_all_adapters(self):
        self._registered_adapters, self.lora_index_to_id = {}, [None] * self.lora_slots


class WorkerLoRAManager:
    lora_config = SimpleNamespace(fully_sharded_loras=False)

    def create_lora_manager(self, model, vllm_config):
        from vllm.lora import utils

        self._adapter_manager = LoRAModelManager(utils._all_lora_classes)
        return model

    def _load_adapter(self, lora_request):
        helper = PEFTHelper(r=lora_request.rank, lora_alpha=8, target_modules=[], use_dora=lora_request.dora)
        if helper._validate_features():
            raise ValueError(*helper._validate_features())
        from vllm.lora.lora_model import LoRAModel

        return LoRAModel.from_lora_tensors(lora_request.lora_int_id, dict(lora_request.tensors), helper)

    def _apply_adapters(self, adapter_requests):
        pass


class LRUCacheWorkerLoRAManager(WorkerLoRAManager):
    def create_lora_manager(self, model, vllm_config):
        return super().create_lora_manager(model, vllm_config)

    def _apply_adapters(self, adapter_requests):
        pass


def modules(version):
    """The modules of a vLLM, by their names."""
    loras = {f"{name}WithLoRA": type(f"{name}WithLoRA", (BaseLinearLayerWithLoRA,), {}) for name in NAMES}
    linears = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear, ReplicatedLinear)
    parse = {"parse_fine_tuned_lora_name": parse_fine_tuned_lora_name}
    contents = {
        "vllm": {"__version__": version},
        "vllm.lora": {},
        "vllm.lora.layers": {**loras, "LoRAMapping": LoRAMapping},
        "vllm.lora.utils": {"_all_lora_classes": tuple(loras.values()), **parse},
        "vllm.lora.lora_model": {"LoRAModel": LoRAModel, **parse},
        "vllm.lora.peft_helper": {"PEFTHelper": PEFTHelper},
        "vllm.lora.model_manager": {"LoRAModelManager": LoRAModelManager},
        "vllm.lora.worker_manager": {cls.__name__: cls for cls in (WorkerLoRAManager, LRUCacheWorkerLoRAManager)},
        "vllm.model_executor": {},
        "vllm.model_executor.custom_op": {"maybe_get_oot_by_class": lambda cls: cls},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {cls.__name__: cls for cls in (UnquantizedLinearMethod, *linears)},
        "vllm.distributed": {"get_pp_group": lambda: SimpleNamespace(world_size=1)},
    }
    found = {}
    for name, attributes in contents.items():
        found[name] = ModuleType(name)
        vars(found[name]).update(attributes)
        if "." in name:
            parent, own = name.rsplit(".", 1)
            setattr(found[parent], own, found[name])
    return found
