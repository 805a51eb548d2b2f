"""Measuring: what is counted, how variants share a machine, and `theodora bench` itself."""

import dataclasses
import json
import sys
from typing import ClassVar

import pytest
import torch

from scripts import measure_here
from theodora.bench import VARIANTS, Job, Runner, Variant, Workload, make_rows, step_table
from theodora.bench import runner as runner_module
from theodora.bench.build import build, matmul_flops, shifted_labels
from theodora.bench.machine import bf16_peak
from theodora.bench.models import decoder_blocks, load_base
from theodora.bench.runner import Measured
from theodora.bench.table import differing_losses
from theodora.bench.worker import Failure, Loaded, Memory, Turn
from theodora.cli import bench as command
from theodora.cli.main import main
from theodora.errors import ConfigError
from tiny import FAMILIES, VOCAB_SIZE

GIB = 2**30


def workload(family="llama", **changes):
    config = {"model_type": family, "vocab_size": VOCAB_SIZE, "pad_token_id": 0, **FAMILIES[family]}
    return Workload(**{"model": config, "dtype": "float32", "batch": 2, "length": 8, "rank": 4} | changes)


# What is counted ------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_products():
    # Per block: q and o 32·32, k and v 32·16, three of 32·48; two blocks, and a head of 32·272.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 272
    attention = 2 * 2 * 6 * 8**2 * 32  # blocks, sequences, two products forward and four back on half of T × T
    assert matmul_flops(load_base(workload()), workload()) == 4 * weights * 16 + attention


def test_gpu_names():
    assert bf16_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert bf16_peak("NVIDIA H100 PCIe") == 756e12
    assert bf16_peak("an unknown one") is None


def test_labels_are_the_next_tokens():
    assert shifted_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_found_in_every_family(family):
    assert len(decoder_blocks(load_base(workload(family)))) == 2


EXACT = [name for name in VARIANTS if name != "dora-fp8"]


@pytest.mark.filterwarnings("ignore:Products with float8 weights:UserWarning")
@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_to_the_embeddings_output(name, checkpointing):
    model, prepare = build(workload(gradient_checkpointing=checkpointing), VARIANTS[name])
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    step = prepare()
    step.loss().backward()
    assert seen[0].grad.abs().sum() > 0
    assert bool(step.trained) == (name != "floor")


def test_random_weights_and_losses_are_the_same_in_every_variant():
    losses = []
    for variant in (*(VARIANTS[name] for name in EXACT), dataclasses.replace(VARIANTS["dora"], accelerate=True)):
        _, prepare = build(workload(), variant)
        losses.append(prepare().loss().item())
    assert max(losses) - min(losses) < 1e-5


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="rank is 0"):
        workload(rank=0)
    with pytest.raises(ConfigError, match="length is 1; expected at least 2"):
        workload(length=1)
    with pytest.raises(ConfigError, match="layers is 3; the model has 2"):
        load_base(workload(layers=3))


# How variants share a machine -----------------------------------------------------------------------------------------


class FakeWorker:
    """Answers as a worker on a GPU of 80 GiB would, whose variants hold 6 GiB and need what their label says."""

    alive: ClassVar[set[str]] = set()
    together: ClassVar[list[set[str]]] = []

    def __init__(self, job, log):
        self.job = job
        self.peak = float(job.variant.label)

    def answer(self):
        return "imported"

    def ask(self, command, *arguments):
        others = 7 * len(self.alive - {self.job.name})
        if others + self.peak > 80:
            return Failure("out of memory", out_of_memory=True)
        self.alive.add(self.job.name)
        self.together.append(set(self.alive))
        memory = Memory(idle=6 * GIB, peak=int(self.peak * GIB), reserved=int(self.peak * GIB), capacity=80 * GIB)
        if command == "turn":
            return Turn([self.peak], memory)
        return Loaded(
            first_step_seconds=1.0,
            first_loss=1.0,
            trained_parameters=1,
            model_bytes=1,
            flops=1.0,
            device="NVIDIA H100 80GB HBM3",
            memory=memory,
        )

    def stop(self):
        self.alive.discard(self.job.name)


