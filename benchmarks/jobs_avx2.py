"""The theodora command as a CPU would run it that has AVX2, and no instructions for bf16.

    python benchmarks/jobs_avx2.py demo --output out

torch and oneDNN are held to AVX2 by their environment variables, and asked for what the CPU can do, torch leaves out
what AVX2 machines lack, so that float32 is chosen. Of a CPU that has AVX-512, clock rates and caches stay its own.
"""

from __future__ import annotations

import os
import sys

ISA = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
LACKING = ("avx512", "amx", "avx10", "bf16")


def main() -> int:
    os.environ.update(ISA)  # read when torch is loaded
    import torch

    found = torch.cpu.get_capabilities()
    torch.cpu.get_capabilities = lambda: {
        name: False if name.startswith(LACKING) else value for name, value in found.items()
    }
    from theodora.cli.main import main as theodora

    return theodora()


if __name__ == "__main__":
    sys.exit(main())
