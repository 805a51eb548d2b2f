"""Options of TRL's that torch would refuse once everything is loaded are refused before."""

from dataclasses import replace
from types import SimpleNamespace

import accelerate.state
import pytest
import torch
from trl.trainer.sft_config import SFTConfig

import tiny
from theodora.autocast import computes_in_bf16
from theodora.config import TrainConfig
from theodora.errors import ConfigError
from theodora.train.arguments import choose_precision, finish_arguments, sft_arguments
from theodora.train.processes import links_unasked


def arguments(tmp_path, **options):
    given = {"model": "m", "data": "d", "output": str(tmp_path), "bf16": False, "use_cpu": True, **options}
    return sft_arguments(TrainConfig.from_options(given), tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"adam_beta2": 1.0}, "Invalid beta parameter"),
        ({"adam_epsilon": float("nan")}, "Invalid epsilon"),
        ({"optim": "sgd", "optim_args": "momentum=0.5=1"}, "expected name=value"),
        ({"optim_args": "garbage"}, "expected name=value"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr.* refuses: One of min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type is cosine.*foo"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, "lr_end"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha is -1.0; expected at least 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0"),
    ],
)
def test_what_torch_would_refuse_later(options, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "optim": "sgd"},
        {"lr_scheduler_type": "greedy"},
        {"optim": "adafactor", "lr_scheduler_type": "inverse_sqrt"},
        {"optim_args": "amsgrad=True, foreach=False", "neftune_noise_alpha": 5},
    ],
)
def test_what_it_takes(options, tmp_path):
    found = arguments(tmp_path, **options)
    assert found.lr_scheduler_kwargs == options.get("lr_scheduler_kwargs", found.lr_scheduler_kwargs)


def test_what_the_loaded_model_tells_goes_into_a_copy(tmp_path):
    options = {"model": "m", "data": "d", "output": "o", "held_out": 1, "modules_to_save": ["lm_head"], "bf16": True}
    options |= {"trainer": {"use_cpu": True, "model_init_kwargs": {"attn_implementation": "eager"}}}
    config = TrainConfig.from_options(options)
    given = sft_arguments(config, tmp_path)
    before = dict(vars(given))

    def finish(**known):
        return finish_arguments(
            given,
            config,
            model=tiny.tiny_model(),
            tokenizer=tiny.tiny_tokenizer(),
            precision=choose_precision(config, given),
            **({"balances_experts": True, "evaluates": True, "evaluates_first": True} | known),
        )

    finished = finish()
    assert (finished.bf16, finished.mixed_precision, finished.model_init_kwargs) == (True, "bf16", None)
    assert finished.eval_on_start
    assert finished.router_aux_loss_coef is None
    assert finish(balances_experts=False).router_aux_loss_coef == 0.0
    assert not finish(evaluates_first=False).eval_on_start
    without = finish(evaluates=False)
    assert (without.eval_on_start, without.eval_strategy) == (False, "no")
    assert vars(given) == before


@pytest.mark.parametrize(("environment", "asked"), [({}, False), ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, True)])
def test_a_process_alone_does_not_look_at_gpus_links(monkeypatch, environment, asked):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    look = accelerate.state.check_cuda_p2p_ib_support
    with links_unasked():
        assert (accelerate.state.check_cuda_p2p_ib_support is look) == asked
    assert accelerate.state.check_cuda_p2p_ib_support is look


@pytest.mark.parametrize(
    ("found", "onednn", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, True, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False, False),  # ONEDNN_MAX_CPU_ISA=AVX2, for one
        ({"architecture": "x86_64", "avx2": True}, True, False),
        ({"architecture": "aarch64", "bf16": True}, False, True),
        ({}, True, False),
    ],
)
def test_bf16_is_chosen_where_its_instructions_are_and_are_used(found, onednn, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert computes_in_bf16(torch.device("cpu")) is expected
    config = TrainConfig(model="m", data="d", output="o")
    arguments = SimpleNamespace(fp16=False, device=torch.device("cpu"))
    assert choose_precision(config, arguments).bf16 is expected
    for asked in (True, False):  # what the user says holds
        assert choose_precision(replace(config, bf16=asked), arguments).bf16 is asked


@pytest.mark.parametrize(("device", "rows", "expected"), [("cpu", 16, 8), ("cuda", 16, 32), ("cuda", 1, 8)])
def test_an_evaluation_takes_more_rows_on_a_gpu(tmp_path, monkeypatch, device, rows, expected):
    monkeypatch.setattr(SFTConfig, "device", property(lambda self: torch.device(device)))
    made = arguments(tmp_path, per_device_train_batch_size=rows)
    assert made.per_device_eval_batch_size == expected
    assert arguments(tmp_path, per_device_eval_batch_size=3).per_device_eval_batch_size == 3
