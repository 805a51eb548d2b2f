"""`verify`: do two forms of one model say the same?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from theodora.errors import CheckpointError, UsageError
from theodora.export.forms import Form, open_form, release
from theodora.export.gguf_files import PRECISIONS
from theodora.export.predictions import Difference, Predictions, difference
from theodora.export.server import is_server
from theodora.files.distrust import expanded
from theodora.files.ours import described, merged_onto
from theodora.merging.onto import Onto
from theodora.merging.probe import PROBE_TEXT
from theodora.parse import finite_values

# By the coarser form's precision: how large a difference of a logit may be, relative to the standard deviation of A's
# logits, and the mean KL, in nats. Measured, with room for other models; docs/exporting.md has the numbers.
BOUNDS = {
    "float32": (1e-3, 1e-6),
    "float16": (0.02, 1e-4),
    "bfloat16": (0.3, 1e-3),
    "quantised": (1.0, 5e-2),
    "unknown": (0.3, 1e-3),
}
BOUNDS_OF_BITS = {
    "q8_0": (1.0, 2e-2),
    "q6_k": (1.2, 3e-2),
    "q5_k_m": (5.0, 0.4),
    "q5_k_s": (5.0, 0.4),
    "q5_1": (5.0, 0.4),
    "q5_0": (5.0, 0.4),
    "q4_k_m": (4.0, 0.2),
    "q4_k_s": (4.0, 0.2),
    "q4_1": (6.0, 1.0),
    "q4_0": (8.0, 1.2),
    "q3_k_l": (6.0, 1.0),
    "q3_k_m": (6.0, 1.0),
    "q3_k_s": (8.0, 2.0),
    "q2_k": (8.0, 3.0),
}
"""The same of what llama.cpp quantises, by kind: some three times what a small model loses, and large ones lose less.
Below q8_0 the adapter's effect is held against the distance from the base instead (`Verification.from_base`), for
rounding to few bits may move predictions further than an adapter does."""
_SERVER_TOKENS = 64  # each is a request of its own
_TOKENS = 256


@dataclass(frozen=True)
class Verification:
    """How far B is from A, and how far it may be."""

    a: str
    b: str
    kinds: tuple[str, str]
    precisions: tuple[str, str]
    difference: Difference
    effect: Difference | None
    """How far A is from its own base on the same text, where A is an adapter: if B is as far from A, it lacks the
    adapter."""
    bound: float
    """Largest difference of a logit (log-probability) allowed."""
    kl_bound: float
    """Largest mean KL allowed, in nats."""
    first_text: tuple[str, str, str] | None = None
    """The text before the first position where the choice differs, A's next token, and B's."""
    notes: tuple[str, ...] = field(default=())
    unrounded: tuple[Difference, Difference] | None = None
    """Where layers of A round their inputs (LLM.int8): B's distance and the effect without that, which are judged."""
    from_base: Difference | None = None
    """How far B, in few bits, is from A's base: a B that is no nearer to A has lost the adapter."""
    written: tuple[str | None, str | None] = (None, None)
    """Whether each form, if it is a folder, is as it was written."""

    @property
    def passed(self) -> bool:
        """Whether the differences are within their bounds, and below half of the adapter's effect."""
        within = self.difference.largest <= self.bound and self.difference.kl_mean <= self.kl_bound
        return within and not self.lost

    @property
    def lost(self) -> bool:
        """Whether B is further from A than half of the adapter's effect: it can hardly have the adapter in it.

        In few bits it may be further, as long as it is nearer to A than to A's base.
        """
        if self.from_base is not None and self.effect is not None and self.effect.kl_mean > BOUNDS["float32"][1]:
            return self.difference.kl_mean >= self.from_base.kl_mean
        found, effect = self.unrounded or (self.difference, self.effect)
        if effect is None or found.measure != effect.measure or effect.kl_mean <= BOUNDS["float32"][1]:
            return False
        return found.kl_mean > 0.5 * effect.kl_mean

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return finite_values(asdict(self) | {"passed": self.passed, "lost": self.lost})


