"""Loading a model and its adapters, and serving them until somebody says stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from theodora.adapters.models import load_model_and_tokenizer
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine


def load_engine(config: ServeConfig, adapters: Mapping[str, str | Path] | None = None) -> tuple[Engine, Any]:
    """An engine that is not started yet, with its adapters, and the tokenizer.

    Raises:
        CheckpointError: the model or an adapter cannot be served.
        ConfigError: a name is given twice.
    """
    model, tokenizer = load_model_and_tokenizer(config.model, dtype=config.dtype, device=config.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.adapter_folder is None:  # no others will come
        config = replace(config, slots=min(config.slots, max(1, len(adapters or {}))))
    engine = Engine(model, config)
    for name, path in (adapters or {}).items():
        engine.load(name, path)
    return engine, tokenizer


def serve(engine: Engine, tokenizer: Any) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are finished, within the configuration's grace."""
    import uvicorn

    from theodora.serve.app import create_app

    config = engine.config
    settings = uvicorn.Config(
        create_app(engine, tokenizer),
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(config.grace),
    )
    uvicorn.Server(settings).run()
