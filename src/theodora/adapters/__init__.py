"""Adapters on models and on disk."""

from theodora.adapters.inject import inject_adapter
from theodora.adapters.load import load_adapter, load_report
from theodora.adapters.load_report import LoadReport
from theodora.adapters.merge import adapter_disabled, merge_adapter, unmerge_adapter
from theodora.adapters.quantize import quantize_base
from theodora.adapters.remove import remove_adapter
from theodora.adapters.save import save_adapter
from theodora.adapters.state import set_adapter

__all__ = [
    "LoadReport",
    "adapter_disabled",
    "inject_adapter",
    "load_adapter",
    "load_report",
    "merge_adapter",
    "quantize_base",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