def test_variants_that_do_not_fit_together_alternate_with_the_floor_in_groups(monkeypatch):
    monkeypatch.setattr(runner_module, "_Worker", FakeWorker)
    peaks = {"floor": 12, "a": 20, "b": 38, "c": 25, "d": 14, "e": 24, "f": 16, "large": 75, "never": 90}
    jobs = [Job(name=n, variant=Variant(label=str(peak)), workload=workload()) for n, peak in peaks.items()]
    measured = Runner(jobs, floor="floor", rounds=3).run()
    assert FakeWorker.alive == set()
    assert {name for name, m in measured.items() if m.failure} == {"never"}
    assert all(len(measured[name].rounds) == 3 for name in "abcdef")
    assert all(set(measured[name].rounds) <= set(measured["floor"].rounds) for name in "abcdef")
    assert not set(measured["large"].rounds) & set(measured["floor"].rounds)  # it had the GPU to itself
    assert max(len(names) for names in FakeWorker.together) < len(peaks) - 2
    rows = {row.name: row for row in make_rows(measured, against=["floor"])}
    assert rows["b"].ratios["floor"].median == pytest.approx(38 / 12)
    assert rows["large"].ratios["floor"].median == pytest.approx(75 / 12)
    assert rows["never"].failure == "out of memory"
    assert step_table(list(rows.values()), title="").row_count == len(peaks)


def test_a_floor_that_runs_out_of_memory_beside_another_is_measured_alone(monkeypatch):
    monkeypatch.setattr(runner_module, "_Worker", FakeWorker)
    peaks = {"floor": 75, "a": 72, "b": 20}
    jobs = [Job(name=n, variant=Variant(label=str(peak)), workload=workload()) for n, peak in peaks.items()]
    measured = Runner(jobs, floor="floor", rounds=2).run()
    assert FakeWorker.alive == set()
    assert all(m.failure is None and len(m.rounds) == 2 for m in measured.values())
    rows = {row.name: row for row in make_rows(measured, against=["floor"])}
    assert rows["a"].ratios["floor"].median == pytest.approx(72 / 75)


def test_without_a_floor_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(runner_module, "_Worker", FakeWorker)
    said = []
    peaks = {"floor": 90, "a": 20, "b": 30}
    jobs = [Job(name=n, variant=Variant(label=str(peak)), workload=workload()) for n, peak in peaks.items()]
    measured = Runner(jobs, floor="floor", rounds=2, progress=said.append).run()
    assert FakeWorker.alive == set()
    assert "floor: out of memory" in said
    assert "round 2/2: a 20.000 s  b 30.000 s" in said
    assert all(len(measured[name].rounds) == 2 for name in "ab")
    rows = {row.name: row for row in make_rows(measured, against=["floor"])}
    assert rows["a"].ratios == {}
    assert rows["floor"].failure == "out of memory"


def test_a_floor_that_needs_more_from_turn_to_turn_is_given_up(monkeypatch):
    class Leaks(FakeWorker):
        def ask(self, command, *arguments):
            if self.peak == 75 and command == "turn":
                type(self).full = True  # the memory stays away, in its next process, too
            if self.peak == 75 and getattr(self, "full", False):
                return Failure("out of memory", out_of_memory=True)
            return super().ask(command, *arguments)

    monkeypatch.setattr(runner_module, "_Worker", Leaks)
    jobs = [Job(name=n, variant=Variant(label=p), workload=workload()) for n, p in {"floor": "75", "a": "20"}.items()]
    said = []
    measured = Runner(jobs, floor="floor", rounds=2, progress=said.append).run()
    FakeWorker.alive.clear()
    assert measured["floor"].failure.out_of_memory
    assert len(measured["a"].rounds) == 2
    assert any("floor -" in text for text in said)


def test_different_losses_are_told():
    memory = Memory(idle=1, peak=2, reserved=2, capacity=10)

    def rows(*losses):
        measured = {
            f"v{n}": Measured(
                Job(name=f"v{n}", variant=Variant(label=f"v{n}"), workload=workload()),
                loaded=Loaded(1.0, loss, 1, 1, 1.0, "cpu", memory),
                memory=memory,
                rounds={0: [1.0]},
            )
            for n, loss in enumerate(losses)
        }
        return make_rows(measured, against=[])

    assert differing_losses(rows(5.0, 5.01)) is None
    assert (
        differing_losses(rows(5.0, 5.5)) == "First losses differ, so this compares different work: v0 5.0000, v1 5.5000"
    )
    assert differing_losses([]) is None


def test_a_variant_that_fails_stops_no_other(tmp_path):
    jobs = [
        Job(name="floor", variant=VARIANTS["floor"], workload=workload()),
        Job(name="absent", variant=Variant(label="absent", imports=("no_such_module",)), workload=workload()),
        Job(
            name="dies",
            variant=Variant(label="dies", imports=("dies",), python_path=(str(tmp_path),)),
            workload=workload(),
        ),
    ]
    (tmp_path / "dies.py").write_text("import os; print('last words', flush=True); os._exit(3)")
    measured = Runner(jobs, floor="floor", rounds=2).run()
    assert len(measured["floor"].rounds) == 2
    assert "no_such_module" in measured["absent"].failure.reason
    assert measured["dies"].failure.reason == "its process ended with exit code 3: last words"
    assert str(tmp_path) not in sys.path


