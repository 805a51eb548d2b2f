"""Methods compared on your own data: every method, rank and learning rate, then the seeds, then a report."""

from theodora.compare.config import CompareConfig, DataConfig
from theodora.compare.run import compare

__all__ = ["CompareConfig", "DataConfig", "compare"]
