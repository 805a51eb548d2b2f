"""GGUF files that announce more than they hold are refused before a reader collects, or builds, what they announce."""

import struct

import gguf
import pytest

from exports import write_llama
from theodora.errors import CheckpointError
from theodora.export.gguf_bounds import check_bounds
from theodora.export.gguf_files import load_gguf, open_reader


def write(path, endianess=gguf.GGUFEndian.LITTLE, **values):
    """A llama of one layer, with some of its numbers replaced."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "vocab_size": 40,
    }
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 2, **values}
    for name, value in numbers.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("theodora.texts", ["one", "two", ""])
    writer.add_array("theodora.numbers", [1, 2, 3])
    write_llama(writer, 40)
    return path


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_a_whole_file(tmp_path, order):
    found = check_bounds(write(tmp_path / "a.gguf", order))
    assert (len(found.names), found.numbers) == (12, 2 * 40 * 32 + 7 * 32 * 32 + 3 * 32)
    assert found.values["llama.embedding_length"] == 32
    assert found.values["theodora.texts"] == found.values["theodora.numbers"] == 3
    load_gguf(write(tmp_path / "b.gguf"), "float32")


@pytest.mark.parametrize(("length", "message"), [(10**6, "are left"), (2**60, "expected 2,000,000 at most")])
@pytest.mark.parametrize("key", ["theodora.texts", "theodora.numbers"])
def test_a_list_longer_than_the_file(tmp_path, key, length, message):
    path = write(tmp_path / "a.gguf")
    content = path.read_bytes()
    at = content.index(key.encode()) + len(key) + 8  # behind the types of the value and of its items
    path.write_bytes(content[:at] + struct.pack("<Q", length) + content[at + 8 :])
    with pytest.raises(CheckpointError, match=rf"damaged: .*{message}"):
        open_reader(path)


def test_tensors_that_share_bytes(tmp_path):
    path = write(tmp_path / "a.gguf")
    content = path.read_bytes()
    name = b"output.weight"  # dimensions, type and offset stand behind it
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    count, *sizes = struct.unpack_from("<IQQ", content, at)
    assert (count, sizes) == (2, [32, 40])
    larger = struct.pack("<IQQIQ", 2, 32, 270, 0, 0)
    path.write_bytes(content[:at] + larger + content[at + len(larger) :])
    with pytest.raises(CheckpointError, match="are left"):
        check_bounds(path)
    path.write_bytes(content[:at] + struct.pack("<I", 5) + content[at + 4 :])
    with pytest.raises(CheckpointError, match=r"output\.weight has 5 dimensions; expected 4 at most"):
        check_bounds(path)


def test_a_file_cut_anywhere(tmp_path):
    content = write(tmp_path / "a.gguf").read_bytes()
    for length in {*range(0, 1200, 7), len(content) - 1}:
        (tmp_path / "b.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"b\.gguf is not a GGUF file, or is damaged"):
            check_bounds(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("block_count", 10**9, "speaks of 1000000000 layers and holds 12 tensors"),
        ("feed_forward_length", 10**8, "describes a model of 9,600,00"),
        ("embedding_length", 10**7, "describes a model of"),
        ("attention.key_length", 10**6, "describes a model of"),
    ],
)
def test_a_header_that_speaks_of_a_larger_model(tmp_path, name, value, found):
    with pytest.raises(CheckpointError, match=found):
        load_gguf(write(tmp_path / "a.gguf", **{name: value}), "float32")
