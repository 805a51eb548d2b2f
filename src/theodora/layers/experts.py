"""Fused experts: one module holds the weights of all experts of a block, each a parameter of three dimensions.

transformers declares how such a module stores them (`use_experts_implementation`): (E, O, I) or (E, I, O), with a bias
or without, gate and up in one parameter, one after the other or in turns. A place for adapters is the parameter, not
the module: `ExpertParameter` stands for one, under the parameter's own path, and hangs on the module once it is
adapted. The module then runs its experts by `AdaptedExperts.forward`; without an active adapter it runs as it came.

    mlp.experts                               the module, whose class becomes one of `AdaptedExperts`
    mlp.experts.gate_up_proj                  the parameter, and the path of its place
    mlp.experts.adapted.gate_up_proj          the place as a module, which state dicts and `named_modules` show

Shapes: E experts, T tokens, K experts for each token, S = T·K rows, H hidden features, I in and O out features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.autocast import without_autocast
from theodora.functional import dora_experts, dora_scale, lora_experts
from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.experts import adapted_experts, fits
from theodora.kernels.experts_weight import ExpertsWeight, grouped_product
from theodora.kernels.operators import is_on_paper, runs_triton
from theodora.kernels.parts import Parts
from theodora.layers import gates
from theodora.layers.base import AdapterLayer
from theodora.layers.base_weights import FLOATS
from theodora.layers.gates import gate_of
from theodora.layers.swap import Swapped, check_reachable, swap_back, swap_class

ADAPTED = "adapted"
"""The child of an experts module that holds its places."""
_UP = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"


class ExpertParameter(AdapterLayer):
    """One parameter of an experts module, as a place for adapters: A (E, R, I), B (E, O, R), m (E, O).

    It holds no weight: that stays the module's.
    """

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.parameter_name = name
        self._experts = (experts,)  # in a tuple, because nn.Module would register the module, which holds this one
        self.begin()
        self.train(experts.training)

    @property
    def holder(self) -> nn.Module:
        """The experts module."""
        return self._experts[0]

    @property
    def stored_transposed(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the module stores the parameter as (E, I, O)."""
        return stored_transposed(self.holder)

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameter: while an adapter is merged, the merged one."""
        return getattr(self.holder, self.parameter_name)

    @property
    def bias(self) -> nn.Parameter | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of each expert, (E, O)."""
        return getattr(self.holder, f"{self.parameter_name}_bias", None)

    def put_weight(self, parameter: nn.Parameter) -> None:
        """Let the module compute with another parameter."""
        setattr(self.holder, self.parameter_name, parameter)

    @property
    def current_weight(self) -> BaseWeight:
        """What the module multiplies by: the merged weight while an adapter is merged, else the base weight."""
        return ExpertsWeight(self.weight, self.stored_transposed)

    @property
    def base_weight(self) -> BaseWeight:
        """The base weight, also while an adapter is merged."""
        return ExpertsWeight(self.base_parameter, self.stored_transposed)

    def attach(self) -> None:
        """Hang the place on its module, which runs its experts with adapters from now on."""
        experts = self.holder
        if not isinstance(experts, AdaptedExperts):
            swap_class(experts, AdaptedExperts)
            experts.add_module(ADAPTED, nn.ModuleDict())
            if not takes_sorted_rows(experts):
                gate_of(experts)  # which torch.compile could not find out
        getattr(experts, ADAPTED)[self.parameter_name] = self

    def end(self) -> None:
        """Undo `attach`: the module is of its own class again once none of its parameters is a place.

        Raises:
            ConfigError: another library has put a class of its own on top; nothing was changed.
        """
        experts: Any = self.holder
        check_reachable([("this module", experts)], AdaptedExperts)
        self.unmerge()
        places = getattr(experts, ADAPTED)
        del places[self.parameter_name]
        if not places:
            delattr(experts, ADAPTED)
            experts.__dict__.pop(gates.KNOWN, None)
            swap_back(experts, AdaptedExperts)

    def grouped(self, x_SI: Tensor, ends_E: Tensor, experts_S: Tensor) -> Tensor:
        """The adapted product of each expert with its rows, (S, O); see `grouped_product`."""
        return _product_of(self.holder, self.parameter_name, x_SI, ends_E, experts_S)

    def forward(self, x_ETI: Tensor) -> Tensor:
        """The adapted product of as many rows for each expert, (E, T, O): for what looks at one parameter alone."""
        count, tokens, _ = x_ETI.shape
        ends = torch.arange(1, count + 1, device=x_ETI.device, dtype=torch.int32) * tokens
        experts = torch.arange(count, device=x_ETI.device).repeat_interleave(tokens)
        return self.grouped(x_ETI.flatten(0, 1), ends, experts).unflatten(0, (count, tokens))


