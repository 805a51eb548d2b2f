"""The Triton kernels and their launchers; imported when the first one runs."""