def verify(
    a: str,
    b: str,
    *,
    base_model: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    bound: float | None = None,
    kl_bound: float | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Compare two forms of one model on a text, after each of its tokens.

    Example:
        `verify("runs/first", "merged").passed`

    Args:
        a, b: each a model folder or hub name, an adapter folder, a .gguf file (model or LoRA), or the URL of a running
            OpenAI-compatible server, the model's name after a # (`http://localhost:8000/v1#law`). Not two servers.
        base_model: the base of adapters that name none.
        text: to compare on. Default: a page of prose, code and other scripts.
        tokens: how many of its tokens. Default: 256; with a server 64, each of which is a request.
        bound: largest difference of a logit allowed (log-probability, with a server). Default: by the coarser form's
            stored precision, relative to the spread of A's logits.
        kl_bound: largest mean KL divergence allowed, in nats. Default: by precision.
        dtype: to compute in.
        trust_remote_code: run Python code that comes with the model.
        progress: called with a line before each long step.

    Raises:
        CheckpointError: a form does not load or answer, or the two have different vocabularies.
        UsageError: two servers, or a text without tokens.
    """
    if is_server(a) and is_server(b):
        raise UsageError("Two servers cannot be compared with each other: compare each with the files it serves")

    # An adapter computes on the weights that the other form was merged onto.
    onto: Onto | None = next((way for form in (a, b) if (way := _merged_onto(form)) is not None), None)

    def open_named(name: str) -> Form:
        return open_form(name, base_model=base_model, dtype=dtype, trust_remote_code=trust_remote_code, onto=onto)

    limit = tokens or (_SERVER_TOKENS if is_server(a) or is_server(b) else _TOKENS)
    answers = _ask_both(a, b, open_named, text, limit, progress or (lambda _line: None))
    forms, ids, notes = answers.forms, answers.ids, list(answers.notes)
    _check_vocabularies(forms, answers.predictions)
    gap = difference(*answers.predictions)
    if answers.effect is not None and answers.effect.kl_mean <= BOUNDS["float32"][1]:
        notes.append(
            "The adapter changes next to nothing on this text, so the forms being equal shows nothing: give --text."
        )
    if gap.positions < len(ids):
        notes.append(f"The server gave no log-probabilities after {len(ids) - gap.positions} of {len(ids)} tokens.")
    relative, kl_default = _bounds(forms)
    spread = gap.reference if math.isfinite(gap.reference) else 1.0
    return Verification(
        a=a,
        b=b,
        kinds=(forms[0].kind, forms[1].kind),
        precisions=(forms[0].precision, forms[1].precision),
        difference=gap,
        effect=answers.effect,
        unrounded=_unrounded(answers),
        from_base=_from_base(answers),
        bound=relative * spread if bound is None else bound,
        kl_bound=kl_default if kl_bound is None else kl_bound,
        first_text=_first_text(gap, ids, answers.tokenizer),
        notes=tuple(notes),
        written=(described(expanded(a)), described(expanded(b))),
    )


def _bounds(forms: Sequence[Form]) -> tuple[float, float]:
    coarsest = max((form.precision for form in forms), key=PRECISIONS.index)
    kinds = [BOUNDS_OF_BITS[form.bits] for form in forms if form.bits is not None]
    return max(kinds) if kinds and coarsest == "quantised" else BOUNDS[coarsest]


def _from_base(answers: _Answers) -> Difference | None:
    if answers.base is None or answers.forms[1].bits in (None, "q8_0"):
        return None
    return difference(answers.base, answers.predictions[1])


def _unrounded(answers: _Answers) -> tuple[Difference, Difference] | None:
    if answers.unrounded is None:
        return None
    here, base = answers.unrounded
    return difference(here, answers.predictions[1]), difference(base, here)


def _merged_onto(form: str) -> Onto | None:
    said = None if is_server(form) else merged_onto(expanded(form))
    return said if said in get_args(Onto) else None  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Answers:
    """What both forms predict after each token of the text; A first."""

    forms: tuple[Form, Form]
    """Their models are released."""
    predictions: tuple[Predictions, Predictions]
    ids: list[int]
    """The text's tokens."""
    tokenizer: PreTrainedTokenizerBase
    effect: Difference | None
    """What A's adapter does to its base, where A is an adapter."""
    unrounded: tuple[Predictions, Predictions] | None
    """A and its base by layers that round no inputs, where A's own do."""
    notes: list[str]
    base: Predictions | None = None
    """Of A without its adapter."""


def _ask_both(
    a: str, b: str, open_named: Callable[[str], Form], text: str | None, limit: int, say: Callable[[str], None]
) -> _Answers:
    """Load one form after the other, so that memory holds one, and ask each after every token of the text."""
    asked: dict[str, tuple[Form, Predictions]] = {}
    ids: list[int] = []
    tokenizer: PreTrainedTokenizerBase | None = None
    effect: Difference | None = None
    unrounded: tuple[Predictions, Predictions] | None = None
    base: Predictions | None = None
    notes: list[str] = []
    for side, name in (
        (("b", b), ("a", a)) if is_server(a) else (("a", a), ("b", b))
    ):  # a server has no tokens of its own
        say(f"opening {name}")
        form = open_named(name)
        if tokenizer is None:
            tokenizer = form.tokenizer
            if tokenizer is None:
                raise CheckpointError(f"{name} has no tokenizer to make tokens of the probe text with")
            ids = _probe_ids(form, tokenizer, text, limit)
        elif form.tokenizer is not None:
            notes += _tokenizer_note(form, tokenizer, ids, text)
        notes += [form.note] if form.note else []
        say(f"asking {name} after each of {len(ids)} tokens")
        predictions = form.predict(ids, tokenizer)
        if side == "a" and (base := form.predict_base(ids)) is not None:
            effect, unrounded = difference(base, predictions), form.predict_unrounded(ids)
        release(form)
        asked[side] = form, predictions
    assert tokenizer is not None
    (form_a, of_a), (form_b, of_b) = asked["a"], asked["b"]
    return _Answers((form_a, form_b), (of_a, of_b), ids, tokenizer, effect, unrounded, notes, base)


def _probe_ids(form: Form, tokenizer: PreTrainedTokenizerBase, text: str | None, limit: int) -> list[int]:
    window = getattr(form.model.config.get_text_config(), "max_position_embeddings", None) if form.model else None
    ids = tokenizer.encode(
        PROBE_TEXT if text is None else text, truncation=True, max_length=min(limit, window or limit)
    )
    if not ids:
        raise UsageError("The probe text has no tokens")
    return ids


def _tokenizer_note(form: Form, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str | None) -> list[str]:
    assert form.tokenizer is not None
    theirs = form.tokenizer.encode(PROBE_TEXT if text is None else text, truncation=True, max_length=len(ids))
    if theirs == ids:
        return []
    at = next((n for n, (x, y) in enumerate(zip(ids, theirs, strict=False)) if x != y), min(len(ids), len(theirs)))
    read_by = " as transformers reads it (llama.cpp reads GGUF tokenizers itself)" if form.kind == "gguf" else ""
    return [f"The tokenizer of {form.name}{read_by} cuts the probe text otherwise, from token {at} on."]


def _check_vocabularies(forms: Sequence[Form], predictions: Sequence[Predictions]) -> None:
    sizes = [p.logits_TV.shape[1] for p in predictions if p.logits_TV is not None]
    tokens = [len(form.tokenizer) for form in forms if form.tokenizer is not None]
    if len(sizes) == 2 and sizes[0] != sizes[1] and min(sizes) < max(tokens, default=0):
        raise CheckpointError(
            f"{forms[0].name} has {sizes[0]} tokens and {forms[1].name} {sizes[1]}: these are different models"
        )


def _first_text(gap: Difference, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str] | None:
    if gap.first is None or gap.choices is None:
        return None
    before = str(tokenizer.decode(ids[max(0, gap.first - 7) : gap.first + 1]))
    return before, *(str(tokenizer.decode([choice])) for choice in gap.choices)  # pyright: ignore[reportReturnType]
