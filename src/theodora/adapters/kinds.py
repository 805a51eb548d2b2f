"""The kind of layer a module is, such as q_proj: what tables of many layers are grouped by."""

from __future__ import annotations

import re
from collections.abc import Iterable


def layer_kinds(paths: Iterable[str]) -> dict[str, str]:
    """Module path -> kind: its last name, and the one before where that alone is not enough.

    Example:
        `h.0.attn.c_proj` and `h.0.mlp.c_proj` are of the kinds attn.c_proj and mlp.c_proj; `layers.0.mlp.up_proj`
        beside them is of the kind up_proj.
    """
    names = {path: [part for part in path.split(".") if not part.isdigit()] for path in paths}
    parents: dict[str, set[str]] = {}
    for parts in names.values():
        parents.setdefault(parts[-1], set()).add(".".join(parts[-2:-1]))
    return {path: ".".join(parts[-2:] if len(parents[parts[-1]]) > 1 else parts[-1:]) for path, parts in names.items()}


def layer_index(path: str) -> int | None:
    """Number of the block that a module stands in; None for embeddings, heads and other modules outside."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found.group(1)) if found else None
