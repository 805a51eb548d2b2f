"""Triton's interpreter, without what takes a third of its time and shows nothing."""

from types import FunctionType
from typing import Any

from triton.runtime import interpreter


def prepare() -> None:
    """For a process whose kernels all are interpreted; where Triton's parts have other names, as it is."""
    # Integers that overflow are looked for and then asserted, which without the option `debug` does nothing.
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if options is not None and not options.debug:
        interpreter.interpreter_builder.options = type(options)(sanitize_overflow=False)
    # Triton's language is made the interpreter's in front of each kernel and each function that it calls, by looking
    # through all its names, and turned back behind each kernel. Once is enough.
    patch: Any = getattr(interpreter, "_patch_lang", None)
    scope: Any = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return
    done = set[tuple[bool, bool]]()

    def patch_once(function: FunctionType) -> Any:
        language, known = interpreter.tl, function.__globals__.values()
        seen = any(value is language for value in known), any(value is language.core for value in known)
        if seen not in done:
            done.add(seen)
            patch(function)
        return scope()  # of which nothing is restored

    interpreter._patch_lang = patch_once
