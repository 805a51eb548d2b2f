"""What the fuzz tests share: how many examples, strategies for text and JSON of every kind, damage to bytes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from theodora.errors import TheodoraError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzz(default: int = 40) -> settings:
    """As many examples as FUZZ_EXAMPLES says, or few; each may take its time."""
    return settings(
        max_examples=EXAMPLES or default,
        deadline=None,
        derandomize=not EXAMPLES,  # the default run is the same every time
        database=None if not EXAMPLES else settings.default.database,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink, *([Phase.reuse] if EXAMPLES else [])],
    )


# Lone surrogates, BOM, NUL, right-to-left, combining, astral, line separators, escape sequences.
ODD_CHARACTERS = (
    "\ud800\udfff\ufeff\0\u202e\u05d0\u0301\U0001f469\u200d\U0010ffff\u2028\u2029"
    "\x85\x1b[31m\r\n\t\x7f\ue000\"'\\{}<|im_end|>"
)
text = st.text(st.one_of(st.characters(), st.sampled_from(ODD_CHARACTERS)), max_size=12)
storable_text = text.map(lambda value: value.encode("utf-8", "ignore").decode())
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**9, -1, 2**63, 2**64, 10**400, 0, True, 1e308, float("nan")])
)


def json_values(names: st.SearchStrategy[str] = text, leaves: st.SearchStrategy[Any] | None = None) -> Any:
    """Anything that JSON can say, with `names` for keys and, among others, `leaves` for values."""
    leaf = st.one_of(st.none(), st.booleans(), numbers, text, *([leaves] if leaves is not None else []))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
        max_leaves=8,
    )


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """`whole` with bytes changed, cut out, doubled or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 16))
        match draw(st.sampled_from(["set", "cut", "double", "end", "put"])):
            case "set" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "end":
                del data[at:]
            case _:
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


def only_our_errors(read: Callable[[], Any]) -> Any:
    """What `read` returns, or the error of ours that it raised; any other error is the test's failure."""
    try:
        return read()
    except TheodoraError as error:
        found = error
    assert 0 < len(str(found)) < 20_000, "an error is for people to read"
    return found


def files_under(folder: Path) -> dict[Path, bytes]:
    """Every file in a folder and what it holds."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
