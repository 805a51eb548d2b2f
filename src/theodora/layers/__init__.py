"""Adapter layers: what one adapted module holds, and how it runs.

A module is adapted by giving it another class in place (`adapt`), and restored by giving the old one back (`end`).
So the module stays the user's own object under its own name: its weight, its ties to other modules and its hooks stay
where they were.
"""

from theodora.layers.adapt import adapt, cannot_adapt
from theodora.layers.base import AdapterLayer, base_weight, start_norm
from theodora.layers.init import start_values
from theodora.layers.low_rank import LowRank

__all__ = [
    "AdapterLayer",
    "LowRank",
    "adapt",
    "base_weight",
    "cannot_adapt",
    "start_norm",
    "start_values",
]
