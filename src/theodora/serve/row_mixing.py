"""Products that mix the rows of a batch: looked for before anything is served, and not used.

A row of x Wᵀ depends on no other row of x. oneDNN's bfloat16 products on CPUs with AMX (torch 2.11) read the features
of a row in blocks, past its end into the next one's, against zeros: with 0 · NaN, one request's NaN is its neighbour's.
Seen where the number of features is no multiple of 32; float32 and other CPUs are right.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from theodora.patches import Attribute, Patch, Use

_log = logging.getLogger("theodora.serve")
_ROWS = 40  # of fewer, each is multiplied by itself
_ONEDNN = Patch(Attribute(torch.backends.mkldnn, "enabled"), lambda enabled, patch: False)


class NoRowMixing:
    """While it lasts, no product of a model's layers mixes rows: on a CPU where some would, oneDNN is not used.

    The switch is the whole process's, and the last of them to `end` puts it back.
    """

    def __init__(self, model: nn.Module) -> None:
        # (off because of another model, it cannot be looked at: then this one may need it, too)
        self._use: Use | None = _ONEDNN.use() if _ONEDNN.on else None
        usable = torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
        if usable and (widths := mixing_widths(model)):
            _log.warning(
                "On this CPU, torch %s mixes the requests of a batch in products of %s features in %s, if one of them "
                "is not finite. oneDNN's products are switched off, which is slower; --dtype float32 is not touched.",
                torch.__version__, ", ".join(map(str, widths)), str(_dtype(model)).removeprefix("torch."),
            )  # fmt: skip
            self._use = _ONEDNN.use()

    def end(self) -> None:
        """Use again what was used before."""
        self._use = None


def mixing_widths(model: nn.Module) -> list[int]:
    """The numbers of features of a model's linear layers over which a product mixes rows, as this machine computes."""
    dtype = _dtype(model)
    widths = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    on_cpu = next(model.parameters()).device.type == "cpu"
    return sorted(width for width in widths if on_cpu and dtype.itemsize == 2 and mixes(width, dtype))


def mixes(width: int, dtype: torch.dtype) -> bool:
    """Whether a product over so many features gives NaN to rows beside a NaN."""
    x = torch.ones(_ROWS, width, dtype=dtype)
    x[::2] = torch.nan
    return not bool(F.linear(x, torch.ones(_ROWS, width, dtype=dtype))[1::2].isfinite().all())


def _dtype(model: Any) -> torch.dtype:
    return model.dtype