class AdaptedExperts(Swapped):
    """An experts module whose parameters have adapters."""

    prefix = "Adapted"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts with the active adapter, (T, H) to (T, H); as the module came where none is active."""
        places: Any = getattr(self, ADAPTED)
        if all(place.active is None for place in places.values()):
            return super().forward(hidden_states, *args, **kwargs)
        if takes_sorted_rows(self):
            return run_sorted(self, hidden_states)
        index, weights = routing(args, kwargs)
        with without_autocast(hidden_states.device):  # which transformers' own grouped products do not heed
            return run_experts(self, hidden_states, index, weights)


def named_places(model: nn.Module) -> dict[str, nn.Module]:
    """Path → what an adapter can be asked for: each module, and each parameter of fused experts.

    A parameter that is not adapted gets a place that hangs nowhere; what is ours beneath experts is left out.
    """
    places: dict[str, nn.Module] = {}
    ours: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in ours:
            continue
        places |= {path: module} if path else {}
        if isinstance(module, AdaptedExperts):
            ours |= {id(each) for each in getattr(module, ADAPTED).modules()}
        for name in expert_parameters(module, path):
            places[f"{path}.{name}".lstrip(".")] = _place_of(module, name)
    return places


def place_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, or the place of the expert parameter there, as `named_places` has it."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if name not in dict(module.named_parameters(recurse=False)):
        return model.get_submodule(path)
    return _place_of(module, name)


def _place_of(module: nn.Module, name: str) -> ExpertParameter:
    held = getattr(module, ADAPTED) if isinstance(module, AdaptedExperts) else {}
    return held[name] if name in held else ExpertParameter(module, name)


def place_path(path: str, module: nn.Module) -> str:
    """The path of a place, where `named_modules` says `path`."""
    return f".{path}".replace(f".{ADAPTED}.", ".")[1:] if isinstance(module, ExpertParameter) else path


def module_path(path: str, module: nn.Module) -> str:
    """What `named_modules` says of a place at `path`."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{ADAPTED}.{name}".lstrip(".") if isinstance(module, ExpertParameter) else path


def weight_path(path: str, module: nn.Module) -> str:
    """The path of a place's weight as a parameter: of experts its own."""
    return path if isinstance(module, ExpertParameter) else f"{path}.weight"


def expert_parameters(module: nn.Module, path: str = "") -> list[str]:
    """Names of a module's parameters that are weights of several experts: its class, `path` or their names say so."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    of_experts = any("expert" in name.lower() for name in (path, *kinds))
    three = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return [name for name in three if of_experts or "expert" in name]


def why_experts_unfit(place: ExpertParameter) -> str | None:
    """Why a parameter of fused experts cannot take an adapter: part of a sentence; None if it can."""
    experts: Any = place.holder
    kind = type(experts).__name__
    weight: Any = place.weight
    if type(weight.data) is not Tensor or weight.dtype not in FLOATS:
        return (
            f"its weight is quantised or special ({type(weight.data).__name__}, {weight.dtype}), in a layout that is "
            "not read here; load the model dequantised (dequantize=True in its quantization_config), or leave the "
            "experts out"
        )
    if not (declared(experts) or takes_sorted_rows(experts)):
        return (
            f"{kind} does not declare how its experts run (transformers' use_experts_implementation), and its own "
            "forward would bypass the adapter"
        )
    if place.parameter_name not in (*_UP, _DOWN):
        return f"{kind} is not known to multiply by its {place.parameter_name}"
    if "forward" in experts.__dict__:
        return (
            f"this {kind}'s forward was replaced (by a fused kernel, as use_kernels and kernelize do, or by a hook), "
            "and would bypass the adapter; load the model without it"
        )
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts lie in several processes (expert parallelism)"
    if weight.is_meta and not is_on_paper():
        return "its weight is not loaded yet (it is on the meta device)"
    return None


def takes_sorted_rows(experts: nn.Module) -> bool:
    """Whether the module is Llama 4's: it takes all tokens once for each expert, (E·T, H), and no routing."""
    return any(kind.__name__ == "Llama4TextExperts" for kind in type(experts).__mro__)


def stored_transposed(experts: Any) -> bool:
    """Whether the module stores its weights as (E, I, O)."""
    return bool(getattr(experts, "is_transposed", takes_sorted_rows(experts)))


def declared(experts: Any) -> bool:
    """Whether transformers' own functions for experts run the module."""
    own = type(experts)
    if isinstance(experts, AdaptedExperts):
        return not takes_sorted_rows(experts)
    names = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
    return all(hasattr(experts, name) for name in names) and hasattr(own.forward, "__wrapped__")


