"""Adapters on models and on disk."""

from theodora.adapters.inject import adapter_disabled, inject_adapter, remove_adapter, set_adapter
from theodora.adapters.load_report import LoadReport
from theodora.adapters.merge import merge_adapter, unmerge_adapter
from theodora.adapters.merge_checkpoint import MergeReport, merge_checkpoint
from theodora.adapters.quantize import quantize_base
from theodora.adapters.save import load_adapter, load_report, save_adapter

__all__ = [
    "LoadReport",
    "MergeReport",
    "adapter_disabled",
    "inject_adapter",
    "load_adapter",
    "load_report",
    "merge_adapter",
    "merge_checkpoint",
    "quantize_base",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
