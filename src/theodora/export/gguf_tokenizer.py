"""A Hugging Face tokenizer in a GGUF header, where llama.cpp has one that cuts text the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theodora.ends import as_ids
from theodora.errors import CheckpointError
from theodora.files.distrust import read_object
from theodora.files.folder import read_file
from theodora.parse import parse_json

_LARGEST = 128 << 20  # bytes of a tokenizer.json, four times the largest

# tokenizer.json cuts text with a regular expression before merging: the expression → llama.cpp's name of that cut.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: Mapping[str, str] = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
# llama.cpp loads no BPE tokenizer without merges. This one never applies: nothing makes its left symbol.
_NEVER = "!! !"


def write_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Put the tokenizer of a model folder into the header of a `gguf.GGUFWriter`.

    Raises:
        CheckpointError: there is none, or llama.cpp has no tokenizer like it as far as is known here.
    """
    import gguf

    path = folder / "tokenizer.json"
    try:
        tokenizer = parse_json(read_file(path, _LARGEST).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): a GGUF file holds its tokenizer") from error
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"{path} is of type {model.get('type')}; tokenizers of type BPE are written to GGUF here")
    bytes_only = bool(model.get("byte_fallback"))
    tokens, types = tokens_and_types(tokenizer, vocab_size, bytes_only)
    if bytes_only:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space(tokenizer))
        writer.add_token_scores(merge_scores(tokens, model["merges"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of_cut(tokenizer, path))
        if not model["merges"]:
            writer.add_token_merges([_NEVER])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not bytes_only and bool(model["merges"]), n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)
    _write_ends(writer, folder, special.special_token_ids, len(tokens))


def _write_ends(writer: Any, folder: Path, special: dict[str, int], vocab_size: int) -> None:
    """Name the tokens that end an answer beside EOS: the header has a place for two of them, EOT and EOM."""
    try:
        settings = read_object(folder / "generation_config.json")
    except CheckpointError:
        return
    ends = [end for end in as_ids(settings.get("eos_token_id")) if end < vocab_size and end != special.get("eos")]
    # The template's own end stands last, and is the one that matters most.
    for end, kind in zip(reversed(ends), ("eot", "eom"), strict=False):
        if kind not in special:
            getattr(writer, f"add_{kind}_token_id")(end)


def tokens_and_types(tokenizer: dict[str, Any], vocab_size: int, bytes_only: bool) -> tuple[list[str], list[int]]:
    """The text of each token, by its id, and what kind of token it is (`gguf.TokenType`).

    Args:
        tokenizer: what tokenizer.json holds.
        vocab_size: rows of the model's embedding; ids without a token are filled up.
        bytes_only: whether text outside the vocabulary falls into tokens for single bytes (`<0x0A>`).

    Raises:
        CheckpointError: the tokenizer has tokens that the model has no rows for.
    """
    from gguf import TokenType

    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    by_id = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise CheckpointError(f"The tokenizer has token {max(by_id)}, but the model's vocabulary ends at {vocab_size}")
    unknown = tokenizer["model"].get("unk_token")
    tokens, types = [], []
    for index in range(vocab_size):
        text = by_id.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(text)
        if bytes_only and text == unknown:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED)
        elif bytes_only and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, [int(kind) for kind in types]


def name_of_cut(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts text before merging.

    Args:
        tokenizer: what tokenizer.json holds.
        path: of that file; for messages.

    Raises:
        CheckpointError: no name is known for it.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if not tokenizer["model"]["merges"]:
        return "gpt-2"  # text falls into its bytes, however it is cut
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = CUTS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    raise CheckpointError(
        f"{path} cuts text in a way ({', '.join(map(str, kinds)) or 'none'}) unknown here by llama.cpp's name. "
        "Export --to hf, and convert that with llama.cpp's convert_hf_to_gguf.py, or name its folder with --llama-cpp."
    )


def adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer puts a space before the first word, by what tokenizer.json holds."""
    text = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def merge_scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """A score for each token: SentencePiece merges what scores best, and here the earliest merge has the best score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    return [-float(ranks[token]) if token in ranks else -1e9 if merges else 0.0 for token in tokens]
