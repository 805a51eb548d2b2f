"""`theodora evaluate`: the loss and exact match of a model, with or without an adapter, on a file; on pairs which
answers it finds likelier.

example:
  theodora evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --data held_out.jsonl
  theodora evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/first --data held_out.jsonl --json
  theodora evaluate --model runs/first --base --data held_out.jsonl --rows before-and-after.jsonl

--model also takes the folder of an adapter, which names its base model. Loss is per predicted token (completions and
assistant turns; all tokens of plain text). Exact match is the share of rows whose greedy answer is the reference,
blanks around both aside; plain text has none. With --labels the model need not write anything: the likeliest of a
closed set of answers counts, which is also fair to a model that was never trained.

Pairs (prompt, chosen, rejected) and judged answers (a label that is true or false) are recognised by their columns: on
them log-likelihoods are compared, with an adapter also with those of the base. --labels, --f1 and --metric ask for
answers, and read judged ones as such.

--base scores the base as well, with the same prompts: the adapter switched off, or the model that you name (of a merged
one, say). --rows writes what each row asks, what is expected, what was answered, and its loss.
"""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from theodora.cli.arguments import add_quantize, positive
from theodora.cli.evaluate_rows import check_free, tells, write_rows
from theodora.cli.imports import imports
from theodora.errors import UsageError