def run_experts(experts: Any, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers' experts compute, (T, H), with adapters: rows are sorted by expert once, for all products.

    On a GPU by our kernels, where they can take them (`theodora.kernels.experts`); else in plain torch.

    Args:
        experts: the module.
        x_TH: tokens.
        index_TK: the experts of each token. Numbers of E and more stand for no expert.
        weights_TK: what each expert's output counts.
    """
    if kernels.fast() and (fused := run_fused(experts, x_TH, index_TK, weights_TK)) is not None:
        return fused
    up = next(name for name in _UP if hasattr(experts, name))
    tokens, chosen = index_TK.shape
    expert_S, order_S = index_TK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(1, experts.num_experts + 1, device=x_TH.device), out_int32=True)
    known_S1 = (expert_S < experts.num_experts)[:, None]
    expert_S = expert_S.clamp(max=experts.num_experts - 1)
    y = _product_of(experts, up, x_TH[order_S // chosen], ends_E, expert_S)
    h = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = _product_of(experts, _DOWN, h, ends_E, expert_S)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    y = (y * weights_TK.reshape(-1)[order_S][:, None]).masked_fill(~known_S1, 0)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return y[back_S].view(tokens, chosen, -1).sum(1).to(x_TH.dtype)


def run_sorted(experts: Any, x_SH: Tensor) -> Tensor:
    """What Llama 4's experts compute, (E·T, H): of each expert's T tokens, scaled before by what they count."""
    count = experts.num_experts
    tokens = x_SH.numel() // experts.hidden_size // count
    ends_E = torch.arange(1, count + 1, device=x_SH.device, dtype=torch.int32) * tokens
    expert_S = torch.arange(count, device=x_SH.device).repeat_interleave(tokens)
    with without_autocast(x_SH.device):
        y = _product_of(experts, _UP[0], x_SH.reshape(-1, experts.hidden_size), ends_E, expert_S)
        gate, up = y.chunk(2, dim=-1)
        y = _product_of(experts, _DOWN, up * experts.act_fn(gate), ends_E, expert_S)
    return y.to(x_SH.dtype)


def run_fused(experts: Any, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
    """The same by our kernels, with or without adapters; None where they cannot take it."""
    gate = gate_of(experts) if runs_triton(x_TH) else None
    if gate is None:
        return None
    up = next(name for name in _UP if hasattr(experts, name))
    sides = _parts_of(experts, up), _parts_of(experts, _DOWN)
    return adapted_experts(x_TH, index_TK, weights_TK, *sides, gate) if fits(x_TH, index_TK, *sides, gate) else None


def _parts_of(experts: Any, name: str) -> Parts:
    """One of the products as it stands in this forward pass."""
    place = dict(getattr(experts, ADAPTED, {})).get(name)
    adapter = None if place is None else place.active
    bias = getattr(experts, f"{name}_bias", None)
    weight = ExpertsWeight(getattr(experts, name), stored_transposed(experts))
    if place is None or adapter is None:
        return Parts(weight, bias)
    norm, (a, b) = None if adapter.magnitude is None else place.norm(adapter), adapter.factors()
    return Parts(weight, bias, a, b, adapter.scale, adapter.magnitude, norm, adapter.drops)


def _product_of(experts: Any, name: str, x_SI: Tensor, ends_E: Tensor, expert_S: Tensor) -> Tensor:
    """g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias of each row's expert, (S, O), in the dtype of W."""
    parts = _parts_of(experts, name)
    w, bias = parts.weight.dense(), parts.bias_O
    x = x_SI.to(w.dtype)
    if parts.a_RI is None or parts.b_OR is None:
        z = grouped_product(x, w.mT, ends_E)
        return z if bias is None else z + bias[expert_S]
    x_lora = getattr(experts, ADAPTED)[name].active.dropout(x) if parts.drops else None
    if not kernels.fast():
        return _by_formula(x, x_lora, parts, ends_E)
    a, b = parts.a_RI.to(w.dtype), parts.b_OR.to(w.dtype)
    xa = grouped_product(x if x_lora is None else x_lora, a.mT, ends_E)
    z = grouped_product(x, w.mT, ends_E) + parts.scale * grouped_product(xa, b.mT, ends_E)
    if parts.magnitude_O is not None and parts.norm_O is not None:
        z = (z * dora_scale(parts.magnitude_O, parts.norm_O)[expert_S]).to(w.dtype)
    return z if bias is None else z + bias[expert_S]


def _by_formula(x_SI: Tensor, x_lora_SI: Tensor | None, parts: Parts, ends_E: Tensor) -> Tensor:
    """The same, one expert after the other."""
    ends = ends_E.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    x, x_lora = x_SI[: ends[-1]], None if x_lora_SI is None else x_lora_SI[: ends[-1]]
    w, bias, a, b = parts.weight.dense(), parts.bias_O, parts.a_RI, parts.b_OR
    assert a is not None
    assert b is not None
    if parts.magnitude_O is None or parts.norm_O is None:
        y = lora_experts(x, counts, w, bias, a, b, parts.scale, x_lora_SI=x_lora)
    else:
        own = parts.magnitude_O, parts.norm_O
        y = dora_experts(x, counts, w, bias, a, b, parts.scale, *own, x_lora_SI=x_lora)
    return torch.cat([y, y.new_zeros(len(x_SI) - len(y), y.shape[1])])


def routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each token's experts (T, K) and their weights (T, K), as families of models call them."""
    given = [*args, *(kwargs[name] for name in ("top_k_index", "router_indices") if name in kwargs)]
    given += [kwargs[name] for name in ("top_k_weights", "routing_weights") if name in kwargs]
    return given[0], given[1]
