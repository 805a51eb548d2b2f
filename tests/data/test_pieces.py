"""Texts that are tokenised by their pieces, beside the same ones tokenised whole."""

import random
from itertools import chain, pairwise

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from theodora.data import borders, load_examples, pieces, tokenize, tokens
from theodora.data.borders import borders_of
from theodora.data.masks import extents, learned_by_extent, places_in, straddles
from theodora.data.pieces import PieceTokenizer

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"{SHORT}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"
PATTERNS = {
    "gpt2": [],
    "smollm": [],
    "llama3": [QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")],
    "qwen2": [QWEN],
    "qwen3.5": [
        rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{ENDS}"
    ],
    "gpt4o": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}*{CASES[1]}+{SHORT}?|[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}+{CASES[1]}*{SHORT}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
    ],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}*{CASES[1]}+|[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}+{CASES[1]}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
    ],
    "deepseek": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
}
ADDED = [
    *(AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<|im_end|>x", "</s>", "<s>")),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("<tool>", special=False, normalized=True),
    AddedToken("  ", special=False, normalized=True),
    AddedToken("\n\n", special=False, normalized=True),
    AddedToken("é", special=False, normalized=True),
]
USUAL = [
    "a",
    "it's",
    "I'LL",
    "x1",
    "12345",
    "end.",
    "(b)",
    "/",
    ";",
    "if",
    "é",
    "日本",
    "か",
    "🙂",
    "//",
    "don't",
    "A",
    "<",
]
BLANKS = [
    *" " * 4,
    *("\n", "\n\n", "  ", "\n    ", "\t", "\r\n", " \n", "\n \n", "\u00a0", "\u3000", "\u2028", "\x0b", ""),
]
CONTROLS = ["<|im_end|>", "<|im_", "end|>", "<|im_end|>x", "</s>", "<think>", "<tool>", "<to", "<s>"]
ODD = [
    *("e\u0301", "\u0301", "\u0327\u0301", "\u200d", "\x00", "\x1c", "\x7f", "\x85", "ｱﾞ", "\u1112\u1161", "\U00020001"),
    *CONTROLS,
]


def text_of(chance, parts):
    words = USUAL + ODD if chance.random() < 0.5 else USUAL
    return "".join(chance.choice(BLANKS) + chance.choice(words) for _ in range(parts)) + chance.choice(BLANKS)


def byte_level(name, added=ADDED, bos=False, **changed):
    """A byte-level tokenizer that cuts texts by one of the patterns, with tokens for what stands around cuts."""
    tokenizer = Tokenizer(models.BPE(**{k: v for k, v in changed.items() if k == "dropout"}))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in changed.get("patterns", PATTERNS[name])]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=changed.get("prefix", False), use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, *splits, bytes_])
    tokenizer.normalizer = changed.get("normalizer", normalizers.NFC() if "qwen" in name else None)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    chance = random.Random(0)
    tokenizer.train_from_iterator([text_of(chance, 200) for _ in range(20)], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(list(added))
    if bos:
        single = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.post_processor = single
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    for part in {"continuing_subword_prefix", "end_of_word_suffix"} & changed.keys():
        setattr(made.backend_tokenizer.model, part, changed[part])
    return made


def compare(tokenizer, texts, chance):
    """Ids of each text, and what is learned of some stretches of it, both ways."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    by_pieces = PieceTokenizer.of(tokenizer)
    assert by_pieces is not None
    texts = [text for text in texts if by_pieces.fits(text)]
    found = by_pieces.encode(texts)
    assert found is not None
    whole = tokenizer(texts, add_special_tokens=False).encodings
    spans = []
    for text in texts:
        places = sorted(chance.sample(range(len(text) + 1), k=min(4, len(text) + 1)))
        spans.append(list(pairwise(places))[::2])
    flags, straddled = found.learned(spans)
    expected = 0
    for i, (begin, end) in enumerate(pairwise(found.begins.tolist())):
        assert found.ids[begin:end].tolist() == whole[i].ids, repr(texts[i])
        places = extents(places_in(whole[i], len(texts[i])))
        assert flags[begin:end].tolist() == learned_by_extent(spans[i], places).tolist(), repr((texts[i], spans[i]))
        expected += straddles(spans[i], places)
    assert straddled == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_and_what_is_learned_are_the_same(name):
    chance = random.Random(1)
    compare(byte_level(name), ["", *(text_of(chance, chance.randint(1, 12)) for _ in range(300))], chance)


@pytest.mark.long
@pytest.mark.parametrize("name", PATTERNS)
def test_tokens_of_many_texts_are_the_same(name):
    chance = random.Random(2)
    for added in (ADDED, [], ADDED[:5]):
        tokenizer = byte_level(name, added)
        for _ in range(10):
            compare(tokenizer, [text_of(chance, chance.randint(1, 12)) for _ in range(2000)], chance)


CHANGES = {
    "a space in front": {"prefix": True},
    "NFKC": {"normalizer": normalizers.NFKC()},
    "something put in front": {"normalizer": normalizers.Prepend("x")},
    "dropout": {"dropout": 0.1},
    "other letters within words": {"continuing_subword_prefix": "##"},
    "other letters at ends of words": {"end_of_word_suffix": "</w>"},
    "an unknown pattern": {"patterns": [r"\S+ \S+|\s+(?!\S)|\s+"]},
    "nothing for white space": {"patterns": [r"\p{N}{1,3}"]},
    "line breaks late": {"patterns": [rf"{LETTERS}|\s+(?!\S)|\s+|\s*[\r\n]+"]},
    "a token that takes what follows": {"added": [AddedToken("<|end|>", special=True, rstrip=True)]},
    "a token that would be cut": {"added": [AddedToken("a b", normalized=True)]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_sure_is_not_cut(name):
    assert borders_of(byte_level("gpt2")) is not None
    assert borders_of(byte_level("gpt2", **CHANGES[name])) is None


def test_a_tokenizer_that_does_something_of_its_own_is_not_cut(make_tokenizer):
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([one.lower() for one in text], **options)

    tokenizer = Own(tokenizer_object=byte_level("gpt2").backend_tokenizer, eos_token="</s>")
    assert PieceTokenizer.of(tokenizer) is None
    replaced = byte_level("gpt2")
    replaced._encode_plus = lambda text, **options: PreTrainedTokenizerFast._encode_plus(replaced, text, **options)
    assert PieceTokenizer.of(replaced) is None
    assert PieceTokenizer.of(make_tokenizer("metaspace")) is None
    assert PieceTokenizer.of(make_tokenizer("python")) is None


def test_white_space_is_the_same_to_python_and_to_tokenizers():
    every = "".join(chr(code) for code in range(0x3100) if not chr(code).isalnum())
    words = pre_tokenizers.Split(Regex(r"\S+"), "removed").pre_tokenize_str(every)
    theirs = {character for part, _ in words for character in part}
    assert {character for character in every if character.isspace()} - theirs == set(pieces._NO_SPACES)


def test_texts_whose_tokens_lie_elsewhere_are_left_to_the_tokenizer():
    by_pieces = PieceTokenizer.of(byte_level("qwen2"))
    assert [by_pieces.fits(text) for text in ("\u00e9", "e\u0301", "a\x1cb")] == [True, False, False]
    assert PieceTokenizer.of(byte_level("gpt2")).fits("e\u0301")


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(pieces, "_MOST_PIECES", 50)
    monkeypatch.setattr(pieces, "_PRICE", 0)
    chance, tokenizer = random.Random(3), byte_level("llama3")
    by_pieces = PieceTokenizer.of(tokenizer)
    for _ in range(10):
        texts = [text_of(chance, 30).replace("\x1c", "") for _ in range(20)]
        found = by_pieces.encode(texts)
        assert found.ids.tolist() == list(chain(*tokenizer(texts)["input_ids"]))
        assert len(by_pieces._numbers) <= 50


def test_places_within_long_pieces_are_not_remembered():
    by_pieces = PieceTokenizer.of(byte_level("llama3"))
    texts = [letter * length for letter in "acgt" for length in (2, 5000)]
    assert by_pieces.encode(texts).learned([[(1, len(text))] for text in texts])[0].any()
    assert by_pieces._within._cached.cache_info().currsize == 4


def test_words_that_never_come_again_are_left_to_the_tokenizer():
    by_pieces = PieceTokenizer.of(byte_level("llama3"))
    batches = [" ".join(f"x{i}-{j}" for j in range(100)) for i in range(2 + pieces._PAUSE)]
    given_back = [by_pieces.encode([text]) is None for text in batches]
    assert given_back == [False, *[True] * pieces._PAUSE, False]


@pytest.mark.parametrize("left", ["padding", "truncation", "words"])
def test_what_others_left_in_a_tokenizer_makes_no_tokens(left):
    tokenizer, text = byte_level("llama3"), "<|im_start|>a b<|im_end|>" * 9
    expected = tokenizer(text)["input_ids"]
    if left == "padding":
        tokenizer.backend_tokenizer.enable_padding(length=8)
    elif left == "truncation":
        tokenizer.backend_tokenizer.enable_truncation(1)
    else:
        tokenizer.backend_tokenizer.encode_special_tokens = True
    assert PieceTokenizer.of(tokenizer).encode([text]).ids.tolist() == expected


@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_every_kind_are_the_same(bos, write, monkeypatch):
    tokenizer, chance = byte_level("llama3", bos=bos), random.Random(4)
    rows = [{"prompt": text_of(chance, 5), "completion": "x" + text_of(chance, 9)} for _ in range(60)]
    chats = [{"messages": asked_and_answered(f"q{row['prompt']}", row["completion"])} for row in rows]
    texts = [{"text": row["completion"]} for row in rows]
    made = []
    for by_pieces in (True, False):
        if not by_pieces:
            monkeypatch.setattr(PieceTokenizer, "of", lambda tokenizer: None)
        for number, given in enumerate((rows, chats, texts)):
            for train_on in ("completion", "all"):
                examples = load_examples(write(given, f"{number}.jsonl"))
                done = tokenize(examples, tokenizer, max_length=80, train_on=train_on)
                made.append((by_pieces, done["input_ids"][:], done["labels"][:], done.info.description))
    half = len(made) // 2
    assert [one[1:] for one in made[:half]] == [one[1:] for one in made[half:]]


@pytest.mark.parametrize("bos", [False, True])
def test_trimmed_spaces_are_given_back_to_the_tokens_that_hold_them(bos):
    tokenizer, chance = byte_level("gpt2", [*ADDED, AddedToken(" ", special=True)], bos=bos), random.Random(7)
    texts = [" ", "  ", " \n ", "a\n </s>", *(text_of(chance, chance.randint(1, 6)) for _ in range(200))]
    single = tokenizer.backend_tokenizer.post_processor
    made = []
    for trims in (True, False):
        own = processors.ByteLevel(trim_offsets=trims)
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([own, single]) if bos else own
        encodings = tokenizer(texts, add_special_tokens=bos).encodings
        made.append([extents(places_in(one, len(text))).tolist() for one, text in zip(encodings, texts, strict=True)])
    assert made[0] == made[1]


def asked_and_answered(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_tokenizer_is_asked_for_new_pieces_only(write, monkeypatch):
    tokenizer = byte_level("llama3")
    asked = []
    monkeypatch.setattr(tokens.Batches, "_whole", lambda self, texts: asked.append(texts) or iter(()))
    examples = load_examples(write([{"prompt": "a b a b", "completion": " a b a b" * 20}] * 20))
    assert len(tokenize(examples, tokenizer, max_length=50)) == 20
    assert asked == [[]]


def test_new_pieces_are_kept_apart_by_a_token_that_nothing_beside_it_changes(monkeypatch):
    # One is part of another, and one begins as another ends.
    assert borders._separator(["<|im_end|>", "<|im_end|>x", "<|im_start|>", "a<|"]) == "a<|"
    assert borders._separator(["<a>", "b<"]) == "b<"
    assert borders._separator(["<a>", "<a>b"]) is None
    # Behind a word that ends in "|", its first half would be found: as often, elsewhere.
    assert borders._separator(["|||IP|||"]) is None
    compare(byte_level("gpt2", [AddedToken("||", special=True)]), ["x| y", "a|b c||d|"], random.Random(6))
    chance = random.Random(5)
    texts = [text_of(chance, 9) for _ in range(200)]
    monkeypatch.setattr(borders, "_separator", lambda tokens: None)
    compare(byte_level("qwen3.5"), texts, chance)
    # A word that is written as the separator is: its id says no longer where pieces end.
    monkeypatch.setattr(borders, "_separator", lambda tokens: "a")
    compare(byte_level("qwen3.5", [*ADDED, AddedToken("a", special=True)]), texts, chance)
