"""What jobs.py measured, as Markdown: a table for each kind of job, and the goals.

python benchmarks/jobs_report.py benchmarks/results/jobs.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""What jobs.py wrote of a job: machine, settings, and ways with their runs."""

WHOSE = {"before-": "Theodora {}, before", "peft-": "TRL + PEFT {}", "unsloth-": "Unsloth {}", "": "Theodora {}"}
NAMES = {
    "bare": "bare step of Theodora DoRA",
    "evaluate": "theodora evaluate",
    "before-evaluate": "theodora evaluate, before",
    "tokenize": "tokenising",
    "before-tokenize": "tokenising, before",
    "tokenize-all": "tokenising, all rows",
    "demo": "theodora demo",
    "demo-avx2": "theodora demo, AVX2 and float32",
}


def name_of(way: str) -> str:
    """What a way is called in tables and pictures."""
    if way in NAMES:
        return NAMES[way]
    whose = next(prefix for prefix in WHOSE if way.startswith(prefix))
    return WHOSE[whose].format({"dora": "DoRA", "lora": "LoRA"}[way.removeprefix(whose)])


def value_of(found: Found, way: str, key: str, *, first: bool = False) -> float | None:
    """The median of a figure over a way's later rounds (the only round's, if there was one); or that of its first."""
    runs = [run for run in found["ways"].get(way, {"runs": []})["runs"] if run.get(key) is not None]
    chosen = [run for run in runs if run["first"]] if first else [run for run in runs if not run["first"]] or runs
    return statistics.median(run[key] for run in chosen) if chosen else None


def imports_of(found: Found) -> float | None:
    """Seconds of bare imports over the rounds of all ways but the first; or the only round's."""
    runs = [run for taken in found["ways"].values() for run in taken["runs"] if "imports" in run]
    chosen = [run for run in runs if not run["first"]] or runs
    return statistics.median(run["imports"] for run in chosen) if chosen else None


def beyond_imports(found: Found, way: str, *, first: bool = False) -> float | None:
    """Seconds before the end of the first step, less those of bare imports (of the later rounds)."""
    before, imports = value_of(found, way, "before", first=first), imports_of(found)
    return None if before is None or imports is None else before - imports


def rate(found: Found, way: str) -> float | None:
    """Tokens of rows a second, padding not counted."""
    step, tokens = value_of(found, way, "step"), value_of(found, way, "tokens") or found.get("tokens")
    return tokens / step if step and tokens else None


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> str:
    """One table for each kind of job, with the machines below."""
    jobs: dict[str, Found] = report["jobs"]
    trained = {name: found for name, found in jobs.items() if name in "abc"}
    parts = [
        _table(
            [
                *("job", "way", "before the first step", "at a first start", "a step", "tokens/s", "GPU busy"),
                *("whole", "at a first start"),
            ],
            [[name, *_training(found, way)] for name, found in trained.items() for way in found["ways"]],
        )
    ]
    if "d" in jobs:
        heads = ["job", "way", "start and end", "answers and losses", "whole", "at a first start"]
        parts.append(_table(heads, [["d", *_evaluation(jobs["d"], way)] for way in jobs["d"]["ways"]]))
    if "e" in jobs:
        memory = ["MB at most", "MB before reading", "with mapped files"]
        heads = ["job", "way", "rows", "kind", "rows a second a core", *memory]
        parts.append(_table(heads, [["e", *row] for way in jobs["e"]["ways"] for row in _tokenizing(jobs["e"], way)]))
    if "f" in jobs:
        heads = ["job", "way", "dtype", "steps", "training", "exact match", "whole"]
        parts.append(_table(heads, [["f", *_demo(jobs["f"], way)] for way in jobs["f"]["ways"]]))
    return "\n\n".join([part for part in parts if part] + [_notes(jobs)])


def _training(found: Found, way: str) -> list[str]:
    cells = [
        seconds(beyond_imports(found, way)),
        seconds(beyond_imports(found, way, first=True)),
        _shown(value_of(found, way, "step"), "{:.1f} ms", 1000),
        _shown(rate(found, way), "{:,.0f}"),
        _shown(value_of(found, way, "busy"), "{:.0%}"),
        seconds(value_of(found, way, "whole")),
        seconds(value_of(found, way, "whole", first=True)),
    ]
    return [_named(found, way), *_or_reason(found, way, cells)]


