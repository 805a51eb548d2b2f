"""`theodora evaluate`: the loss and exact match of a model, with or without an adapter, on a file.

example:
  theodora evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --data held_out.jsonl
  theodora evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/first --data held_out.jsonl --json

--model also takes the folder of an adapter, which names its base model. Loss is per predicted token (completions and
assistant turns; all tokens of plain text). Exact match is the share of rows whose greedy answer is the reference,
blanks around both aside; plain text has none.
"""

from __future__ import annotations

import argparse
import json
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theodora.evaluate import Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora evaluate`."""
    parser.add_argument("--model", required=True, help="model folder or hub name, or the folder of an adapter")
    parser.add_argument("--adapter", help="folder of the adapter to put on the model")
    parser.add_argument("--data", required=True, help="rows to score: any source that `theodora train` reads")
    parser.add_argument("--split", help="which split, if the data has several")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    parser.add_argument("--limit", type=_positive, metavar="N", help="score the first N rows only")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="rows in a pass. Default: 16.")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="tokens of the longest answer. Default: 64."
    )
    parser.add_argument("--no-exact-match", action="store_true", help="score the loss only, which is faster")
    parser.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="cut rows after N tokens. Default: the model's context window.",
    )
    parser.add_argument(
        "--no-chat-template", action="store_true", help="join prompt and completion as they stand, without the template"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (as stored), fp32, bf16, fp16. Default: auto."
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")


def run(args: argparse.Namespace) -> int:
    """Score and report."""
    from transformers.utils.logging import disable_progress_bar

    from theodora.adapters.models import load_model_and_tokenizer
    from theodora.cli.console import stderr, stdout
    from theodora.data import load_examples
    from theodora.evaluate import evaluate

    examples = load_examples(args.data, split=args.split)
    if args.limit:
        examples = examples.with_dataset(examples.dataset.select(range(min(args.limit, len(examples)))))
    stderr().print(examples.description, style="dim", markup=False)
    disable_progress_bar()
    with stderr().status("Loading the model ..."):
        model, tokenizer = load_model_and_tokenizer(
            args.model,
            adapter=args.adapter,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        scores = evaluate(
            model,
            tokenizer,
            examples,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            exact_match=not args.no_exact_match,
            max_length=args.max_length,
            use_chat_template=False if args.no_chat_template else None,
            progress=stderr().is_terminal,
        )
    for warning in caught:
        stderr().print(f"Warning: {warning.message}", style="yellow", markup=False, soft_wrap=True)
    if args.json:
        named = {"model": args.model, "adapter": args.adapter, "data": args.data}
        print(json.dumps(named | scores.to_dict(), indent=2))
    else:
        stdout().print(_table(scores))
    return 0


def _table(scores: Scores):  # -> rich.table.Table
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("loss per token", f"{scores.loss:.4f}")
    table.add_row("perplexity", f"{scores.perplexity:,.2f}")
    if scores.exact_match is not None:
        table.add_row("exact match", f"{scores.exact_match:.1%}")
    table.add_row("rows", f"{scores.rows:,}")
    table.add_row("predicted tokens", f"{scores.tokens:,}")
    table.add_row("seconds", f"{scores.seconds:,.1f}")
    return table


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
