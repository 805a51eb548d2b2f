"""One adapter of one module: its tensors and its scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """One adapter of one weight: A (R, I), B (O, R), the magnitude (O,) if it is DoRA, and the scale s.

    Of the experts of a mixture: A (E, R, I), B (E, O, R), the magnitude (E, O).

    `start_A` and `start_B` are set where training starts from factors of the weight itself (PiSSA, OLoRA). The update
    is then s·(B·A − B₀·A₀), zero at the start, and the base weight stays as it is.

    Dropout is a module, which people and libraries find, switch and replace as they are used to.
    """

    magnitude: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None
    dropout: nn.Module

    def __init__(
        self,
        a_RI: Tensor,
        b_OR: Tensor,
        magnitude_O: Tensor | None,
        scale: float,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_RI)
        self.lora_B = nn.Parameter(b_OR)
        self.register_parameter("magnitude", None if magnitude_O is None else nn.Parameter(magnitude_O))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("start_A", None if start is None else start[0])
        self.register_buffer("start_B", None if start is None else start[1])

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[-2]

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """The start factors."""
        return None if self.start_A is None or self.start_B is None else (self.start_A, self.start_B)

    @property
    def drops(self) -> bool:
        """Whether dropout changes the adapter's input now."""
        return drops(self.dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The whole update as two factors: A (R, I) and B (O, R), or (2R, I) and (O, 2R) with start factors."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A], dim=-2), torch.cat([self.lora_B, -self.start_B], dim=-1)

    def extra_repr(self) -> str:
        """Method, rank and scale, as `print(model)` shows them."""
        method = "LoRA" if self.magnitude is None else "DoRA"
        return f"{method}, rank={self.rank}, scale={self.scale:g}"


def drops(dropout: nn.Module) -> bool:
    """Whether a dropout module, of whatever kind, changes what goes through it now."""
    return dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
