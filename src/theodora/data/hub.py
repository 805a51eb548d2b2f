"""Data sets of the Hub by name: their own files, and no other address that their descriptions name.

A data set's README says which files it has, and datasets takes any path or address there: on this machine, in a local
network, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import datasets
from huggingface_hub import DatasetCard

from theodora.errors import shown

_HUB = "hf://"


def load_from_hub(name: str, config: str | None) -> Any:
    """Download a data set and open it.

    Raises:
        ValueError: it has files elsewhere than on the Hub.
        Exception: what the network, the Hub and datasets raise.
    """
    card: Any = None
    with suppress(Exception):  # it has none, or the Hub cannot be asked: what follows says so, or reads its cache
        card = DatasetCard.load(name).data.to_dict().get("configs")
    _refuse_elsewhere(_named_files(card))  # before datasets asks whether they are there
    builder = datasets.load_dataset_builder(name, config)
    files: Any = builder.config.data_files
    _refuse_elsewhere(file for file in _strings(files) if not file.startswith(_HUB))
    builder.download_and_prepare()
    return builder.as_dataset()


def _named_files(configs: Any) -> Iterator[str]:
    """Files that a README names by something else than their place in the data set."""
    for config in configs if isinstance(configs, list) else []:
        for file in _strings(config.get("data_files") if isinstance(config, Mapping) else None):
            if file.startswith("/") or "::" in file or ("://" in file and not file.startswith(_HUB)):
                yield file


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []:
        yield from _strings(item)


def _refuse_elsewhere(files: Iterator[str]) -> None:
    for file in files:
        raise ValueError(f"it names {shown(file)}, which is not on the Hub; fetch what you trust, and give the file")
