"""What libraries log at their import stays off the command line, and nothing else does."""

import logging

import pytest

from theodora.cli.import_notes import without_import_notes


@pytest.mark.parametrize("name", ["torchao", "bitsandbytes.backends.cpu.ops"])
def test_notes_at_import_are_left_out(name, caplog, monkeypatch):
    logger = logging.getLogger(name)
    for switch, on in {"disabled": False, "propagate": True, "level": logging.WARNING}.items():  # whatever ran before
        monkeypatch.setattr(logger, switch, on)
    with without_import_notes():
        logger.warning("Failed to load CPU gemm_4bit_forward from %s", "there")
        logger.warning("something else")
    logger.warning("Failed to load CPU gemm_4bit_forward afterwards")
    assert [record.message for record in caplog.records] == [
        "something else",
        "Failed to load CPU gemm_4bit_forward afterwards",
    ]
