"""What all translations are held to: no field is lost, and the result is a run that TRL takes, too."""

import re

import pytest

from theodora.config import TrainConfig
from theodora.foreign import translate
from theodora.train.arguments import sft_arguments
from theodora.train.passed_on import checks


@pytest.fixture(scope="session")
def trl_checks():
    return checks()


@pytest.fixture
def translated(tmp_path, trl_checks):
    """Write a file, translate it, and see that it runs and that each of the fields is spoken of."""

    def translated(text, *, name="recipe.yaml", fields=(), tool=None):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        found = translate(path, tool, trl_checks)
        spoken_of = {re.split(r"[.\[]", note.field)[0] for note in found.notes}
        assert set(fields) <= spoken_of
        sft_arguments(TrainConfig.from_options(found.options), tmp_path / "checkpoints")
        return found

    return translated


@pytest.fixture
def told():
    """The notes of one kind: field → text."""
    return lambda found, kind: {note.field: note.text for note in found.notes if note.kind == kind}
