"""Training and comparing on a Ray cluster of this machine, for real: make test-ray. Skipped where there is no Ray."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.terminal import Terminal

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    """One for all tests: it takes longer to start than a run."""
    from theodora.launch.cluster import load_ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = load_ray()
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def options(tiny_model_dir, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ray")
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}" + "!" * (a % 5)} for a in range(8) for b in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_model_dir()),
        "data": str(folder / "sums.jsonl"),
        "output": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "bf16": False,
        "save_steps": 2,
    }


def arguments(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def on_ray(options: dict[str, Any], workers: int = 2, **others: Any) -> tuple[dict[str, Any], str]:
    """The figures of a run, and what stood on the terminal."""
    from theodora.launch.ray_train import train_on_ray

    text = io.StringIO()
    console = Terminal(file=text, width=100)
    return train_on_ray(TrainConfig.from_options(options | others), workers=workers, console=console), text.getvalue()


@pytest.fixture(scope="module")
def run(cluster, options) -> tuple[dict[str, Any], str]:
    return on_ray(options)


def test_it_is_the_run_that_torchrun_makes(run, options, tmp_path):
    output = str(tmp_path / "torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "theodora"]
    command += ["train", *arguments(options | {"output": output})]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # as many threads as a CPU of Ray's
    subprocess.run(command, check=True, env=os.environ | settings, capture_output=True)
    one, other = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (options["output"], output))
    assert {name: bool((one[name] == other[name]).all()) for name in one} == dict.fromkeys(other, True)


def test_the_terminal_shows_one_run(run, options):
    figures, text = run
    assert figures["steps"] == 4
    assert figures["output"] == options["output"]
    assert text.count("theodora train ─") == 1
    assert text.count("step 4/4") == 1
    assert text.index("Learning rate") < text.index("step 1/4") < text.index("Result")
    assert "RayTrainWorker" not in text
    lines = (Path(options["output"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]


def test_it_goes_on_from_a_checkpoint(run, options):
    figures, text = on_ray(options, resume="auto", max_steps=6)
    assert figures["steps"] == 6
    assert "step 5/6" in text
    assert "step 4/6" not in text


def test_what_a_process_refuses_is_said_in_its_words(run, options, tmp_path):
    from theodora.launch.ray_train import RunFailed

    with pytest.raises(RunFailed, match=r"no-such\.jsonl") as raised:
        on_ray(options, data=str(tmp_path / "no-such.jsonl"), output=str(tmp_path / "run"))
    assert raised.value.exit_code == 1
    assert "Ray" not in str(raised.value)
    with pytest.raises(RunFailed, match="nonsense") as raised:
        on_ray(options, targets="nonsense", output=str(tmp_path / "run"))
    assert raised.value.exit_code == 2


def test_more_than_there_is_is_refused(cluster, options, tmp_path):
    with pytest.raises(ConfigError, match="9 workers want a CPU each"):
        on_ray(options, workers=9, output=str(tmp_path / "run"))


def test_cells_come_out_as_here(cluster, options, tmp_path):
    from theodora.compare import CompareConfig, compare
    from theodora.launch.ray_cells import workers_on_ray

    def config(output: str) -> CompareConfig:
        data = {"sums": {"train": options["data"], "validation": 8, "test": 8, "score": "loss"}}
        asked = {"model": options["model"], "data": data, "output": str(tmp_path / output), "methods": ["lora", "dora"]}
        return CompareConfig.from_options(
            asked
            | {"ranks": [2], "learning_rates": [1e-3, 1e-2], "seeds": 1, "steps": 3, "batch_size": 4, "bf16": False}
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there, for the same rounding
    console = Terminal(file=io.StringIO())
    here = compare(config("here"), console=console)
    torch.set_num_threads(threads)
    with workers_on_ray(config("ray"), workers=2) as start:
        first = compare(config("ray"), console=console, seconds=0.0, start=start)
        assert not first  # nothing was begun; the same call goes on
        there = compare(config("ray"), console=console, start=start)
    timed = {"seconds", "train_seconds", "peak_memory"}
    plain = [
        {k: {n: v for n, v in r.to_dict().items() if n not in timed} for k, r in rs.items()} for rs in (here, there)
    ]
    assert plain[0] == plain[1]


def _command(options: dict[str, Any], *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "theodora",
        "train",
        *arguments(options),
        "--launcher",
        "ray",
        "--num-workers",
        "2",
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *more], start_new_session=True, **pipes)


def _wait_for_step(output: Path, step: int) -> None:
    for _ in range(3000):
        metrics = output / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {output}")


def test_ctrl_c_ends_it_with_a_checkpoint(options, tmp_path):
    long = options | {"output": str(tmp_path / "run"), "max_steps": 2000, "save_steps": 1000, "eval_steps": 1000}
    process = _command(long)
    _wait_for_step(tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "Interrupted." in text
    assert "is whole. Go on with" in text
    assert "--resume --launcher ray --num-workers 2" in text
    assert "Traceback" not in text


def test_a_killed_process_ends_the_run_and_is_named(options, tmp_path):
    import psutil

    long = options | {"output": str(tmp_path / "run"), "max_steps": 2000, "save_steps": 2, "eval_steps": 1000}
    process = _command(long)
    _wait_for_step(tmp_path / "run", 5)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert re.search("[Pp]rocess 1 ", text), text
    assert "checkpoint" in text
    assert "raylet" not in text
    assert "Traceback" not in text
