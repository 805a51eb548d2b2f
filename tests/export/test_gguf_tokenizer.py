"""Tokenizers in GGUF: how text is cut, and what each token is, by the names llama.cpp knows."""

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

from theodora.errors import CheckpointError
from theodora.export.gguf_tokenizer import (
    CUTS,
    adds_space,
    merge_scores,
    name_of_cut,
    tokens_and_types,
    write_tokenizer,
)

BYTES = {"type": "ByteLevel"}
LLAMA_3 = next(regex for regex, name in CUTS.items() if name == "llama-bpe")


def cut(*steps, merges=("a b",)):
    return name_of_cut({"model": {"merges": merges}, "pre_tokenizer": {"pretokenizers": list(steps)}}, Path("t"))


def test_ways_to_cut_text():
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}}
    assert cut(BYTES) == "gpt-2"
    assert cut(digits, BYTES) == "smollm"
    assert cut(split, {**BYTES, "use_regex": False}) == "llama-bpe"
    assert cut(split, merges=()) == "gpt-2"  # nothing is merged: how it is cut makes no difference


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [{"type": "Digits", "individual_digits": False}, BYTES],
        [{"type": "Split", "pattern": {"Regex": "another"}}, {**BYTES, "use_regex": False}],
        [{"type": "Split", "pattern": {"Regex": LLAMA_3}}, BYTES],
        [{**BYTES, "use_regex": False}],
    ],
    ids=str,
)
def test_ways_without_a_name_are_refused(steps):
    with pytest.raises(CheckpointError, match="convert_hf_to_gguf"):
        cut(*steps)


def test_what_each_token_is():
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "<s>": 3, "<tool>": 4}
    added = [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "<tool>"}]
    tokenizer = {"model": {"vocab": vocab, "unk_token": "<unk>"}, "added_tokens": added}
    tokens, kinds = tokens_and_types(tokenizer, 6, True)
    assert tokens == ["<unk>", "<0x0A>", "▁the", "<s>", "<tool>", "[PAD5]"]
    expected = ("UNKNOWN", "BYTE", "NORMAL", "CONTROL", "USER_DEFINED", "UNUSED")
    assert [TokenType(kind).name for kind in kinds] == list(expected)
    assert tokens_and_types(tokenizer, 5, False)[1][:2] == [TokenType.NORMAL] * 2  # no bytes where all are bytes
    with pytest.raises(CheckpointError, match="has token 4, but the model's vocabulary ends at 4"):
        tokens_and_types(tokenizer, 4, True)


def test_earlier_merges_score_better():
    scores = merge_scores(["ab", "abc", "d"], ["a b", ["ab", "c"], "a b"])
    assert scores == [0.0, -1.0, -1e9]
    assert merge_scores(["d"], []) == [0.0]


@pytest.mark.parametrize(
    ("part", "adds"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
        ({}, False),
    ],
    ids=str,
)
def test_a_space_before_the_first_word(part, adds):
    assert adds_space(part) == adds


@pytest.mark.parametrize(
    ("written", "said"), [("{", "cannot be read"), ('{"model": {"type": "Unigram"}}', "type Unigram")]
)
def test_other_files_are_refused(written, said, tmp_path):
    (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(CheckpointError, match=said):
        write_tokenizer(None, tmp_path, 8)


def test_a_tokenizer_of_bytes_that_fall_back(tmp_path):
    """As SentencePiece's: what is not in the vocabulary falls into bytes."""
    vocab = {"<unk>": 0, **{f"<0x{n:02X}>": n + 1 for n in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": ["▁ a"]}
    tokenizer = {"model": model, "normalizer": {"type": "Prepend", "prepend": "▁"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    written = {}

    class Writer:
        def __getattr__(self, name):
            return lambda *given: written.__setitem__(name, given)

    write_tokenizer(Writer(), tmp_path, 260)
    assert written["add_tokenizer_model"] == ("llama",)
    assert written["add_add_space_prefix"] == (True,)
    assert written["add_token_scores"][0][-1] == 0.0
    assert len(written["add_token_list"][0]) == 260


@pytest.mark.parametrize("merges", [[], ["a b"]])
def test_llama_cpp_finds_merges(merges, tmp_path):
    """It loads no byte-level tokenizer without any; the one that stands in is of no effect: nothing makes its left."""
    vocab = {symbol: index for index, symbol in enumerate(["!", "a", "b", "ab"])}
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "pre_tokenizer": BYTES}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = GGUFWriter(None, "llama")
    write_tokenizer(writer, tmp_path, 4)
    written = writer.kv_data[0]["tokenizer.ggml.merges"].value
    assert written == (merges or ["!! !"])
    left, _, right = written[0].partition(" ")
    assert (left + right in vocab) == bool(merges)
