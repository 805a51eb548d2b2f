"""The demo's question: to which body system does a medical finding belong?

Findings come from the Human Phenotype Ontology. A finding with exactly one ancestor among the children of "Phenotypic
abnormality" has a checkable answer: that ancestor, one of 23.

Every prompt shows one solved question. Without it a model that was not trained could not know what form an answer
takes, and would score 0 % whatever it knows.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = "HP:0000118"  # "Phenotypic abnormality"
_LONGEST_DEFINITION = 300  # characters; the few longer ones would set the length of every padded batch
_SHORTEST_TEXT = 200  # characters; a shorter introduction says little about what was forgotten


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One term of the ontology, with the body system it belongs to."""

    name: str
    definition: str
    system: str


_INSTRUCTION = "Name the body system."
_EXAMPLE = Finding(
    name="Seizure", definition="A sudden burst of electrical activity in the brain.", system="nervous system"
)


@dataclass(frozen=True, kw_only=True)
class _Term:
    name: str
    definition: str
    parents: tuple[str, ...]


def read_findings(obo: Path) -> list[Finding]:
    """Read the findings of an HPO release (OBO format), without duplicates, in the file's order."""
    terms = dict(_read_terms(obo.read_text(encoding="utf-8")))
    systems = {key for key, term in terms.items() if _ROOT in term.parents}
    findings: dict[str, Finding] = {}
    for key, term in terms.items():
        above = _ancestors(key, terms) & systems
        if key in systems or len(above) != 1 or not 0 < len(term.definition) <= _LONGEST_DEFINITION:
            continue
        finding = Finding(name=term.name, definition=term.definition, system=short_label(terms[above.pop()].name))
        # Terms that differ in case and punctuation only would leak from training into the held-out rows.
        findings.setdefault(re.sub(r"\W+", " ", finding.definition.lower()).strip(), finding)
    return list(findings.values())


def _read_terms(text: str) -> Iterator[tuple[str, _Term]]:
    for block in text.split("\n\n"):
        if not block.startswith("[Term]") or "\nis_obsolete: true" in block:
            continue
        name = re.search(r"^name: (.*)$", block, re.MULTILINE)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', block, re.MULTILINE)
        key = re.search(r"^id: (\S+)$", block, re.MULTILINE)
        if key and name:
            yield (
                key[1],
                _Term(
                    name=name[1],
                    definition=re.sub(r"\\n|\s+", " ", definition[1]).replace('\\"', '"').strip() if definition else "",
                    parents=tuple(re.findall(r"^is_a: (\S+)", block, re.MULTILINE)),
                ),
            )


def _ancestors(key: str, terms: dict[str, _Term]) -> set[str]:
    """All terms above `key`, itself included."""
    seen: set[str] = set()
    waiting = [key]
    while waiting:
        current = waiting.pop()
        if current in terms and current not in seen:
            seen.add(current)
            waiting.extend(terms[current].parents)
    return seen


def short_label(name: str) -> str:
    """`Abnormality of the nervous system` -> `nervous system`: the rest is in every label alike."""
    return re.sub(r"^abnormal(ity of( the)?)? | abnormality$", "", name.lower())


def make_rows(findings: list[Finding]) -> list[dict[str, Any]]:
    """Turn findings into prompt/completion rows of chat messages."""
    return [
        {
            "prompt": [
                {"role": "system", "content": _INSTRUCTION},
                {"role": "user", "content": _question(_EXAMPLE)},
                {"role": "assistant", "content": _EXAMPLE.system},
                {"role": "user", "content": _question(finding)},
            ],
            "completion": [{"role": "assistant", "content": finding.system}],
        }
        for finding in findings
        if finding.name != _EXAMPLE.name
    ]


def _question(finding: Finding) -> str:
    return f"{finding.name}: {finding.definition}"


def split_rows(rows: list[dict[str, Any]], held_out: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[Any]]:
    """Shuffle once, the same way every time, and set `held_out` rows aside."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[held_out:], shuffled[:held_out]


def read_general_texts(summaries: Path, count: int, seed: int = 0) -> list[str]:
    """Pick `count` Wikipedia introductions, the same ones every time, to measure what was forgotten."""
    articles = json.loads(summaries.read_text(encoding="utf-8")).values()
    texts = sorted({article["extract"].strip() for article in articles})
    return random.Random(seed).sample([text for text in texts if len(text) >= _SHORTEST_TEXT], count)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
