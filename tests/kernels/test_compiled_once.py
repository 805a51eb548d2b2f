"""Kernels are compiled once for all numbers of tokens: those of a trial on few are those of a batch."""

import importlib
import inspect
import pkgutil
import re

import pytest

triton = pytest.importorskip("triton")

VARY = {"T", "P", "rows", "tokens", "steps", "CHUNK", "CHUNKS", "COUNT"}
"""Parameters that tell how many tokens there are, and into how many pieces they are cut."""


def launched():
    import theodora.kernels.triton as package

    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        source = inspect.getsource(module)
        for name, kernel in vars(module).items():
            is_launched = re.search(rf"\b{name}\[|: Any = .*\b{name}\b", source)
            if is_launched and isinstance(kernel, triton.runtime.JITFunction):
                yield pytest.param(kernel, id=f"{info.name}.{name}")


@pytest.mark.parametrize("kernel", list(launched()))
def test_numbers_of_tokens_are_not_compiled_in(kernel):
    compiled_in = [p.name for p in kernel.params if p.name in VARY and not (p.is_constexpr or p.do_not_specialize)]
    assert compiled_in == []


def test_kernels_are_found():
    if not triton.knobs.runtime.interpret:
        assert len(list(launched())) >= 15
