"""Everything that an adapter can undergo."""

from theodora.conformance.operations import carrying, combining, files, merging, running
from theodora.conformance.operations.registry import OPERATIONS, Operation

__all__ = ["OPERATIONS", "Operation", "carrying", "combining", "files", "merging", "running"]
