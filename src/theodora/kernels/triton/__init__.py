"""The Triton kernels and their launchers; imported when the first one runs."""

from theodora.kernels.triton.compiler_hash import keep_compiler_hash

keep_compiler_hash()
