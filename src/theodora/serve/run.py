"""Loading a model and its adapters, and serving them until somebody says stop."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from theodora.adapters.models import load_model_and_tokenizer
from theodora.files.adapter import read_trained_on
from theodora.files.peft_config import check_continues_text
from theodora.files.trained_on import TrainedOn
from theodora.serve.config import ServeConfig
from theodora.serve.engine import Engine

LOG = logging.getLogger(__name__)
_LAST_WORDS = 10  # seconds after the grace in which answers that are ended are told so


def load_engine(config: ServeConfig, adapters: Mapping[str, str | Path] | None = None) -> tuple[Engine, Any]:
    """An engine that is not started yet, with its adapters, and the tokenizer.

    Raises:
        CheckpointError: the model or an adapter cannot be served.
        ConfigError: a name is given twice.
    """
    for path in (adapters or {}).values():
        check_continues_text(path)
    quantize, dtype = config.quantize, config.dtype
    if quantize is None and (known := _trained_with(adapters or {})) is not None:
        quantize, dtype = known.quantize, known.dtype if dtype == "auto" and known.dtype is not None else dtype
    model, tokenizer = load_model_and_tokenizer(config.model, dtype=dtype, device=config.device, quantize=quantize)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    text: Any = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # for a loss of training, which no batch of requests fits
        text.output_router_logits = False
    if config.adapter_folder is None:  # no others will come
        config = replace(config, slots=min(config.slots, max(1, len(adapters or {}))))
    engine = Engine(model, config)
    for name, path in (adapters or {}).items():
        engine.load(name, path)
    return engine, tokenizer


def _trained_with(adapters: Mapping[str, str | Path]) -> TrainedOn | None:
    """The base of the first adapter, if all were trained on one that was quantised so; None for plain weights."""
    known = {name: read_trained_on(path) or TrainedOn() for name, path in adapters.items()}
    kinds = {on.quantize for on in known.values()}
    if len(kinds) < 2:
        if kinds <= {None}:
            return None
        first = next(iter(known.values()))
        if len({on.dtype for on in known.values()}) > 1:  # of different weights: then those that are stored
            first = replace(first, dtype=None)
        LOG.warning("The base is quantised to %s, on which its adapters were trained.", first.quantize)
        return first
    told = ", ".join(f"{name}: {on.quantize or 'none'}" for name, on in known.items())
    LOG.warning(
        "The adapters were trained on a base that was quantised in different ways (%s), and all share one here: it is "
        "served as it is stored. --quantize KIND chooses.",
        told,
    )
    return None


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


class ServerStopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the server, in order."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """What a command should exit with: 130 after SIGINT, 143 after SIGTERM."""


def serve(
    engine: Engine,
    tokenizer: Any,
    started: Callable[[], object] = lambda: None,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; answers under way are finished, within the configuration's grace.

    A signal that comes while the engine starts or stops waits for that, because an engine half started would leave a
    thread behind for which the process waits in vain. A second Ctrl-C ends the grace, a third everything at once.

    Args:
        engine: is started, and stopped in the end.
        tokenizer: its model's.
        started: called when the engine has started.
        sockets: to listen on, as `listening.bound` gives them; by default the configuration's host and port are taken.

    Raises:
        Unavailable: the model cannot be run in batches.
        ServerStopped: a signal came, and its former handler, which is called in the end, lets the process go on.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # uvicorn's own would take them for a part of the time only

    config = engine.config
    server = Server(server_settings(engine, tokenizer))

    def stop(came: list[int]) -> None:
        server.should_exit = True
        if came.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt
        if len(came) == 1 or came[-1] == signal.SIGINT:
            # Ends what still runs with an answer that says why; uvicorn would cut the connections.
            late = threading.Timer(config.grace if len(came) == 1 else 0.0, engine.stop)
            late.daemon = True
            late.start()

    with _signals_to(stop) as came:
        engine.start()  # here rather than within the application, whose failures uvicorn shows as tracebacks
        try:
            if not came:
                started()
                server.run(sockets)
        finally:
            engine.stop()
    if came:
        # The former handler's turn: by default Ctrl-C interrupts, and SIGTERM ends the process. Where nothing comes of
        # it (a shell starts what runs in the background with SIGINT ignored, and process 1 of a container outlives its
        # own SIGTERM), this must still not look like an end that nobody asked for.
        signal.raise_signal(came[0])
        raise ServerStopped(came[0])


@contextmanager
def _signals_to(handle: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """At SIGINT and SIGTERM within the block call `handle` with all that came; yields them. Only a main thread can."""
    came: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        came.append(number)
        handle(came)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
