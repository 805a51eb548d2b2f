import json

import pytest

from theodora.demo import task

# A small ontology in the shape of HPO: two systems, a term below both, an obsolete one, a long one, a near-copy.
OBO = """format-version: 1.2

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:1
name: Abnormality of the eye
def: "Any abnormality of the eye." [x]
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Growth abnormality
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:3
name: Cataract
def: "A \\"cloudy\\" lens." [x]
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:4
name: Nuclear cataract
def: "A cloudy nucleus." [x]
is_a: HP:3 ! Cataract

[Term]
id: HP:5
name: Small eye
def: "An eye that did not grow." [x]
is_a: HP:1 ! Abnormality of the eye
is_a: HP:2 ! Growth abnormality

[Term]
id: HP:6
name: Old name
def: "Gone." [x]
is_obsolete: true

[Term]
id: HP:7
name: Tall stature
def: "Tall." [x]
is_a: HP:2 ! Growth abnormality

[Term]
id: HP:8
name: Tallness
def: "TALL" [x]
is_a: HP:2 ! Growth abnormality

[Term]
id: HP:9
name: Verbose
def: "LONG" [x]
is_a: HP:2 ! Growth abnormality

[Term]
id: HP:10
name: Undefined
is_a: HP:2 ! Growth abnormality

[Typedef]
id: part_of
name: part of
""".replace("LONG", "long " * 100)


@pytest.fixture
def findings(tmp_path):
    (tmp_path / "hp.obo").write_text(OBO, encoding="utf-8")
    return task.read_findings(tmp_path / "hp.obo")


def test_findings_have_one_system_a_definition_and_no_copy(findings):
    assert [(f.name, f.definition, f.system) for f in findings] == [
        ("Cataract", 'A "cloudy" lens.', "eye"),
        ("Nuclear cataract", "A cloudy nucleus.", "eye"),
        ("Tall stature", "Tall.", "growth"),
    ]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Abnormality of the nervous system", "nervous system"),
        ("Abnormality of head or neck", "head or neck"),
        ("Abnormality of metabolism/homeostasis", "metabolism/homeostasis"),
        ("Abnormal cellular phenotype", "cellular phenotype"),
        ("Growth abnormality", "growth"),
        ("Constitutional symptom", "constitutional symptom"),
        ("Neoplasm", "neoplasm"),
    ],
)
def test_labels_are_short(name, label):
    assert task.short_label(name) == label


def test_rows_show_one_solved_question_and_ask_another(findings):
    solved = task.Finding(name="Seizure", definition="x", system="nervous system")
    rows = task.make_rows([*findings, solved])
    assert len(rows) == len(findings)
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user", "assistant", "user"]
    assert rows[0]["prompt"][-1]["content"] == 'Cataract: A "cloudy" lens.'
    assert rows[0]["completion"] == [{"role": "assistant", "content": "eye"}]


def test_the_split_is_fixed_and_complete():
    rows = [{"row": i} for i in range(20)]
    training, held_out = task.split_rows(rows, 5)
    assert (training, held_out) == task.split_rows(rows, 5)
    assert len(held_out) == 5
    assert sorted(row["row"] for row in training + held_out) == list(range(20))
    assert held_out != rows[:5]


def test_general_texts_are_fixed_and_long_enough(tmp_path):
    articles = {str(i): {"extract": f"{i} " + "word " * (10 if i % 2 else 80)} for i in range(20)}
    (tmp_path / "texts.json").write_text(json.dumps(articles), encoding="utf-8")
    texts = task.read_general_texts(tmp_path / "texts.json", 4)
    assert texts == task.read_general_texts(tmp_path / "texts.json", 4)
    assert len(set(texts)) == 4
    assert all(int(text.split()[0]) % 2 == 0 for text in texts)
