"""The pages hold together: links and anchors lead somewhere, the site's navigation names every page, commands parse.

`make docs` builds the site, strictly; here is what can be seen without the builder.
"""

import json
import re
import shlex
import tomllib

import pytest

import scripts
from documents import ROOT, blocks, furnish, run, shortened_python
from theodora.cli import main as command_line

SITE = scripts.load(".ci/site/gather.py")
PAGES = ["README.md", *SITE.pages()]
NOTEBOOK = json.loads((ROOT / "notebooks/first_adapter.ipynb").read_text(encoding="utf-8"))


def test_links_and_anchors_lead_somewhere():
    assert SITE.dead_links() == []


def test_a_dead_link_or_anchor_is_found(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(
        "# A `page` (1)\n\n## A page 1\n\n[a](#a-page-1) [b](#a-page-1-1) [c](#a-page-2)\n"
    )
    (tmp_path / "README.md").write_text(
        "[a](docs/page.md#a-page-1)\n\n`[b](none)` [c](docs/none.md)\n\n```\n[d](none)\n```\n"
    )
    monkeypatch.setattr(SITE, "ROOT", tmp_path)
    monkeypatch.setattr(SITE, "PROJECT_PAGES", ())
    assert SITE.dead_links() == ["README.md:3: docs/none.md", "docs/page.md:5: #a-page-2"]


def test_links_lead_on_the_site_where_they_lead_in_the_repository(tmp_path):
    page = SITE.for_the_site("docs/recipes/README.md", tmp_path)
    assert "](classify.md)" in page
    assert "](../preference.md)" in page
    assert "](../files/recipes/dora.yaml)" in page
    assert (tmp_path / "files/recipes/dora.yaml").read_bytes() == (ROOT / "recipes/dora.yaml").read_bytes()
    assert "](recipes/index.md)" in SITE.for_the_site("docs/README.md", tmp_path)
    assert "](../design.md)" in SITE.for_the_site("CONTRIBUTING.md", tmp_path)


def test_the_navigation_names_every_page():
    named = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    written = [SITE.on_site(page) for page in SITE.pages()]
    made = ["reference/commands.md", "reference/options.md", "reference/python.md"]
    assert sorted(named) == sorted([*written, *made])


def test_the_docs_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = {path.partition("#")[0] for _, _, path in SITE.links(index)}
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= linked


def test_the_tests_that_pages_point_to_exist():
    for page in PAGES:
        paths = re.findall(r"`((?:tests|benchmarks|recipes)/[\w/.-]+)`", (ROOT / page).read_text(encoding="utf-8"))
        assert [path for path in paths if not (ROOT / path).exists()] == [], page


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])
def test_the_commands_of_a_page_parse(page, capsys):
    """Flags that a command does not have, above all; what the commands then do is other tests' business."""
    shown = [command for block in blocks(page) for command in block.commands]
    shown += re.findall(r"^    (theodora [^\n]*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    for command in shown:
        words = shlex.split(command, comments=True)
        if words[:1] == ["theodora"] and words[1:2] != ["--help"] and not {"…", ">", "|"} & set(words[:-2]):
            if ">" in words:
                words = words[: words.index(">")]
            assert exit_code(words[1:]) == 0, f"{page}: {command}\n{capsys.readouterr().err}"


def exit_code(words: list[str]) -> int:
    """With which a command ends while it reads its words."""
    try:
        command_line._parse(words[0], words[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_reference_has_every_option_and_public_name():
    import theodora
    from theodora.config import OPTION_NAMES

    options, names = SITE.options(), SITE.public_names()
    assert [name for name in OPTION_NAMES if f"| `{name}` |" not in options] == ["trainer"]
    assert [name for name in theodora.__all__ if f"## {name}\n" not in names] == ["__version__"]
    assert "| `rank` | whole number; default `8` | Rows of A" in options
    assert "- `ConfigError`: the name is taken, the configuration does not fit the model, or another library" in names


# The notebook


def test_the_notebook_is_valid_and_has_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    cells = NOTEBOOK["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_notebook_runs_from_a_clean_kernel(tmp_path, tiny_model_dir, monkeypatch, capsys):
    furnish(tmp_path, tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).unlink()
    namespace: dict[str, object] = {}
    for cell in NOTEBOOK["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if not text.startswith(("!", "%")):
            exec(compile(shortened_python(text), cell["id"], "exec"), namespace)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("%"):
                assert re.fullmatch(r'%pip install -q "theodora\[\w+\]"', line)
            else:
                run(line[1:].rpartition(" | ")[2], monkeypatch, capsys)  # what is said to chat is said by `run`
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert "after:" in capsys.readouterr().out
