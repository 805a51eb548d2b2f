"""PEFT's files of convolutions both ways, held on outputs; where PEFT computes otherwise, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from theodora import AdapterConfig, inject_adapter, load_adapter, merge_adapter, save_adapter
from theodora.errors import CheckpointError
from theodora.files.adapter import read_adapter
from theodora.files.names import WEIGHTS_NAME

CLOSE = {"rtol": 0, "atol": 1e-5}
NAMES = ["one", "two", "three", "head"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Net(nn.Module):
    """Convolutions of one, two and three dimensions, and a linear layer; the options are those of the second."""

    def __init__(self, **options):
        super().__init__()
        self.one = nn.Conv1d(6, 12, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 8, (3, 1), **options)
        self.three = nn.Conv3d(2, 6, 2, bias=False)
        self.head = nn.Linear(5, 7)

    def forward(self, x):
        return self.one(x[0]), self.two(x[1]), self.three(x[2]), self.head(x[3])


def fresh(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def perturb(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, 6, 9), (2, 4, 7, 5), (2, 2, 4, 4, 4), (2, 5)]
    with torch.no_grad():
        return model.eval()([torch.randn(*size, generator=generator) for size in sizes])


def same(one, other):
    torch.testing.assert_close(outputs(one), outputs(other), **CLOSE)
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(outputs(one), outputs(fresh()), strict=True))


def theirs(folder, dora=False, targets=NAMES, options=None, **config):
    model = get_peft_model(fresh(**(options or {})), LoraConfig(target_modules=targets, use_dora=dora, r=4, **config))
    perturb(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ours_into_peft(method, init, tmp_path):
    config = AdapterConfig(method=method, rank=3, alpha=5, rslora=True, targets=tuple(NAMES), init=init)
    model = inject_adapter(fresh(), config)
    perturb(model)
    save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    rank = 3 if init == "default" else 6
    assert tensors["base_model.model.two.lora_A.weight"].shape == (rank, 4, 3, 1)
    assert tensors["base_model.model.two.lora_B.weight"].shape == (8, rank, 1, 1)
    peft = PeftModel.from_pretrained(fresh(), tmp_path / "a")
    same(model, peft)
    same(model, peft.merge_and_unload())
    same(model, load_adapter(fresh(), tmp_path / "a"))


@pytest.mark.parametrize("dora", [False, True])
def test_peft_into_ours(dora, tmp_path):
    peft = theirs(tmp_path / "p", dora, rank_pattern={"one": 2}, alpha_pattern={"two": 3})
    model = load_adapter(fresh(), tmp_path / "p", trainable=True)
    same(model, peft)
    if dora:
        assert model.two.adapters["default"].magnitude.shape == (8,)
    save_adapter(model, tmp_path / "again")
    before, after = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("p", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same(merge_adapter(model), peft.merge_and_unload())


@pytest.mark.parametrize(
    "options", [{"dilation": 2, "padding": "same"}, {"padding": (1, 0), "padding_mode": "reflect"}]
)
def test_where_peft_merges_another_function_than_it_trains(options, tmp_path):
    peft = theirs(tmp_path / "p", targets=["two"], options=options)
    with pytest.warns(UserWarning, match="without its dilation and its padding mode, which two have"):
        model = load_adapter(fresh(**options), tmp_path / "p")
    assert not torch.allclose(outputs(model)[1], outputs(peft)[1], atol=1e-2)
    torch.testing.assert_close(outputs(model)[1], outputs(peft.merge_and_unload())[1], **CLOSE)
    save_adapter(model, tmp_path / "ours")
    load_adapter(fresh(**options), tmp_path / "ours")  # says nothing


@pytest.mark.parametrize("dora", [False, True])
def test_groups_are_refused_on_both_sides(dora, tmp_path):
    theirs(tmp_path / "p", dora, targets=["two"], options={"groups": 2})
    with pytest.raises(CheckpointError, match="PEFT's of a convolution of 2 groups: its A reads the channels of all"):
        load_adapter(fresh(groups=2), tmp_path / "p")
    config = AdapterConfig(method="dora" if dora else "lora", rank=4, targets=("two",))
    save_adapter(inject_adapter(fresh(groups=2), config), tmp_path / "ours")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(fresh(groups=2), tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"two.lora_B.weight": (8, 4, 3, 1)}, "expected B of a convolution to read single places"),
        ({"two.lora_B.weight": (8, 5, 1, 1)}, r"expected \(rank, in\) and \(out, rank\)"),
        ({"two.lora_B.weight": (8, 0, 1, 1)}, "its tensors are empty"),
        ({"two.lora_B.weight": (8, 4)}, r"lora_A \(4, 4, 3, 1\) and lora_B \(8, 4\)"),
        ({"two.lora_magnitude_vector": (8,)}, r"magnitudes \(8,\); expected \(1, 8, 1, 1\)"),
        ({"two.lora_magnitude_vector": (8, 1, 1, 1)}, r"magnitudes \(8, 1, 1, 1\); expected"),
        ({"two.lora_A.weight": (4, 4, 1, 3)}, r"made for a weight of \(8, 4, 1, 3\).*here it is \(8, 4, 3, 1\)"),
        ({"two.lora_A.weight": (4, 12), "two.lora_B.weight": (8, 4), "two.lora_magnitude_vector": (8,)}, "made for"),
        ({"two.lora_A.weight": (3, 4, 3, 1), "two.lora_B.weight": (8, 3, 1, 1)}, "its tensors have rank 3"),
    ],
)
def test_files_that_do_not_fit_say_why(change, said, tmp_path):
    theirs(tmp_path / "p", dora=True)
    path = tmp_path / "p" / WEIGHTS_NAME
    tensors = load_file(path) | {f"base_model.model.{key}": torch.ones(shape) for key, shape in change.items()}
    save_file(tensors, path)
    model = fresh()
    with pytest.raises(CheckpointError, match=f"two: (.|\n)*{said}"):
        load_adapter(model, tmp_path / "p")
    assert type(model.two) is nn.Conv2d


def test_a_file_without_magnitudes_is_no_lora(tmp_path):
    theirs(tmp_path / "p", dora=True)
    fields = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(fields | {"use_dora": False}))
    with pytest.raises(CheckpointError, match="one: holds magnitudes"):
        read_adapter(tmp_path / "p")
