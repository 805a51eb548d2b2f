"""The instructions by which four bits become numbers, run here word by word: no CPU has them, and no interpreter."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from theodora.kernels.packed import TABLES
from theodora.kernels.triton import lookup


def prmt(a, b, choice):
    """Four bytes out of eight; with the fourth bit of a choice it would be a sign, which is never asked for."""
    chosen = [(choice >> np.uint32(4 * place)) & np.uint32(15) for place in range(4)]
    assert all((one < 8).all() for one in chosen)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    taken = [(both >> one.astype(np.uint64) * np.uint64(8)) & np.uint64(255) for one in chosen]
    return sum(byte << np.uint64(8 * place) for place, byte in enumerate(taken)).astype(np.uint32)


def packed_pair(kind, high, low):
    dtype = torch.bfloat16 if kind == "bf16x2" else torch.float16
    high, low = (torch.from_numpy(t).to(dtype).view(torch.int16).numpy().view(np.uint16) for t in (high, low))
    return high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)


def run(text, **registers):
    """What PTX does to registers that hold arrays; an output is `_0`, as an input is."""
    values = dict(registers)

    def value(word):
        if word.startswith("0f"):
            return np.uint32(int(word[2:], 16)).view(np.float32)
        if word[0].isdigit():
            return np.uint32(int(word, 0))
        return values[word.replace("$", "_")]

    for line in re.split(r"[;\n]", text):
        op, _, rest = line.strip(" {}").partition(" ")
        if not op or op == ".reg":
            continue
        if op == "mov.b32":
            low, high, pair = re.findall(r"[\w$]+", rest)
            values[low] = (value(pair) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
            values[high] = (value(pair) >> np.uint32(16)).astype(np.uint16).view(np.float16)
            continue
        into, *given = re.findall(r"[\w$]+", rest)
        given = [value(word) for word in given]
        name = op.split(".")[0]
        if name == "lop3":
            assert given[3] == 0xEA
            found = given[0] & given[1] | given[2]
        elif name == "cvt":
            found = given[0].astype(np.float32) if len(given) == 1 else packed_pair(op.split(".")[2], *given)
        elif op.endswith("f32") and name != "mov":
            found = {"mul": lambda a, b: a * b, "fma": lambda a, b, c: as_float(a) * as_float(b) + c}[name](*given)
        else:
            ways = {"and": np.bitwise_and, "shr": np.right_shift, "shl": np.left_shift, "prmt": prmt}
            found = ways[name](*given) if name != "mov" else given[0]
        values[into.replace("$", "_")] = found
    return values


def as_float(t):
    return t.view(np.float32) if t.dtype == np.uint32 else t


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table", TABLES)
def test_eight_numbers_of_a_word(table, dtype):
    """Every byte at every place, with each number's x in turn the only one that is not zero."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 4096, dtype=np.uint32)
    for place in range(4):
        at = slice(256 * place, 256 * (place + 1))
        words[at] = words[at] & ~np.uint32(255 << 8 * place) | np.arange(256, dtype=np.uint32) << np.uint32(8 * place)
    scale = generator.random(len(words), dtype=np.float32)
    tables = run(lookup._table_instructions(table, dtype), _8=scale)
    bytes_ = words.view(np.uint8).reshape(-1, 4)
    codes = np.stack([bytes_ >> 4, bytes_ & 15], 2).reshape(-1, 8)
    wide = np.array(TABLES[table], dtype=np.float32)[codes] * scale[:, None]
    expected = torch.from_numpy(wide).to(dtype).float().numpy()
    for number in range(8):
        x = np.zeros((len(words), 8), np.float32)
        x[:, number] = 1 + number
        pairs = [packed_pair(lookup._PAIRS[dtype], x[:, 2 * k + 1], x[:, 2 * k]) for k in range(4)]
        inputs = {f"_{3 + index}": tables[f"_{index}"] for index in range(8)}
        inputs |= {f"_{11 + k}": pair for k, pair in enumerate(pairs)}
        found = run(lookup._product_instructions(dtype), _1=np.full(len(words), 0.5, np.float32), _2=words, **inputs)
        np.testing.assert_array_equal(found["_0"], expected[:, number] * np.float32(1 + number) + np.float32(0.5))
