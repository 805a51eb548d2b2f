"""How a model is made to answer: end tokens, and settings of `generate` that hold whatever the model's own are."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from theodora.data.vocabulary import model_rows
from theodora.ends import end_token_ids


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: `end_token_ids`, but for those that the model has no row for and never writes.

    The first of them also pads, so there is always one.
    """
    rows = model_rows(model)
    return [end for end in end_token_ids(model.generation_config, tokenizer) if end < rows] or [0]


def decoding(ends: list[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0) -> GenerationConfig:
    """Greedy decoding, or sampling if the temperature is above 0.

    Everything that `generate` would otherwise take over from the model's own settings (repetition penalty, beams,
    top-k) is set to do nothing, so that two models are asked in the same way.
    """
    sample = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=sample,
        num_beams=1,
        temperature=temperature if sample else 1.0,
        top_k=0 if sample else 50,  # 50 is "not set" to generate, which warns of anything else without sampling
        top_p=top_p if sample else 1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,  # fine-tuning turns it off in the model's own settings
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
