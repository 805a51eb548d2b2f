"""Axolotl's data sets: where their rows are, and what of their layout ours reads by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from theodora.errors import shown
from theodora.foreign import sources
from theodora.foreign.reading import Reading, Rule, held, is_off, missing, read_under, words


def read_datasets(reading: Reading, origin: str, given: Any) -> None:
    """The list of data sets that a run trains on (datasets), or is evaluated on (test_datasets)."""
    option = "eval_data" if origin == "test_datasets" else "data"
    entries: list[Any] = given if isinstance(given, list) else [given]
    places: list[str] = []
    for index, entry in enumerate(entries):
        where = origin if len(entries) == 1 else f"{origin}[{index}]"
        fields: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"path": entry}
        if not isinstance(fields.get("path"), str):
            reading.refuse(f"{where} has no path; expected a file, or a data set of the Hub")
            continue
        places += _places(reading, where, fields)
        _layout(reading, where, fields, option)
    sources.take(reading, option, origin, places)


def _places(reading: Reading, where: str, fields: Mapping[str, Any]) -> Iterator[str]:
    path, files = fields["path"], fields.get("data_files")
    if not is_off(files):
        for file in sources.listed(files):
            yield str(file)
        if path not in ("json", "csv", "parquet", "text"):  # datasets' words for kinds of file
            reading.missing(f"{where}.path", path, "would be where data_files are; write their whole paths")
    else:
        yield sources.hub_name(path, fields.get("name"))
    if (split := fields.get("split")) is not None:
        if split == "train":
            reading.note("held", f"{where}.split", split, "the split train is what is read")
        else:
            reading.missing(
                f"{where}.split", split, f"would read the split {shown(split)}; write these rows into a file"
            )
    if "ds_type" in fields:
        reading.note("held", f"{where}.ds_type", fields["ds_type"], "the kind of file is told by its name")


# What a type of rows means here: None says that it is read as there.
_TYPES: dict[str, str | None] = {
    "chat_template": None,
    "sharegpt": None,
    "completion": None,
    "pretrain": None,
    "alpaca": "there Alpaca's prompt is put around each row; here rows become turns of the chat template, or stand as "
    "they are",
}


def _layout(reading: Reading, where: str, fields: Mapping[str, Any], option: str) -> None:
    """Which columns a row has, and what is learned of it."""
    kind = fields.get("type")
    name = f"{where}.type"
    if isinstance(kind, Mapping):
        understood = {"field_instruction": ("instruction",), "field_input": ("input",), "field_output": ("output",)}
        understood |= {"field_system": ("system",)}
        columns = {key: value for key, value in kind.items() if str(key).startswith("field_")}
        sources.name_columns(reading, name, columns, understood)
        for key, value in kind.items():
            if key not in columns:
                reading.missing(
                    f"{name}.{key}", value, "would word the prompt; here rows become turns, or stand as they are"
                )
    elif kind in ("completion", "pretrain"):
        reading.note("held", name, kind, "plain text is recognised, and all of it is learned")
        sources.name_columns(reading, where, {"field": fields.get("field")}, {"field": ("text",)})
    elif isinstance(kind, str):
        base = kind.partition(":")[0].partition(".")[0]
        if base in _TYPES and _TYPES[base] is None:
            reading.note("held", name, kind, "the layout is recognised by its columns")
        elif base in _TYPES:
            reading.note("differs", name, kind, f"the layout is recognised by its columns; {_TYPES[base]}")
        elif "objective" in reading.options:
            reading.note("differs", name, kind, "pairs are recognised by their columns (prompt, chosen, rejected)")
        elif base == "input_output":
            reading.missing(name, kind, "would read segments with labels; write prompt and completion, or messages")
        else:
            reading.missing(
                name, kind, "would read rows of that layout; here columns are recognised by name (docs/data.md)"
            )
    rules = DATA_RULES | ({"field": held("read above")} if kind in ("completion", "pretrain") else {})
    read_under(reading, where, {key: value for key, value in fields.items() if key not in _READ_ALREADY}, rules)


def _turns_column(reading: Reading, origin: str, given: Any) -> None:
    where = origin.rpartition(".")[0]
    sources.name_columns(reading, where, {"field_messages": given}, {"field_messages": sources.TURNS})


def _turns_keys(reading: Reading, origin: str, given: Any) -> None:
    mapping = given if isinstance(given, Mapping) else {origin.rpartition(".")[2]: given}
    for key, value in mapping.items():
        if value in sources.KEYS_OF_TURNS:
            reading.note("held", origin, value, "the keys of turns are recognised")
        else:
            reading.missing(
                origin, value, f"would take {shown(value)} for {key} in turns; rename it to role or content"
            )


def _roles_to_train(reading: Reading, origin: str, given: Any) -> None:
    if [str(role) for role in sources.listed(given)] in (["assistant"], ["gpt"]):
        reading.note("held", origin, given, "the model's turns are learned")
    else:
        reading.missing(
            origin, given, "would learn the turns of these roles; here the model's, or all with train_on: all"
        )


_READ_ALREADY = ("path", "type", "name", "data_files", "split", "ds_type")
DATA_RULES: dict[str, Rule] = {
    "chat_template": lambda reading, origin, given: chat_template(reading, origin, given),
    "chat_template_jinja": missing("would be the chat template; write it into a file, and chat_template_path: FILE"),
    "field_messages": _turns_column,
    "conversation": missing("would word the conversation in that style; here the tokenizer's chat template does"),
    "message_field_role": _turns_keys,
    "message_field_content": _turns_keys,
    "message_property_mappings": _turns_keys,
    "message_field_training": _turns_keys,
    "roles_to_train": _roles_to_train,
    "train_on_eos": words(
        "",
        {"turn": None, "last": None},
        "would decide which ends of turns are learned; here those of learned turns are",
    ),
    "roles": missing("would rename roles; here common names are recognised (docs/data.md)"),
    "revision": missing("would take that version of the data set; download it, and name the file"),
    "trust_remote_code": missing("would run code that comes with the data set, which nothing does here"),
    "shards": missing("would read one part of the rows alone; cut the file"),
    "preprocess_shards": held("rows are prepared piece by piece"),
    "system_prompt": missing("would be the system's turn of every row; write a column system"),
}


def chat_template(reading: Reading, origin: str, given: Any) -> None:
    """The template by name, of the file or of one data set."""
    if given == "tokenizer_default":
        reading.note("held", origin, given, "the tokenizer's own template is used")
    else:
        reading.missing(
            origin,
            given,
            "would word conversations in that template; here the tokenizer's own does, if it has one, and "
            "chat_template_path: FILE takes another",
        )
