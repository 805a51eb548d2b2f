"""The study's files are comparisons, and the script that fetches their data reads what it is to read."""

import importlib.util
import zlib
from pathlib import Path

import pytest
import yaml

from theodora.compare import CompareConfig
from theodora.compare.cells import all_cells

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("study_data", RECIPES / "study_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["study.yaml", "study-small.yaml", "study-preference.yaml"])
def test_the_studies_are_comparisons(name):
    text = (RECIPES / name).read_text()
    config = CompareConfig.from_options(yaml.safe_load(text))
    assert f"theodora compare recipes/{name}" in text
    assert all_cells(config, {})[0]
    assert config.reference == ("lora",)


def test_near_copies_are_left_out(script):
    one = "permission is granted to use this software for any purpose without a fee"
    rows = [
        (one, "a"),
        (one.replace("a fee", "any fee, 2019"), "a"),
        ("something that nobody else has copied", "b"),
    ]
    assert script.without_near_copies(rows) == [rows[0], rows[2]]


def test_foldoc_and_a_debian_package_are_read(script, monkeypatch):
    text = (
        "\n\nalpha\n\n   <language> A {programming language} of {letters} that is\n   long enough.\n\n"
        "   (2001-02-03)\n\n"
        "beta test\nbeta\n\n   <operating system, x> Another definition that is long enough.\n\n"
    )
    compress = zlib.compressobj(wbits=31)
    packed = compress.compress(text.encode()) + compress.flush()
    monkeypatch.setattr(script, "member_of_deb", lambda package, name: packed)
    assert script.foldoc(b"") == [
        ("alpha: A programming language of letters that is long enough.", "language"),
        ("beta test: Another definition that is long enough.", "operating system"),
    ]


def test_rule_files_are_read(script):
    raw = b"---\nlicense_expression: mit\nis_license_notice: yes\nnotes: a: b\n---\n\nThe text.\n"
    head, body = script.front_matter(raw)
    assert head == {"license_expression": "mit", "is_license_notice": True}
    assert body.strip() == "The text."
