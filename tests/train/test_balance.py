"""The loss that keeps the experts of a mixture balanced is in the fused loss, in graphs and in pieces, as in TRL's."""

import json

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tiny
import tiny_families
from formula import DEVICE
from theodora import accelerate
from theodora.data.packing import packed_batch
from theodora.errors import ConfigError
from theodora.kernels.graph import GraphedStep
from theodora.train import prepare, trainer, trainer_loss, trainer_passes
from theodora.train.expert_loads import _Counts
from theodora.train.experts import balancing_of
from theodora.train.flattened import Flatten, Shape
from theodora.train.fused_loss import LEARNED, Head, SelectLearned, add_fused_loss, fused_head
from theodora.train.out_of_memory import few_of, split

COEFFICIENT = 0.7
SETTINGS = {"max_steps": 7, "held_out": 6, "eval_steps": 4, "experts": True, "router_aux_loss_coef": COEFFICIENT}


def moe(family):
    model = tiny_families.tiny_family(family, tiny_families.families()[family])
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = COEFFICIENT
    for name, parameter in model.named_parameters():
        if "router" in name or name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter)  # so that experts are not balanced by themselves
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, str] = {}

    def of(family="qwen3_moe"):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            moe(family).save_pretrained(path)
            tiny.tiny_tokenizer().save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return of


def padded(left=False):
    ids, mask = torch.randint(3, 200, (3, 12)), torch.ones(3, 12).long()
    mask[1, 7:], mask[2, 4:] = 0, 0
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed():
    batch = packed_batch([torch.randint(3, 200, (n,)) for n in (11, 6, 9)])
    labels = batch["input_ids"].clone()
    labels[batch["position_ids"] == 0] = -100
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}


BATCHES = {"right": padded, "left": lambda: padded(left=True), "packed": packed}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("kind", BATCHES)
def test_it_is_the_models_own_loss_with_the_same_gradient(family, kind):
    model, batch = moe(family).eval(), BATCHES[kind]()
    model.get_output_embeddings().requires_grad_(False)
    model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = model(**batch, output_router_logits=True, use_cache=False)
    expected = torch.autograd.grad(own.loss, trained, allow_unused=True)
    head = fused_head(model)
    assert isinstance(head, Head), head
    balancing = balancing_of(model)
    assert not isinstance(balancing, str), balancing
    add_fused_loss(model, Head(head.scale, head.softcap, head.maskless, balancing))
    inputs = SelectLearned(lambda _: dict(batch), full=27 if kind == "packed" else None, with_real=True)([])
    assert inputs["input_ids"].shape[1] == (27 if kind == "packed" else 12)  # filled up with what does not count
    assert inputs.pop("labels") is not None
    sums = model(**inputs)
    torch.testing.assert_close(sums.balance, own.aux_loss)
    loss = sums.nats / sums.count + COEFFICIENT * sums.balance
    torch.testing.assert_close(loss, own.loss)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_with_another_balancing_loss_is_told_apart(monkeypatch):
    model = moe("qwen3_moe")
    forward = type(model).forward

    def other(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.aux_loss = None if found.aux_loss is None else 1.001 * found.aux_loss
        return found

    monkeypatch.setattr(type(model), "forward", other)
    assert "in a way of its own" in balancing_of(model)
    assert "in a way of its own" in balancing_of(tiny.tiny_model())


@pytest.fixture
def counts(made, monkeypatch):
    """Those of the experts' rows in the runs to come. Nothing runs while a graph is captured, so nothing is counted."""
    found, init, capture = [], _Counts.__init__, GraphedStep._capture

    def remember(self, *args):
        init(self, *args)
        found.append(self)

    def captured(*args):
        before = [each.counts_E1.clone() for each in found]
        capture(*args)
        for each, value in zip(found, before, strict=True):
            each.counts_E1.copy_(value)

    monkeypatch.setattr(_Counts, "__init__", remember)
    monkeypatch.setattr(GraphedStep, "_capture", captured)
    return found


def without_bounds(patch):
    patch.setattr(trainer_passes, "takes_bounds", lambda *_: False)


@pytest.mark.parametrize(
    ("others", "pads"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 2, "logging_steps": 2, "gradient_checkpointing": True}, False),
        ({"packing": True, "max_length": 96, "train_on": "all", "per_device_train_batch_size": 1}, False),
    ],
    ids=["padded", "flattened, accumulated and recomputed", "packed"],
)
def test_a_graphed_run_has_the_record_of_trls_loss(
    others, pads, run, made, counts, folder, tmp_path, losses, monkeypatch
):
    settings = SETTINGS | {"model": folder(), "bf16": DEVICE == "cuda"} | others
    if pads:
        without_bounds(monkeypatch)
    ours = run(output=str(tmp_path / "ours"), **settings)
    assert isinstance(made[0].head, Head), made[0].head
    assert bool(made[0].shapes) == (not pads and "packing" not in others)
    assert made[0].steps.replays >= 2, made[0].why_no_graph
    monkeypatch.setattr(trainer_loss, "fused_loss_pays", lambda device: False)
    trls = run(output=str(tmp_path / "trl"), **settings)
    assert made[1].steps is None
    for name in ("loss", "eval_loss", "aux_loss", "eval_aux_loss", "entropy", "num_tokens", "grad_norm"):
        found, expected = losses(tmp_path / "ours", name), losses(tmp_path / "trl", name)
        assert found, name
        rounding = 5e-2 if settings["bf16"] else 1e-4
        torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-5, msg=lambda told, name=name: name + told)
    for mine, theirs in zip(ours.experts, trls.experts, strict=True):  # neither counts padding
        assert mine.effective == pytest.approx(theirs.effective, rel=1e-2)
        assert mine.busiest == pytest.approx(theirs.busiest, rel=1e-2)


