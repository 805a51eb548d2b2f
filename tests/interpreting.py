"""Triton's interpreter, without what takes most of its time and shows nothing."""

from collections.abc import Callable
from types import FunctionType, NoneType
from typing import Any

from triton.language import core
from triton.runtime import interpreter


def prepare() -> None:
    """For a process whose kernels all are interpreted; where Triton's parts have other names, as it is."""
    # Integers that overflow are looked for and then asserted, which without the option `debug` does nothing.
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if options is not None and not options.debug:
        interpreter.interpreter_builder.options = type(options)(sanitize_overflow=False)
    _patch_language_once()
    _remember_types()


def _patch_language_once() -> None:
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


def _remember_types() -> None:
    # Each operation makes a type, and a tensor of it, whose names and shapes are written out and checked anew. A type
    # is known by its name.
    block: Any = getattr(core, "block_type", None)
    tensor: Any = getattr(core, "tensor", None)
    unwrap: Any = getattr(core, "_unwrap_if_constexpr", None)
    numpy_type: Any = getattr(interpreter, "_get_np_dtype", None)
    if None in (block, tensor, unwrap, numpy_type):
        return
    plain = {int, float, bool, str, NoneType, tensor, block, core.dtype, core.pointer_type}

    def unwrap_soon(value: Any) -> Any:
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in plain else unwrap(value)

    def shape_and_element(self: Any, element: Any, shape: Any) -> Any:
        return element.name, tuple(getattr(size, "value", size) for size in getattr(shape, "values", shape))

    core._unwrap_if_constexpr = unwrap_soon
    block.__init__ = _once_for(block.__init__, shape_and_element)
    tensor.__init__ = _once_for(tensor.__init__, lambda self, handle, kind: kind.name, own=("handle", "type"))
    known: dict[str, Any] = {}

    def numpy_type_once(kind: Any) -> Any:
        if (found := known.get(kind.name)) is None:
            found = known[kind.name] = numpy_type(kind)
        return found

    interpreter._get_np_dtype = numpy_type_once


def _once_for(begin: Callable[..., None], key_of: Callable[..., Any], own: tuple[str, ...] = ()) -> Callable[..., None]:
    """An `__init__` that runs once for each key; what follows has its attributes, but for its `own`, the arguments."""
    known: dict[Any, dict[str, Any]] = {}

    def begin_once(self: Any, *given: Any) -> None:
        key = key_of(self, *given)
        if (found := known.get(key)) is None:
            begin(self, *given)
            known[key] = {name: value for name, value in vars(self).items() if name not in own}
        else:
            vars(self).update(found, **dict(zip(own, given, strict=bool(own))))

    return begin_once