def _evaluation(found: Found, way: str) -> list[str]:
    cells = [seconds(value_of(found, way, key)) for key in ("before", "stepping", "whole")]
    return [_named(found, way), *_or_reason(found, way, [*cells, seconds(value_of(found, way, "whole", first=True))])]


def _tokenizing(found: Found, way: str) -> Iterable[list[str]]:
    runs = found["ways"][way]["runs"]
    if not runs:
        yield [_named(found, way), *_or_reason(found, way, [""] * 6)]
        return
    for kind in runs[0]["kinds"]:
        figures = [
            _shown(_of_kind(found, way, kind, "rows_a_second_a_core"), "{:,.0f}"),
            _shown(_of_kind(found, way, kind, "own_megabytes_at_most"), "{:,.0f}"),
            _shown(_of_kind(found, way, kind, "own_megabytes_before"), "{:,.0f}"),
            _shown(_of_kind(found, way, kind, "megabytes_at_most"), "{:,.0f}"),
        ]
        yield [_named(found, way), f"{runs[0]['rows']:,}", kind, *figures]


def _demo(found: Found, way: str) -> list[str]:
    runs = found["ways"][way]["runs"]
    cells = [
        runs[0].get("dtype", "") if runs else "",
        _shown(value_of(found, way, "steps"), "{:.0f}"),
        seconds(value_of(found, way, "training_seconds")),
        _shown(value_of(found, way, "exact_match"), "{:.1%}"),
        seconds(value_of(found, way, "whole")),
    ]
    return [_named(found, way), *_or_reason(found, way, cells)]


def _of_kind(found: Found, way: str, kind: str, key: str) -> float | None:
    """The median of a figure over the later rounds of tokenising."""
    runs = found["ways"].get(way, {"runs": []})["runs"]
    chosen = [run for run in runs if not run["first"]] or runs
    values = [run["kinds"][kind][key] for run in chosen if key in run["kinds"].get(kind, {})]
    return statistics.median(values) if values else None


def _named(found: Found, way: str) -> str:
    taken = found["ways"][way]
    if "failed" not in taken or not (count := len(taken["runs"])):
        return name_of(way)
    return f"{name_of(way)} ({count} {'run' if count == 1 else 'runs'}, then failed)"


def _or_reason(found: Found, way: str, cells: list[str]) -> list[str]:
    """The cells, or why there are none."""
    taken = found["ways"][way]
    if taken["runs"]:
        return cells
    reason = (
        f"failed: {taken['failed']}" if "failed" in taken else f"skipped: {taken.get('skipped', 'no round was run')}"
    )
    return [reason, *[""] * (len(cells) - 1)]


def _notes(jobs: dict[str, Found]) -> str:
    """What the jobs were measured on, and what a reader has to know of each."""
    machines: dict[str, list[str]] = {}
    for name, found in jobs.items():
        machines.setdefault(_machine(found), []).append(name)
    lines = [f"- {', '.join(names)}: {machine}." for machine, names in machines.items()]
    for name, found in jobs.items():
        if parts := _conditions(name, found):
            lines.append(f"- {name}: {'; '.join(parts)}.")
    return "\n".join(lines)


def _machine(found: Found) -> str:
    machine = found["machine"]
    device = machine["gpus"][0].split(",")[0] if machine["gpus"] else f"{machine['cores']} cores of {machine['cpu']}"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"{device}; commit {machine['commit']}, {machine['date'][:10]}; {versions}; bytecode {found['bytecode']}"


def _conditions(name: str, found: Found) -> list[str]:
    settings, parts = found["settings"], list[str]()
    if settings.get("tiny") and name in "abcd":
        parts.append("a tiny model in the place of the shape")
    if "tokens" in found:
        parts.append(f"{settings['steps']} steps of {found['tokens']:,.0f} tokens")
    if (imports := imports_of(found)) is not None and name != "d":
        parts.append(
            f"bare imports of torch, transformers and TRL, {imports:.1f} s, are taken off before the first step"
        )
    if settings["rounds"] == 1 and name in "abcd":
        parts.append("one round: every figure is a first start's")
    if found["parts"] > 1:
        parts.append(f"measured in {found['parts']} parts, whose ways took no turns with one another's")
    if found.get("before"):
        parts.append(f"before is {found['before']}")
    return parts


