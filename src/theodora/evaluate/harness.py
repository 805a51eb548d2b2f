"""EleutherAI's lm-eval on a model as it stands, with its adapter: where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from theodora.errors import DataError, UsageError


def check_harness() -> None:
    """Raise a UsageError that says how to install lm-eval, if it is missing."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed: python -m pip install 'lm-eval>=0.4.9'")


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Score a model on tasks of lm-eval.

    Args:
        model: adapted or not; left as it is.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks. Their data has to be on the machine, or allowed to come from the hub.
        batch_size: requests in a forward pass.
        limit: the first rows of each task only.

    Returns:
        Task -> name of the figure, as lm-eval calls it -> value.

    Raises:
        UsageError: lm-eval is not installed.
        DataError: lm-eval does not know a task, or cannot load its data.
    """
    check_harness()
    # By name, because nobody has to have it, type checkers included.
    lm_eval: Any = import_module("lm_eval")
    wrapper: Any = import_module("lm_eval.models.huggingface")

    wrapped = wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results: Any = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, bootstrap_iters=0)
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    return {
        task: {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for task, values in results["results"].items()
    }
