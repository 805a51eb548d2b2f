"""What every test shares: no network, one seed, tiny models, a tiny tokenizer, and folders that hold both.

- `tiny_model("gpt2", tied=True, dtype=torch.bfloat16)`: a fresh random model, see `tiny.py`.
- `tiny_tokenizer`: one token per byte, ChatML template, pad, bos and eos.
- `tiny_model_dir("llama", tied=True)`: a folder that holds a saved model and its tokenizer, made once per session.
  Treat it as read-only.
- `adapter`: a folder, likewise, with an adapter of `tiny_model_dir()` that changes much.
"""

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Before anything of Hugging Face is imported, because the libraries read these at import. Caches go to a folder of
# their own, so that the tests neither see nor change the user's. Commands that tests start inherit all of it.
_HF_HOME = tempfile.mkdtemp(prefix="theodora-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": _HF_HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "THEODORA_CACHE": os.devnull,  # nothing is kept from one test for the next
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # tiny products are slower on two threads than on one
}

# Collections of garbage go through every object that there is, and each training run asks for one. Imports and the list
# of tests make some 700,000 objects, all of which stay: `set_aside` takes them out, and none is looked through before.
gc.disable()

import hypothesis
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

import tiny

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

torch.set_num_threads(1)
if INTERPRETED:
    import interpreting

    interpreting.prepare()

# A seed is kept for devices that may come, each time with the whole stack that asks for it: half a millisecond.
if not torch.accelerator.is_available():
    for _devices in (torch.cuda, torch.xpu, torch.mtia):
        _devices.manual_seed_all = lambda _seed: None

# What has reached the disk shows only after a loss of power, which no test plays, and a run of four steps asks for it
# a hundred times. Commands that tests start do ask.
os.fsync = lambda _descriptor: None


# Where parameters multiply, each value is shown at least once, and all combinations with --all. Elsewhere variants are
# whole cases, or quick.
THINNED = {
    "adapters", "bench", "compat", "conformance", "demo", "evaluate", "export", "kernels", "layers", "merging", "train",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run all variants, not only as many as show every value")
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED and not config.getoption("all"):
        hypothesis.settings.register_profile("few", max_examples=10)
        hypothesis.settings.load_profile("few")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out long tests and, of what -k and -m leave, variants that show no new value, unless they are asked for."""
    if not config.getoption("long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; make test-long runs it"))
    if not config.getoption("all"):
        variants: dict[str, list[pytest.Item]] = {}
        for item in items:  # what is skipped shows nothing
            long = item.get_closest_marker("long") and not config.getoption("long")
            variants.setdefault(f"{item.nodeid.partition('[')[0]} {bool(long)}", []).append(item)
        items[:] = [item for those in variants.values() for item in _few(those)]


def _few(variants: list[pytest.Item]) -> list[pytest.Item]:
    folder = variants[0].path.parent.name
    if INTERPRETED and folder == "fastpath":  # whole models take seconds there: a quarter of their variants has to do
        return variants[::4]
    return _with_each_value(variants) if INTERPRETED or folder in THINNED else variants


def _with_each_value(variants: list[pytest.Item]) -> list[pytest.Item]:
    """Few variants of a test, in their order, that together show every value of each `parametrize`; one at least.

    Values change together from one to the next, so that 6 kinds, 4 shapes and 3 dtypes take 6 variants, not 72. Of
    variants that show as much, the one whose values were shown least is taken.
    """
    values, chosen, shown = [_values(item) for item in variants], set[int](), Counter[object]()
    while not chosen or shown.keys() < set[object]().union(*values):
        best = max(
            range(len(variants)),
            key=lambda index: (len(values[index] - shown.keys()), -sum(shown[value] for value in values[index])),
        )
        chosen.add(best)
        shown.update(values[best])
    return [variants[index] for index in sorted(chosen)]


def _values(item: pytest.Item) -> set[object]:
    """What each `parametrize` and each fixture that has variants gives to a variant of a test."""
    given: dict[str, object] = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    found = set[object]()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.add(tuple((name.strip(), id(given.pop(name.strip()))) for name in names))
    return found | {(name, id(value)) for name, value in given.items()}


def pytest_collection_finish() -> None:
    set_aside()
    gc.enable()


def pytest_runtest_setup() -> None:
    if len(sys.modules) > _modules_set_aside + 100:  # what tests import stays, too
        set_aside()


_modules_set_aside = 0


def set_aside() -> None:
    """Have collections of garbage look through nothing that is here now."""
    global _modules_set_aside
    gc.collect()
    gc.freeze()
    _modules_set_aside = len(sys.modules)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries would call what stays at Python's end a leak


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start each test from the same random state, whatever ran before it."""
    if torch.accelerator.is_available():
        set_seed(0)
        return
    # The same without asking for the devices that are not there, which takes longer than most tests.
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return tiny.tiny_model


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def save(family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(f"tiny-{family}")
        tiny.tiny_model(family, tied=tied, dtype=dtype, seed=seed).save_pretrained(folder)
        tiny.tiny_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    from theodora import AdapterConfig, inject_adapter, save_adapter
    from theodora.adapters.models import load_model

    torch.manual_seed(0)
    model = inject_adapter(load_model(tiny_model_dir()), AdapterConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    folder = tmp_path_factory.mktemp("adapters") / "loud"
    save_adapter(model, folder)
    return folder