def test_rows_are_counted_in_graphs_without_what_fills_them_up(run, made, counts, folder):
    """Whether there is a balancing loss or not."""
    run(model=folder(), **SETTINGS | {"router_aux_loss_coef": 0.0, "bf16": DEVICE == "cuda"})
    assert made[0].shapes
    assert made[0].steps.replays >= 3, made[0].why_no_graph
    assert [int(each.counts_E1[:-1].sum()) for each in counts] == [2 * made[0].tokens_seen] * 2


def room_for_half(monkeypatch):
    """Memory ends with more learned tokens than half of the first pass'; how many each pass had."""
    one_pass, rows = trainer.AdapterTrainer.one_pass, []

    def short_of_memory(self, inputs, *args):
        rows.append(int((inputs["labels"] != -100).sum()))
        if rows[-1] > rows[0] // 2:
            raise torch.OutOfMemoryError("out of memory")
        return one_pass(self, inputs, *args)

    monkeypatch.setattr(trainer.AdapterTrainer, "one_pass", short_of_memory)
    return rows


@pytest.mark.parametrize("fused", [False, True])
def test_of_a_batch_in_pieces_it_is_the_mean(fused, run, folder, alike, tmp_path, losses, monkeypatch, request):
    if fused:
        request.getfixturevalue("made")
    settings = SETTINGS | {"model": folder(), "data": alike, "max_steps": 3, "held_out": 0, "bf16": False}
    del settings["eval_steps"]
    run(output=str(tmp_path / "whole"), **settings)
    rows = room_for_half(monkeypatch)
    run(output=str(tmp_path / "pieces"), **settings)
    assert rows[1] == rows[0] // 2
    for name in ("loss", "grad_norm", "aux_loss"):
        found, expected = losses(tmp_path / "pieces", name), losses(tmp_path / "whole", name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_real_tokens_of_a_batch_and_of_its_parts():
    batch = padded()
    mask = batch["attention_mask"].bool()
    told = SelectLearned(lambda _: dict(batch), with_real=True)([])
    assert torch.equal(told[LEARNED]["real"], mask)
    assert SelectLearned(lambda _: dict(batch))([])[LEARNED]["real"] is None
    assert torch.equal(torch.cat([part[LEARNED]["real"] for part in split(told, 2)]), mask)
    assert "real" not in split(told, 2)[0]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [{"input_ids": [*range(3, 3 + n)], "labels": [-100, *range(4, 3 + n)]} for n in (5, 9, 3)]
    flat = Flatten(collate, [Shape(32, 32)], 3, with_real=True)(rows)
    assert flat[LEARNED]["real"].tolist() == [[True] * 17 + [False] * 15]
    parts = split(flat, 2)
    assert torch.equal(torch.cat([part[LEARNED]["real"] for part in parts], dim=1), flat[LEARNED]["real"])
    assert len(split(flat, 1)) == 1
    assert "real" not in split(flat, 1)[0]
    few = few_of(SelectLearned(lambda _: padded(left=True), with_real=True)([]))
    assert few[LEARNED]["real"].all()


def test_a_pass_for_other_processes_alone_adds_nothing(run, made, folder):
    run(model=folder(), **SETTINGS | {"max_steps": 1, "bf16": DEVICE == "cuda"})
    assert made[0].balance_weight(None) == COEFFICIENT
    with made[0].untraced():
        assert made[0].balance_weight(None) == made[0].balance_weight(torch.tensor(3)) == 0
    assert made[0].balance_weight(None) == COEFFICIENT


@pytest.fixture
def as_on_gpu(made, monkeypatch):
    """Runs to come pack rows in models with sinks, and are on the fast path."""
    choose_graphs = trainer_passes.PassOverrides.choose_graphs
    monkeypatch.setattr(prepare, "fused_loss_pays", lambda device: True)
    monkeypatch.setattr(
        trainer_passes.PassOverrides, "choose_graphs", lambda self: [accelerate(self.model), choose_graphs(self)][1]
    )
    return made


PACKED = {"packing": True, "max_length": 96, "train_on": "all", "targets": ["q_proj", "v_proj"], "max_steps": 6}
PACKED |= {"experts": None, "bf16": DEVICE == "cuda"}


@pytest.mark.filterwarnings("ignore:.*stay frozen:UserWarning")
def test_rows_packed_for_a_model_with_sinks_are_kept_apart(as_on_gpu, run, folder, tmp_path, losses):
    packs = run(model=folder("gpt_oss"), output=str(tmp_path / "packed"), **SETTINGS | PACKED)
    assert as_on_gpu[0].sends_bounds
    assert as_on_gpu[0].steps.replays, as_on_gpu[0].why_no_graph
    rows = run(model=folder("gpt_oss"), output=str(tmp_path / "rows"), **SETTINGS | PACKED | {"packing": False})
    assert not as_on_gpu[1].args.packing
    # The held-out rows before training: their cross-entropy is the same, and the balancing loss one of other batches.
    balance = [losses(tmp_path / name, "eval_aux_loss")[0] for name in ("packed", "rows")]
    plain = [found.eval_loss_before - COEFFICIENT * aux for found, aux in zip((packs, rows), balance, strict=True)]
    assert plain[0] == pytest.approx(plain[1], rel=5e-2 if DEVICE == "cuda" else 1e-4)


@pytest.mark.filterwarnings("ignore:.*stay frozen:UserWarning")
def test_where_nothing_keeps_them_apart_packing_is_refused(run, folder, request, monkeypatch):
    if DEVICE == "cpu":
        with pytest.raises(ConfigError, match=r"on a GPU with kernels: auto .* \(cpu, auto here\).*--no-packing"):
            run(model=folder("gpt_oss"), **SETTINGS | PACKED)
    with pytest.raises(ConfigError, match=r"reference here\).*--no-packing"):
        run(model=folder("gpt_oss"), **SETTINGS | PACKED | {"kernels": "reference"})
    request.getfixturevalue("as_on_gpu")
    without_bounds(monkeypatch)
    with pytest.raises(ConfigError, match=r"only by their bounds.*--no-packing"):
        run(model=folder("gpt_oss"), **SETTINGS | PACKED)


@pytest.fixture
def prefer(run, folder, tmp_path):
    """Learn from preferences with these options; the rows are alike where any of them are to balance alike."""

    def start(objective, alike=False, **others):
        prompts = [f"{1 if alike else n // 2} + 2 =" for n in range(48)]
        good, bad = " 3, or so", " 12!"
        rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in prompts[::2]]
        if objective == "kto":
            answers = zip(prompts, 24 * (good, bad), strict=True)
            rows = [{"prompt": prompt, "completion": answer, "label": answer == good} for prompt, answer in answers]
        path = tmp_path / f"{objective}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(**SETTINGS | {"model": folder(), "data": str(path), "objective": objective, "beta": 0.5} | others)

    return start


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
@pytest.mark.parametrize("flattened", [False, True])
def test_preferences_are_learned_with_it(objective, flattened, prefer, made, counts, tmp_path, losses, monkeypatch):
    if not flattened:
        without_bounds(monkeypatch)
    fused = prefer(objective, output=str(tmp_path / "fused"))
    assert bool(made[0].shapes) == flattened
    assert made[0].graph_replays >= (3 if flattened else 0), made[0].why_no_graph
    plain = prefer(objective, output=str(tmp_path / "plain"), kernels="reference")
    prefer(objective, output=str(tmp_path / "off"), router_aux_loss_coef=0.0, max_steps=1, eval_steps=1)
    for name in ("loss", "eval_loss", "aux_loss", "eval_aux_loss", "grad_norm", "rewards/chosen"):
        found, expected = losses(tmp_path / "fused", name), losses(tmp_path / "plain", name)
        assert found, name
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5, msg=lambda told, name=name: name + told)
    assert losses(tmp_path / "off", "aux_loss") == []
    (loss, *_), (without, *_), (balance, *_) = (
        losses(tmp_path / where, name) for where, name in (("fused", "loss"), ("off", "loss"), ("fused", "aux_loss"))
    )
    assert balance > 1
    assert loss == pytest.approx(without + COEFFICIENT * balance, rel=1e-4)
    for mine, theirs in zip(fused.experts, plain.experts, strict=True):
        assert mine.effective == pytest.approx(theirs.effective, rel=1e-2)


