"""The public names, and how fast they and the command line appear."""

import importlib
import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

import theodora

PUBLIC = {
    "__version__",
    "AdapterConfig",
    "TrainConfig",
    "TheodoraError",
    "ConfigError",
    "DataError",
    "CheckpointError",
    "inject_adapter",
    "remove_adapter",
    "save_adapter",
    "load_adapter",
    "set_adapter",
    "adapter_disabled",
    "merge_adapter",
    "unmerge_adapter",
    "merge_checkpoint",
    "quantize_base",
    "combine_adapters",
    "to_lora",
    "reference_model",
    "swap_adapter_weights",
    "save_mlx",
    "accelerate",
    "accelerate_peft",
    "checkpoint_contexts",
    "restore_peft",
    "train",
    "evaluate",
    "inspect_adapter",
}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=60)


def test_the_public_names_are_pinned():
    # Adding a name is a promise to keep it; removing one breaks somebody. Either way: change CHANGELOG.md too.
    assert set(theodora.__all__) == PUBLIC
    assert len(theodora.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(theodora, name)
    assert name in dir(theodora)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="inject_adaptor"):
        _ = theodora.inject_adaptor


def test_submodules_that_share_a_verb_with_a_function_do_not_hide_it():
    # `theodora.train` is a function and a package: whichever is imported first, the name must stay the function.
    for module in ("theodora.train", "theodora.evaluate"):
        importlib.import_module(module)
    assert inspect.isfunction(theodora.train)
    assert inspect.isfunction(theodora.evaluate)


def test_importing_the_package_imports_no_torch():
    run_python("-c", "import sys, theodora; sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))")


def test_help_is_instant():
    command = Path(sys.executable).with_name("theodora")

    def seconds() -> float:
        start = time.perf_counter()
        output = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
        assert "train" in output
        return time.perf_counter() - start

    # The target is 0.5 s; a busy machine gets some slack. Importing torch alone takes more than twice as long.
    assert min(seconds() for _ in range(3)) < 0.8
