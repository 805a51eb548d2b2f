"""The operations of the suite: all that is done to an adapter and to a model that carries one."""

from theodora.conformance.operations import carrying, combining, files, merging, running
from theodora.conformance.operations.registry import OPERATIONS, Operation

__all__ = ["OPERATIONS", "Operation", "carrying", "combining", "files", "merging", "running"]
