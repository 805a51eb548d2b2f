"""One process of a run under Ray Train: what torchrun would have started, with its words sent to the terminal."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from typing import Any, NoReturn

from theodora.config import TrainConfig
from theodora.errors import TheodoraError
from theodora.launch.cluster import go_to, load_ray
from theodora.launch.mailbox import Ended, TooEarly, Wire

_GRACE = 5  # seconds


def work(task: dict[str, Any]) -> None:
    """Train, as one of several. Ray Train has set RANK, WORLD_SIZE and the rest, and connected the processes.

    Args:
        task: config, mailbox, terminal (how the user's is), folder (the user's), mark (see `cluster.beside`), threads.
    """
    ray = load_ray()
    mailbox = task["mailbox"]
    index, machine = int(os.environ["RANK"]), socket.gethostname()
    wire = Wire(ray, mailbox, task["terminal"].pop("encoding"))

    def end(**how: Any) -> None:
        wire.finish()
        ray.get(mailbox.post.remote(Ended(index=index, machine=machine, **how)))

    def fail(text: str, **how: Any) -> NoReturn:
        end(message=text, **how)
        if index:
            time.sleep(_GRACE)  # Ray ends all at once, and the first process may be about to say more
        raise _Told(text) from None

    try:
        result = _train(task, wire)
    except TheodoraError as error:
        # Whoever ends because the first process does has nothing to say.
        fail(str(error), exit_code=error.exit_code, aside=type(error).__name__ == "SaidByFirst")
    except KeyboardInterrupt as error:  # a stop that was asked for: the others end likewise, by themselves
        end(message=str(error), exit_code=getattr(error, "exit_code", 130), interrupted=True)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        fail(text, exit_code=1, expected=False, trace=traceback.format_exc())
    else:
        end(result=result)


class _Told(Exception):
    """What went wrong is in the mailbox; this ends the other processes. (Ours need not be known to Ray's.)"""


def _train(task: dict[str, Any], wire: Wire) -> dict[str, Any]:
    config: TrainConfig = task["config"]
    go_to(task["folder"], task["mark"], config.output)
    import torch

    from theodora.terminal import Terminal
    from theodora.train import train

    if not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ["OMP_NUM_THREADS"] = str(task["threads"])
    torch.set_num_threads(task["threads"])
    threading.Thread(target=_listen, args=(task["mailbox"],), daemon=True, name="theodora-signals").start()
    console = Terminal(file=wire, **task["terminal"])
    return train(config, console=console).to_dict()


def _listen(mailbox: Any) -> None:
    """Hand a signal on that the user's process got: here it arrives in no main thread."""
    from theodora.train.stop import ask_to_stop

    ray = load_ray()
    try:
        number = ray.get(mailbox.signalled.remote())
    except Exception:  # the run is over, and the mailbox gone
        return
    if not ask_to_stop(signal.Signals(number)):
        mailbox.post.remote(TooEarly())
