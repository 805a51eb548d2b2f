"""What launchers tell, what contradicts itself, and ways to spread a model that are not gone."""

import os

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.train.launched import Launched, check_devices, check_engine, launched, notes_of_one, unseen

TOLD = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def config(**options):
    return TrainConfig(model="m", data="d", output="o", trainer=options)


def test_a_process_knows_its_place():
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) is None
    found = launched({**TOLD, "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"})  # one torchrun on each machine
    assert found == Launched(count=4, index=3, on_machine=1, count_on_machine=2)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2.*RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*by itself"),
        ({**TOLD, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**TOLD, "RANK": "4"}, "RANK is 4, and WORLD_SIZE 4"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"mpirun \(Open MPI\) has started 2 processes.*torchrun"),
        ({"PMI_SIZE": "3"}, "mpiexec has started 3"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8.*unset SLURM_STEP_NUM_TASKS"),
    ],
)
def test_processes_that_could_not_meet_are_refused(environment, says):
    with pytest.raises(ConfigError, match=says):
        launched(environment)


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        ({"deepspeed": "zero.json"}, {}, "deepspeed: DeepSpeed"),
        ({"fsdp": "full_shard"}, {}, "fsdp: say --sharding fsdp2"),
        ({"model_init_kwargs": {"tp_plan": "auto"}}, {}, "tp_plan: tensor or pipeline"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: DeepSpeed"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "1"}, "tensor, context or sequence parallelism"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "yes"}, "Megatron-LM"),
    ],
)
def test_other_engines_are_refused_with_the_way(options, environment, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        check_engine(config(**options), environment)
    assert "torchrun --nproc-per-node N -m theodora train" in str(refusal.value)


def test_accelerate_may_say_that_it_does_not_use_deepspeed():
    check_engine(config(), {"ACCELERATE_USE_DEEPSPEED": "false"})


def test_a_process_of_accelerate_says_that_there_were_to_be_more():
    told = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}
    several = {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    (note,) = notes_of_one(config(), several)
    assert "has started one" in note
    assert "torchrun --nproc-per-node N -m theodora train" in note
    assert notes_of_one(config(), told) == []
    assert notes_of_one(config(), {**several, "WORLD_SIZE": "1"}) == []


def test_accelerate_sets_what_is_looked_for(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "theodora"]
    for count, notes in ((2, 1), (1, 0)):
        given = launch_command_parser().parse_args(["--num_processes", str(count), *words])
        _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(given)[0])
        assert len(notes_of_one(config(), environment)) == notes


@pytest.mark.parametrize(("count", "place", "gpus", "said"), [(4, 0, 2, "4 processes"), (None, 2, 2, "3 processes")])
def test_more_processes_than_gpus_are_refused_with_the_numbers(count, place, gpus, said):
    found = Launched(count=4, index=0, on_machine=place, count_on_machine=count)
    with pytest.raises(ConfigError, match=f"{said}.*has 2 GPUs.*--nproc-per-node 2"):
        check_devices(found, gpus)
    check_devices(found, 0)
    check_devices(found, 4)


def test_libraries_see_one_process_meanwhile(monkeypatch):
    for name, value in {**TOLD, "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    with unseen():
        assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"} & os.environ.keys()
    assert os.environ["WORLD_SIZE"] == "4"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