if TYPE_CHECKING:
    from theodora.evaluate import PreferenceScores, RewardScores, Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora evaluate`."""
    parser.add_argument("--model", required=True, help="model folder or hub name, or the folder of an adapter")
    parser.add_argument("--adapter", help="folder of the adapter to put on the model")
    parser.add_argument("--data", required=True, help="rows to score: any source that `theodora train` reads")
    parser.add_argument("--split", help="which split, if the data has several")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    parser.add_argument("--limit", type=positive, metavar="N", help="score the first N rows only")
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="rows in a padded pass. Default: 16; losses on a GPU: as many as memory allows for.",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="tokens of the longest answer. Default: 64."
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="also the share of rows whose right label is the likeliest of these; auto: of the answers in the data",
    )
    parser.add_argument(
        "--f1", action="store_true", help="also the mean F1 of the words that answers and references share"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="also the mean of a function of your own, called with (answer, reference); the file is run",
    )
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        default=[],
        metavar="TASK",
        help="also these tasks of EleutherAI's lm-eval, if it is installed and their data is on this machine",
    )
    parser.add_argument("--no-exact-match", action="store_true", help="score the loss only, which is faster")
    parser.add_argument(
        "--base",
        nargs="?",
        const="",
        metavar="MODEL",
        help="also score what it was before: the adapter switched off, or MODEL, with the same prompts",
    )
    parser.add_argument(
        "--rows", metavar="FILE", help="write a line of JSON for each row: prompt, expected, answer, right, loss"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="cut rows after N tokens. Default: the model's context window.",
    )
    parser.add_argument(
        "--no-chat-template", action="store_true", help="join prompt and completion as they stand, without the template"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (as stored), fp32, bf16, fp16. Default: auto."
    )
    add_quantize(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the hub")


def run(args: argparse.Namespace) -> int:
    """Score and report."""
    _check(args)
    with imports(gpu=True):
        from transformers.utils.logging import disable_progress_bar

        from theodora.adapters.merge import adapter_disabled
        from theodora.adapters.models import best_device, load_model_and_tokenizer
        from theodora.cli.console import print_json, say_base, stderr, stdout
        from theodora.data import load_examples
        from theodora.evaluate import evaluate, evaluate_preferences, evaluate_reward_model
        from theodora.evaluate.harness import check_harness, run_harness
        from theodora.evaluate.labels import labels_of
        from theodora.evaluate.metrics import load_metric
        from theodora.files.model_folder import is_scorer
        from theodora.kernels.ahead import begin_with_gpu

    metrics = {where.rpartition(":")[2]: load_metric(where) for where in args.metric}
    if args.lm_eval:
        check_harness()
    judges = is_scorer(args.adapter or args.model)
    if judges:
        _check_of_scorer(args)
    begin_with_gpu(best_device())
    answered = bool(args.labels or args.f1 or args.metric or args.rows or args.base)
    examples = load_examples(args.data, split=args.split, kind="ranked" if judges else "answers" if answered else "any")
    compares = examples.format in ("preference", "unpaired")
    if args.limit:
        examples = examples.with_dataset(examples.dataset.select(range(min(args.limit, len(examples)))))
    stderr().print(examples.description, style="dim", markup=False)
    labels = labels_of(examples) if args.labels == ["auto"] else args.labels
    disable_progress_bar()
    with stderr().status("Loading the model ..."):
        model, tokenizer = load_model_and_tokenizer(
            args.model,
            adapter=args.adapter,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            quantize=args.quantize,
            scores=judges,
        )
    say_base(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)

        def scored(model: Any, whose: str) -> Any:
            if judges:
                template = False if args.no_chat_template else None
                return evaluate_reward_model(
                    model, tokenizer, examples, max_length=args.max_length, use_chat_template=template
                )
            same: dict[str, Any] = {
                "batch_size": args.batch_size,
                "max_length": args.max_length,
                "use_chat_template": False if args.no_chat_template else None,
                "progress": stderr().is_terminal or (bool(args.rows) and tells(stderr().print, whose)),
            }
            if compares:
                return evaluate_preferences(model, tokenizer, examples, **same)
            return evaluate(
                model,
                tokenizer,
                examples,
                max_new_tokens=args.max_new_tokens,
                exact_match=not args.no_exact_match,
                labels=labels,
                f1=args.f1,
                metrics=metrics,
                each_row=bool(args.rows),
                **same,
            )

        base = None
        if args.base == "" and not compares:  # (pairs are compared with the base anyhow)
            with adapter_disabled(model):
                base = scored(model, "base")
        scores = scored(model, "model")
        tasks = run_harness(model, tokenizer, args.lm_eval, args.batch_size or 16, args.limit) if args.lm_eval else {}
        if args.base:
            del model  # two may be more than there is room for
            with stderr().status("Loading the base ..."):
                other, _ = load_model_and_tokenizer(
                    args.base, dtype=args.dtype, trust_remote_code=args.trust_remote_code, quantize=args.quantize
                )
            base = scored(other, "base")
    for warning in caught:
        stderr().print(f"Warning: {warning.message}", style="yellow", markup=False, soft_wrap=True)
    if args.rows:
        write_rows(args.rows, examples, scores, base)
    if args.json:
        named = {"model": args.model, "adapter": args.adapter, "data": args.data}
        more = {"lm_eval": tasks} if tasks else {}
        print_json(named | scores.to_dict() | more | ({"base": base.to_dict()} if base is not None else {}))
    else:
        stdout().print(_table(scores, base, tasks))
    return 0


def _check(args: argparse.Namespace) -> None:
    """See before long work that what was asked for makes sense."""
    from theodora.files.model_folder import is_adapter_folder

    if args.base == "" and args.adapter is None and not is_adapter_folder(args.model):
        raise UsageError(
            f"--base: {args.model} is no adapter that could be switched off; expected --base MODEL, the model that it "
            "was made from"
        )
    if args.rows:
        check_free(args.rows)


def _check_of_scorer(args: argparse.Namespace) -> None:
    """Refuse what is asked of answers, which a reward model does not write."""
    asked = {"labels": args.labels, "f1": args.f1, "metric": args.metric, "lm-eval": args.lm_eval, "rows": args.rows}
    asked["base"] = args.base is not None
    given = [f"--{name}" for name, value in asked.items() if value]
    if given:
        raise UsageError(
            f"{args.adapter or args.model} scores texts, as a reward model does, and writes no answers: "
            f"{' and '.join(given)} cannot be had of it; expected a file of pairs alone"
        )


def _table(  # -> rich Table
    scores: Scores | PreferenceScores | RewardScores, base: Scores | None, tasks: dict[str, dict[str, float]]
):
    from rich.table import Table

    from theodora.evaluate import RewardScores, Scores

    if isinstance(scores, RewardScores):
        rows = _rows_of_scorer(scores)
    else:
        rows = _rows(scores) if isinstance(scores, Scores) else _preference_rows(scores)
    if base is not None:
        rows = [
            ("", "base", "model"),
            *((what, was, now) for (what, now), (_, was) in zip(rows, _rows(base), strict=True)),
        ]
    rows += [(f"{task} {name}", f"{value:.4g}") for task, values in tasks.items() for name, value in values.items()]
    tokens = "tokens" if isinstance(scores, RewardScores) else "predicted tokens"
    rows += [(tokens, f"{scores.tokens:,}"), ("seconds", f"{scores.seconds:,.1f}")]
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    for _ in range(max(map(len, rows)) - 1):
        table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _rows(scores: Scores) -> list[tuple[str, ...]]:
    rows = [("loss per token", f"{scores.loss:.4f}"), ("perplexity", f"{scores.perplexity:,.2f}")]
    shares = {
        "exact match": scores.exact_match,
        "right label likeliest": scores.label_accuracy,
        "F1 of words": scores.token_f1,
    }
    rows += [(name, f"{value:.1%}") for name, value in shares.items() if value is not None]
    rows += [(name, f"{value:.4g}") for name, value in scores.metrics.items()]
    return [*rows, ("rows", f"{scores.rows:,}")]


def _rows_of_scorer(scores: RewardScores) -> list[tuple[str, ...]]:
    return [
        ("better answer scores higher", f"{scores.accuracy:.1%}"),
        ("margin", f"{scores.margin:.4f}"),
        ("score of better answers", f"{scores.better:.4f}"),
        ("score of worse answers", f"{scores.worse:.4f}"),
        ("least and largest score", f"{scores.lowest:.4f}  {scores.highest:.4f}"),
        ("pairs", f"{scores.pairs:,}"),
    ]


def _preference_rows(scores: PreferenceScores) -> list[tuple[str, ...]]:
    """Figures of the model; with an adapter between those of the base and those of their difference."""
    pairs = scores.policy.accuracy is not None
    better, worse = ("better", "worse") if pairs else ("good", "bad")
    figures = {
        "better answer likelier": ("accuracy", "{:.1%}"),
        "better answer likelier per token": ("accuracy_per_token", "{:.1%}"),
        "good likelier than bad, per token (AUC)": ("auc", "{:.3f}"),
        f"log-likelihood of {better} answers": ("better", "{:.3f}"),
        f"log-likelihood of {worse} answers": ("worse", "{:.3f}"),
        "margin": ("margin", "{:.3f}"),
        f"{better} answers, per token": ("better_per_token", "{:.4f}"),
        f"{worse} answers, per token": ("worse_per_token", "{:.4f}"),
    }
    columns, rows = [scores.policy], list[tuple[str, ...]]()
    if scores.base is not None and scores.rewards is not None:
        columns = [scores.base, scores.policy, scores.rewards]
        rows.append(("", "base", "adapter", "reward/β"))
    for words, (name, form) in figures.items():
        values = [getattr(column, name) for column in columns]
        if None not in values:
            rows.append((words, *map(form.format, values)))
    counts = [("pairs", scores.better)] if pairs else [("good answers", scores.better), ("bad answers", scores.worse)]
    return [*rows, *((name, f"{count:,}") for name, count in counts)]
