"""Loading a model and its adapters, and serving them until somebody says stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from theodora.adapters.models import load_model_and_tokenizer
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine

_LAST_WORDS = 10  # seconds after the grace in which answers that are ended are told so


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


def server_settings(engine: Engine, tokenizer: Any, **more: Any) -> Any:
    """uvicorn's settings for an engine, whose configuration says what a client may take.

    Args:
        engine: is started with the application.
        tokenizer: its model's.
        **more: other settings of uvicorn's, which win.
    """
    import uvicorn

    from theodora.serve.app import create_app
    from theodora.serve.connections import Limits, connection_of, most_connections

    config = engine.config
    limits = Limits(
        connections=most_connections(config.max_connections),
        patience=config.client_timeout,
        answer=config.timeout,
        stop=config.grace + _LAST_WORDS / 2,
    )
    settings: dict[str, Any] = {
        "host": config.host,
        "port": config.port,
        # Not limit_concurrency, which counts answers under way and turns /health away with them.
        "http": connection_of(limits),
        "loop": "asyncio",  # whose connections read as little at a time as they are told
        "ws": "none",  # sockets that no limit here holds for
        # uvicorn warns of what clients send, a line for each.
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": int(config.grace) + _LAST_WORDS,
    }
    return uvicorn.Config(create_app(engine, tokenizer), **settings | more)


def serve(engine: Engine, tokenizer: Any, started: Callable[[], object] = lambda: None) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are finished, within the configuration's grace.

    Args:
        engine: is started, and stopped in the end.
        tokenizer: its model's.
        started: called when the engine has started.

    Raises:
        Unavailable: the model cannot be run in batches.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if not self.should_exit:
                # Ends what still runs with an answer that says why; uvicorn would cut the connections.
                late = threading.Timer(config.grace, engine.stop)
                late.daemon = True
                late.start()
            super().handle_exit(sig, frame)

    config = engine.config
    settings = server_settings(engine, tokenizer)
    engine.start()  # here rather than within the application, whose failures uvicorn shows as tracebacks
    try:
        started()
        Server(settings).run()
    finally:
        engine.stop()
