"""Arithmetic on adapted weights: merged checkpoints, combinations of adapters, one adapter in another's form."""

from theodora.merging.checkpoint import MergeReport, merge_checkpoint

__all__ = ["MergeReport", "merge_checkpoint"]
