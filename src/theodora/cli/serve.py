"""`theodora serve`: a model and its adapters behind OpenAI's protocol.

example:
  theodora serve HuggingFaceTB/SmolLM2-135M-Instruct --adapter law=runs/law --adapter med=runs/med

Requests name the base model or an adapter as their `model`; LoRA and DoRA adapters of any ranks share a batch.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from theodora.cli.arguments import add_field
from theodora.cli.imports import imports
from theodora.errors import ConfigError
from theodora.extras import pip_line
from theodora.serve.config import ServeConfig

if TYPE_CHECKING:
    from theodora.serve.engine import Engine

_GROUPS = {
    "The model": ("served_name", "dtype", "quantize", "device"),
    "Adapters": ("slots", "host_adapters", "max_rank", "adapter_folder"),
    "Batches": (
        *("max_batch", "max_queue", "max_batch_tokens", "max_length", "kv_tokens", "kv_memory", "page_size"),
        *("cuda_graphs", "prefix_reuse"),
    ),
    "Answers": ("tool_call_parser", "reasoning_parser"),
    "The server": ("host", "port", "api_key_file", "max_body", "max_connections", "timeout", "client_timeout", "grace"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a server."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the base model")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter and the name to ask for it by; as often as there are adapters",
    )
    for heading, names in _GROUPS.items():
        group = parser.add_argument_group(heading)
        for name in names:
            add_field(group, ServeConfig, name)


def run(args: argparse.Namespace) -> int:
    """Load, say what is served where, and serve."""
    adapters = _adapters(args.adapter)
    config = _config(vars(args))
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import xgrammar  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: {pip_line('serve')}") from error
    from theodora.cli.console import stderr

    with imports(gpu=True):
        from transformers.utils.logging import disable_progress_bar

        from theodora.serve.listening import bound, port_of
        from theodora.serve.run import load_engine, serve

    disable_progress_bar()
    with bound(config.host, config.port) as sockets:
        with stderr().status("loading"):
            engine, tokenizer = load_engine(config, adapters)
        serve(engine, tokenizer, lambda: stderr().print(_panel(engine, port_of(sockets))), sockets)
    return 0


def _adapters(given: list[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter {text}: expected NAME=FOLDER")
        if name in adapters:
            raise ConfigError(f"--adapter {name} is given twice")
        adapters[name] = folder
    return adapters


def _config(given: dict[str, Any]) -> ServeConfig:
    return ServeConfig(**{field.name: given[field.name] for field in fields(ServeConfig) if field.name in given})


def _host(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _panel(engine: Engine, port: int) -> Any:
    from rich import box
    from rich.table import Table

    from theodora.adapters.quantized import quantization_of

    config = engine.config
    table = Table(box=box.SIMPLE_HEAD, title=f"http://{_host(config.host)}:{port}/v1", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("", overflow="fold")
    table.add_column("rank", no_wrap=True, justify="right")
    table.add_column("loaded in", no_wrap=True, justify="right")
    dtype = str(engine.model.dtype).removeprefix("torch.")
    stored = dtype if (found := quantization_of(engine.model)) is None else f"{found.name}, {dtype}"
    table.add_row(config.name, f"base, {engine.device.type}, {stored}, up to {engine.window:,} tokens", "", "")
    for adapter in engine.adapters.adapters():
        table.add_row(adapter.name, adapter.method, str(adapter.rank), f"{adapter.seconds * 1e3:.0f} ms")
    return table
