"""`Parts` under the layers' roof."""

from theodora.kernels.parts import Parts

__all__ = ["Parts"]