def seconds(value: float | None) -> str:
    return _shown(value, "{:.1f} s")


def _shown(value: float | None, form: str, times: float = 1.0) -> str:
    return "" if value is None else form.format(times * value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


# Goals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What is to be reached first, and then."""

    text: str
    value: float | None
    """None: not measured."""
    unit: str
    first: float
    then: float
    digits: int = 1
    least: bool = True
    """The bounds are to be reached; otherwise, not to be exceeded."""

    def measured(self) -> str:
        return "not measured" if self.value is None else f"{self.value:.{self.digits}f}{self.unit}"

    def verdict(self, bound: float) -> str:
        text = f"{bound:g}{self.unit}"
        if self.value is None:
            return text
        return f"{text}: {'met' if (self.value >= bound if self.least else self.value <= bound) else 'not met'}"


def goals(report: dict[str, Any]) -> str:
    """The goals as a table; tiny jobs say nothing of them. Ratios are of medians."""
    found = goals_of({name: job for name, job in report["jobs"].items() if not job["settings"].get("tiny")})
    rows = [[goal.text, goal.measured(), goal.verdict(goal.first), goal.verdict(goal.then)] for goal in found]
    return _table(["goal", "measured", "first", "then"], rows)


def goals_of(jobs: dict[str, Found]) -> list[Goal]:
    """The goals of jobs a to f, those that were not measured too."""
    none: Found = {"ways": {}, "settings": {}}
    a, d, e, f = (jobs.get(name, none) for name in "adef")
    steps = a["settings"].get("steps", 100)
    found = [
        Goal("a: a step of DoRA, against TRL + PEFT DoRA", _ratio(a, "peft-dora", "dora", "step"), " ×", 5, 12),
        Goal("a: before the first step, over imports", beyond_imports(a, "dora"), " s", 6, 3, least=False),
        Goal(f"a: whole command, {steps} steps", _ratio(a, "peft-dora", "dora", "whole"), " ×", 2, 4),
    ]
    for name in "bc":
        job = jobs.get(name, none)
        ours, bare = rate(job, "dora"), rate(job, "bare")
        share = ours / bare if ours and bare else None
        found.append(Goal(f"{name}: tokens/s, of the bare step's", share, "", 0.80, 0.92, digits=2))
    found.append(Goal("d: evaluate, against before", _ratio(d, "before-evaluate", "evaluate", "whole"), " ×", 6, 12))
    for kind in _kinds(e) or ["chats"]:
        ours, before = (_of_kind(e, way, kind, "rows_a_second_a_core") for way in ("tokenize", "before-tokenize"))
        text = f"e: rows a second a core, against before, {kind}"
        found.append(Goal(text, ours / before if ours and before else None, " ×", 4, 10))
        few, every = (_of_kind(e, way, kind, "own_megabytes_at_most") for way in ("tokenize", "tokenize-all"))
        text = f"e: memory for ten times the rows, {kind}"
        found.append(Goal(text, every / few if every and few else None, " ×", 1.1, 1.1, digits=2, least=False))
    for way, how in (("demo", "as the CPU is"), ("demo-avx2", "AVX2 and float32")):
        whole = value_of(f, way, "whole")
        text = f"f: the demo, {how}"
        found.append(Goal(text, None if whole is None else whole / 60, " min", 8, 5, least=False))
    return found


def _ratio(found: Found, slow: str, fast: str, key: str) -> float | None:
    """How many times as long one way takes as another."""
    longer, shorter = value_of(found, slow, key), value_of(found, fast, key)
    return longer / shorter if longer and shorter else None


def _kinds(found: Found) -> list[str]:
    """The kinds of rows that were tokenised."""
    runs = [run for taken in found["ways"].values() for run in taken["runs"]]
    return list(dict.fromkeys(kind for run in runs for kind in run["kinds"]))


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(f"{tables(read)}\n\n{goals(read)}")
