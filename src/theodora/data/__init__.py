"""From a file of examples to token ids and a loss mask: formats → tokens → (TRL's) packed batches."""

from theodora.data.alike import near_copies
from theodora.data.examples import Examples
from theodora.data.hidden import left_out_of
from theodora.data.load import load_examples
from theodora.data.packing import packing_is_safe
from theodora.data.prompt_layouts import as_prompts
from theodora.data.prompt_rows import PromptRows, tokenize_prompts
from theodora.data.prompts import encode_prompt, expected_answer, reference_answer, render_prompt, with_answer
from theodora.data.sequences import as_answers, tokenize_preferences
from theodora.data.split import split_examples
from theodora.data.templates import fallback_chat_template
from theodora.data.tokens import tokenize

__all__ = [
    "Examples",
    "PromptRows",
    "as_answers",
    "as_prompts",
    "encode_prompt",
    "expected_answer",
    "fallback_chat_template",
    "left_out_of",
    "load_examples",
    "near_copies",
    "packing_is_safe",
    "reference_answer",
    "render_prompt",
    "split_examples",
    "tokenize",
    "tokenize_preferences",
    "tokenize_prompts",
    "with_answer",
]