def test_a_preference_is_balanced_as_by_the_model_itself(prefer, made, folder, losses, tmp_path):
    prefer("dpo", max_steps=1, held_out=0, eval_steps=1, kernels="reference", per_device_train_batch_size=2)
    batch = next(iter(made[0].get_train_dataloader()))
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = type(made[0].model).from_pretrained(folder())
    expected = plain(**given, output_router_logits=True).aux_loss.detach()
    assert losses(tmp_path / "run", "aux_loss") == [pytest.approx(float(expected), rel=1e-4)]


def test_the_reference_of_preferences_is_not_counted(prefer, made, counts):
    prefer("dpo", gradient_checkpointing=False)
    assert made[0].shapes
    assert [int(each.counts_E1[:-1].sum()) for each in counts] == [2 * made[0].tokens_seen] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_of_preferences_in_pieces_it_is_the_mean(fused, prefer, tmp_path, losses, monkeypatch, request):
    if fused:
        request.getfixturevalue("made")
    settings = {"max_steps": 3, "held_out": 0, "eval_steps": 1, "per_device_train_batch_size": 4}
    prefer("dpo", alike=True, output=str(tmp_path / "whole"), **settings)
    rows = room_for_half(monkeypatch)
    prefer("dpo", alike=True, output=str(tmp_path / "pieces"), **settings)
    assert rows[1] == rows[0] // 2
    for name in ("loss", "grad_norm", "aux_loss"):
        found, expected = losses(tmp_path / "pieces", name), losses(tmp_path / "whole", name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
