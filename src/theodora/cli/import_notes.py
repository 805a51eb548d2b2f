"""What libraries log while they are imported, and nobody at a command line can do anything about, is left unsaid."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_NOTES = {
    "torchao": "Failed to load",  # 0.18: kernels for GPUs that this machine has not
    "torch.utils._pytree": "is an Enum subclass",  # torchao 0.18 on torch 2.13
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # 0.50: a kernel on the hub
}
"""Logger -> part of the message."""


@contextmanager
def without_import_notes() -> Iterator[None]:
    """Within the block these notes are not logged."""
    with ExitStack() as stack:
        for name, part in _NOTES.items():
            logger = logging.getLogger(name)

            def keep(record: logging.LogRecord, part: str = part) -> bool:
                return part not in str(record.msg)

            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        yield