def test_no_variant_is_begun_when_the_time_is_up():
    jobs = [Job(name="dora", variant=VARIANTS["dora"], workload=workload())]
    assert "time was up" in Runner(jobs, seconds=0).run()["dora"].failure.reason


def test_ratios_are_taken_within_a_round():
    job = Job(name="x", variant=VARIANTS["dora"], workload=workload())
    memory = Memory(idle=1, peak=2, reserved=2, capacity=10)
    loaded = Loaded(1.0, 1.0, 1, 1, 1.0, "cpu", memory)
    floor = Measured(job, loaded=loaded, memory=memory, rounds={0: [1.0], 1: [10.0], 2: [1.0]})
    ours = Measured(job, loaded=loaded, memory=memory, rounds={1: [11.0], 2: [1.2]})
    ratio = make_rows({"floor": floor, "ours": ours}, against=["floor"])[1].ratios["floor"]
    assert (ratio.min, ratio.max) == (pytest.approx(1.1), pytest.approx(1.2))


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_measures_a_bare_configuration(tmp_path, monkeypatch, capsys):
    measure_here(monkeypatch)
    load_base(workload()).config.save_pretrained(tmp_path)
    output = tmp_path / "results" / "bench.json"
    options = ["--batch", "2", "--length", "8", "--rank", "4", "--rounds", "2", "--layers", "1", "--dtype", "fp32"]
    methods = ["--methods", "floor", "peft-dora", "dora", "--device", "cpu"]
    assert main(["bench", str(tmp_path), *options, *methods, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "Theodora DoRA" in shown
    assert "PEFT LoRA" not in shown
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == ["floor", "peft-dora", "dora"]
    assert len(report["seconds"]["dora"]) == 2
    assert {"cpu", "versions", "commit", "command"} <= report["machine"].keys()


@pytest.mark.filterwarnings("ignore:Products with float8 weights:UserWarning")
def test_the_command_measures_a_quantised_base(tmp_path, monkeypatch, capsys):
    measure_here(monkeypatch)
    load_base(workload()).config.save_pretrained(tmp_path)
    options = ["--batch", "2", "--length", "8", "--rank", "4", "--rounds", "1", "--dtype", "fp32", "--device", "cpu"]
    assert main(["bench", str(tmp_path), *options, "--quantize", "fp8", "--methods", "floor", "dora"]) == 0
    assert "fp32 on a base in fp8, cpu" in " ".join(capsys.readouterr().out.split())


def test_the_command_says_what_cannot_be_measured(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "absent")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("liger", [True, False])
def test_on_a_gpu_everybody_gets_the_fast_kernels(liger, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: liger if name == "liger_kernel" else True)
    found = command._variants(["floor", "peft-dora", "dora"], workload(device="cuda"))
    assert found["dora"].accelerate
    assert found["dora"].graph
    assert {found[name].liger for name in ("floor", "peft-dora")} == {"all" if liger else "none"}
    assert command._caption(found, list(found)) == ("Frozen model and PEFT run with Liger-Kernel." if liger else "")


def test_without_peft_its_variants_are_left_out(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    methods = ["floor", "peft-lora", "dora"]
    found = command._variants(methods, workload())
    assert list(found) == ["floor", "dora"]
    assert command._caption(found, methods) == "Left out, because peft is not installed: peft-lora."


def test_the_command_fails_where_nothing_could_be_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner_module, "_Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "ask", lambda *_: Failure("out of memory", out_of_memory=True))
    load_base(workload()).config.save_pretrained(tmp_path)
    variants = {name: Variant(label="0") for name in ("floor", "dora")}
    monkeypatch.setattr(command, "_variants", lambda *_: variants)
    assert main(["bench", str(tmp_path), "--device", "cpu"]) == 1
    assert "Nothing could be measured. 0: out of memory" in capsys.readouterr().err


def test_different_first_losses_are_a_warning_of_the_command(tmp_path, monkeypatch, capsys):
    class Different(FakeWorker):
        def ask(self, command, *arguments):
            answer = super().ask(command, *arguments)
            return dataclasses.replace(answer, first_loss=self.peak) if isinstance(answer, Loaded) else answer

    monkeypatch.setattr(runner_module, "_Worker", Different)
    load_base(workload()).config.save_pretrained(tmp_path)
    monkeypatch.setattr(command, "_variants", lambda *_: {n: Variant(label=n) for n in ("1", "2")})
    assert main(["bench", str(tmp_path), "--device", "cpu", "--rounds", "1"]) == 0
    assert "Warning: First losses differ" in capsys.readouterr().err
