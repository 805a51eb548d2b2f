"""What was loaded with an adapter, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass

from theodora.config import METHOD_NAMES, AdapterConfig
from theodora.files.adapter import AdapterFile
from theodora.files.trained_on import TrainedOn


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` read from a folder and put on the model: all of it, or it would have raised."""

    name: str
    path: str
    method: str
    """dora or lora."""
    ranks: tuple[int, ...]
    """The distinct ones."""
    modules: int
    """Adapted modules."""
    magnitudes: int
    """How many of them have magnitudes."""
    full: tuple[str, ...]
    """Paths of the parameters trained in full."""
    parameters: int
    """Numbers in all."""
    base_distance: float | None
    """How far the base weights are from those it was trained on, relative; None where the file does not tell."""
    token_rows: int = 0
    """Rows of single tokens."""
    trained_on: TrainedOn | None = None
    """What base it was trained on, if the file remembers."""
    tokens: int | None = None
    """The number of tokens that the model's embeddings were resized to; None where they were not."""

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.ranks))
        parts = [f"{METHOD_NAMES[self.method]} of rank {ranks} on {self.modules} modules"] if self.modules else []
        parts += [f"magnitudes on {self.magnitudes}"] if self.magnitudes else []
        parts += [f"{len(self.full)} parameters trained in full"] if self.full else []
        parts += [f"rows of {self.token_rows} tokens"] if self.token_rows else []
        parts += [f"embeddings resized to {self.tokens} tokens"] if self.tokens is not None else []
        base = (
            "base weights not recorded" if self.base_distance is None else f"base weights {self.base_distance:.1%} away"
        )
        return f"{self.path} as {self.name!r}: {', '.join(parts)}; {self.parameters:,} numbers; {base}"


def report_of(name: str, file: AdapterFile, config: AdapterConfig, distance: float) -> LoadReport:
    """What a checked file holds, to be told to whoever loads it."""
    modules = file.modules.values()
    tensors = [t for m in modules for t in (m.a, m.b, m.magnitude) if t is not None]
    return LoadReport(
        name=name,
        path=str(file.path),
        method=config.method,
        ranks=tuple(sorted({m.a.shape[0] // (2 if file.starts else 1) for m in modules})),
        modules=len(file.modules),
        magnitudes=sum(m.magnitude is not None for m in modules),
        full=tuple(sorted(file.full)),
        parameters=sum(t.numel() for t in (*tensors, *file.full.values(), *(t.rows for t in file.token_rows.values()))),
        token_rows=sum(len(rows.ids) for rows in file.token_rows.values()),
        trained_on=file.trained_on,
        base_distance=distance if file.fingerprint else None,
    )
