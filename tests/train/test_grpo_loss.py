"""The loss of grpo is that of TRL's trainer, and so are the advantages, on the same completions and rewards.

Two definitions differ where TRL's depends on how a step is cut up: its grpo is a mean over the means of batches, where
ours is one over all completions of a step, and its masked mean of the entropy and the like is not looked at here.
"""

from itertools import product

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from steps import moved
from theodora import AdapterConfig, inject_adapter
from theodora.adapters.state import trained_tensors
from theodora.kernels.cross_entropy import TokenLosses
from theodora.train.grpo_loss import LOSSES, PolicySettings, advantages, loss_sum, spread, token_terms
from theodora.train.loss import can_choose_positions, row_losses
from theodora.train.rollouts import Drawing
from theodora.train.sequence_losses import summed
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PROMPTS = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [9], [9], [9]]
END = 2
COMPLETIONS = [[11, END], [30, 31, 32, 33, END], [12, 13, 14, 15, 16, 17], [40, END], [41, 42, 43, END], [50, 51, END]]
LENGTHS = [len(tokens) for tokens in COMPLETIONS]
MOST, WIDE = 6, max(LENGTHS)
ADVANTAGES = [1.2, -0.7, 0.3, -1.1, 0.0, 0.9]
MASK = torch.tensor([[1] * n + [0] * (WIDE - n) for n in LENGTHS])
CLIPS = [{}, {"epsilon": 0.1, "epsilon_high": 0.28}, {"epsilon_high": 3.0, "delta": 1.5}]
REWARDS = torch.tensor([[1.0, 0.2], [0.0, 0.9], [0.5, 0.9], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
GROUPS = [7, 7, 7, 3, 3, 3]


def weighted(*weights):
    return torch.tensor(weights, dtype=torch.float64)


def trainer_of(folder, temperature=1.0):
    """TRL's, of an adapted model away from its start."""
    model = inject_adapter(tiny_model(), AdapterConfig(rank=4))
    moved(model)
    args = GRPOConfig(
        str(folder),
        max_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=MOST,
        temperature=temperature,
        beta=0.0,
    )
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * 6, args=args, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    return trainer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("grpo"))


def told(trainer, settings):
    """The trainer with these settings."""
    trainer.loss_type, trainer.beta = settings.loss_type, settings.beta
    trainer.importance_sampling_level = settings.importance_sampling_level
    trainer.epsilon_low = settings.epsilon
    trainer.epsilon_high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    trainer.args.delta, trainer.args.use_bias_correction_kl = settings.delta, settings.use_bias_correction_kl
    trainer.max_completion_length = settings.max_completion_length
    return trainer


def batch_of(advantage, old=None, reference=None, mask=MASK):
    """The completions as TRL has them: prompts padded on the left, completions on the right."""
    longest = max(map(len, PROMPTS))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS]),
        "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]),
        "completion_ids": torch.tensor([c + [0] * (WIDE - len(c)) for c in COMPLETIONS]),
        "completion_mask": mask,
        "advantages": advantage,
        "num_items_in_batch": mask.sum(),
    }
    others = {"old_per_token_logps": old, "ref_per_token_logps": reference}
    return inputs | {name: value for name, value in others.items() if value is not None}


def rows_of(inputs, rows):
    return {name: value[rows] if value.dim() else value for name, value in inputs.items()}


def ours(settings, logps, advantage, old, reference, mask=MASK):
    """Ours, of log-probabilities where TRL has them, (S, T)."""
    sequence, place = mask.nonzero(as_tuple=True)
    own = logps[sequence, place]
    zeros = torch.zeros_like(own)
    tokens = TokenLosses(-own, zeros, zeros, torch.ones_like(own, dtype=torch.bool))
    losses = summed(tokens, sequence * WIDE + place, sequence, len(advantage))
    known = [None if values is None else values[sequence, place] for values in (old, reference)]
    terms = token_terms(losses, advantage, *known, settings)
    return loss_sum(terms, losses, settings) / settings.items(mask.sum(1).tolist()), terms


def drawn(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + 5))


def policies():
    """Log-probabilities of a policy, of that which drew, and of a reference, (S, T) float64."""
    logps = -drawn(6, WIDE).abs() - 0.5
    return logps, logps + drawn(6, WIDE, 1, scale=0.9)[..., 0], logps + drawn(6, WIDE, 1, 1, scale=0.5)[..., 0, 0]


def given(trainer, monkeypatch, logps):
    """TRL's trainer with these log-probabilities for those of its model."""
    found = (logps, torch.zeros_like(logps), None)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, True), (0.1, True), (0.1, False)])
def test_losses_and_their_gradients_are_trls(loss, level, beta, corrected, theirs, monkeypatch):
    logps, away, frozen = policies()
    advantage, cut = torch.tensor(ADVANTAGES, dtype=torch.float64), 0.0
    for clip, old in product(CLIPS, (None, away)):
        if loss == "cispo" and "epsilon_high" not in clip:
            continue  # the most that a ratio counts has to be said
        settings = PolicySettings(
            loss_type=loss,
            importance_sampling_level=level,
            beta=beta,
            use_bias_correction_kl=corrected,
            max_completion_length=MOST,
            **clip,
        )
        reference = frozen if beta else None
        leaf, own = (logps.clone().requires_grad_() for _ in range(2))
        with monkeypatch.context() as patch:
            given(theirs, patch, leaf)
            expected = told(theirs, settings)._compute_loss(theirs.model, batch_of(advantage, old, reference))
        found, terms = ours(settings, own, advantage, old, reference)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        wanted, got = torch.autograd.grad(expected, leaf)[0], torch.autograd.grad(found, own)[0]
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
        assert bool(terms.kl.sum()) == bool(beta)
        assert old is not None or loss == "cispo" or not terms.clipped.any()
        cut += float(terms.clipped.sum())
        figures = theirs._metrics["train"]
        count = MASK.sum()
        if beta:
            torch.testing.assert_close(float(terms.kl.sum() / count), figures["kl"][-1], rtol=1e-6, atol=1e-9)
        if level == "token" and "delta" not in clip:  # where TRL counts what delta has left
            name = "cispo_clip_ratio" if loss == "cispo" else "clip_ratio/region_mean"
            torch.testing.assert_close(float(terms.clipped.sum() / count), figures[name][-1], rtol=1e-6, atol=1e-9)
    assert cut or loss == "cispo"


@pytest.mark.parametrize("loss", LOSSES)
def test_two_batches_are_one(loss, theirs, monkeypatch):
    """TRL's of two batches of three, ours of the six: where the batches of a step are of one size they agree."""
    logps, old, _ = policies()
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)
    settings = PolicySettings(loss_type=loss, epsilon_high=0.3, max_completion_length=MOST)
    monkeypatch.setattr(theirs, "current_gradient_accumulation_steps", 2)
    monkeypatch.setattr(theirs.args, "steps_per_generation", 2)
    inputs, expected = batch_of(advantage, old), 0.0
    for rows in (slice(3), slice(3, 6)):
        given(theirs, monkeypatch, logps[rows])
        expected += told(theirs, settings)._compute_loss(theirs.model, rows_of(inputs, rows))
    torch.testing.assert_close(ours(settings, logps, advantage, old, None)[0], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_of_truncated_completions_nothing_is_learned_and_the_mean_is_trls(loss, theirs, monkeypatch):
    logps, old, _ = policies()
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)
    settings = PolicySettings(loss_type=loss, epsilon_high=0.3, max_completion_length=MOST)
    mask = MASK * torch.tensor([completion[-1] == END for completion in COMPLETIONS])[:, None]
    assert mask.sum() == MASK.sum() - WIDE
    given(theirs, monkeypatch, logps)
    expected = told(theirs, settings)._compute_loss(theirs.model, batch_of(advantage, old, mask=mask))
    found, _ = ours(settings, logps, advantage, old, None, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_on_a_model_they_are_trls_with_the_gradients_of_its_adapter(loss, temperature, tmp_path):
    trainer = trainer_of(tmp_path, temperature)
    model = trainer.model
    settings = PolicySettings(
        loss_type=loss, beta=0.1, max_completion_length=MOST, drawing=Drawing(temperature=temperature)
    )
    away, advantage = 0.3 * torch.randn(2, 6, WIDE), torch.tensor(ADVANTAGES)
    sequence, place = MASK.nonzero(as_tuple=True)
    rows = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    wide = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (wide - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in rows]),
        "labels": torch.tensor(
            [[-100] * len(p) + c + [-100] * (wide - len(p + c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        ),
    }
    losses = row_losses(model, inputs, can_choose_positions(model), temperature=temperature)
    logps = torch.zeros(6, WIDE).index_put((sequence, place), -losses.tokens.nats.detach())
    old, reference = logps + away[0], logps + away[1]
    terms = token_terms(losses, advantage, old[sequence, place], reference[sequence, place], settings)
    own, tensors = loss_sum(terms, losses, settings) / settings.items(LENGTHS), list(trained_tensors(model).values())
    expected = told(trainer, settings)._compute_loss(model, batch_of(advantage, old, reference))
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(torch.autograd.grad(own, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_fills_up_a_batch_adds_nothing(loss, level):
    """Tokens that are not learned, of sequences behind the last, whatever stands there."""
    settings = PolicySettings(loss_type=loss, importance_sampling_level=level, epsilon_high=0.3, beta=0.1)
    logps, sequence = torch.tensor([-1.0, -2.0, -0.5, -9.0, -3.0]), torch.tensor([0, 0, 1, 2, 3])
    learned = torch.tensor([True, True, True, False, False])
    old, reference, advantage = logps + 0.5, logps - 0.3, torch.tensor([1.0, -2.0, 0.0])

    def total(count, sequences):
        own, zeros = logps[:count].clone().requires_grad_(), torch.zeros(count)
        tokens = TokenLosses(-own, zeros, zeros, learned[:count])
        losses = summed(tokens, torch.arange(count), sequence[:count], sequences)
        terms = token_terms(losses, advantage[:sequences], old[:count], reference[:count], settings)
        found = loss_sum(terms, losses, settings)
        return found, torch.autograd.grad(found, own)[0]

    one, grads = total(5, 3)
    other, wanted = total(3, 2)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(grads, torch.cat([wanted, torch.zeros(2)]))


class TestAdvantages:
    def by_trl(self, trainer, monkeypatch, rewards, **options):
        """Those of TRL's own lines, which come between drawing and learning."""
        texts = ["x"] * len(rewards)
        generated = (PROMPTS, COMPLETIONS, None, texts, None, {}, None, None)
        monkeypatch.setattr(trainer, "_generate", lambda prompts: generated)
        monkeypatch.setattr(trainer, "_calculate_rewards", lambda *args: rewards)
        monkeypatch.setattr(trainer, "reward_funcs", [None] * rewards.shape[1])
        monkeypatch.setattr(trainer, "reward_func_names", [str(n) for n in range(rewards.shape[1])])
        for name, value in options.items():
            monkeypatch.setattr(trainer, name, value)
        return trainer._generate_and_score_completions([{"prompt": "a"}] * 6)["advantages"]

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    @pytest.mark.parametrize("weights", [(), (1.0, 0.25)])
    def test_they_are_trls(self, scale, aggregation, weights, theirs, monkeypatch):
        settings = PolicySettings(num_generations=3, scale_rewards=scale, multi_objective_aggregation=aggregation)
        expected = self.by_trl(
            theirs,
            monkeypatch,
            REWARDS,
            scale_rewards=scale,
            multi_objective_aggregation=aggregation,
            reward_weights=torch.tensor(weights or (1.0, 1.0)),
        )
        found = advantages(REWARDS, weighted(*weights or (1.0, 1.0)), GROUPS, settings)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found[:3].abs().min() > 1e-3
        if aggregation == "sum_then_normalize":
            assert found[3:].abs().max() < 1e-6  # all alike

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_the_order_of_completions_does_not_matter(self, scale, aggregation):
        settings = PolicySettings(num_generations=3, scale_rewards=scale, multi_objective_aggregation=aggregation)
        order = [4, 0, 5, 2, 3, 1]
        there = REWARDS.double()
        before = there.clone()
        weights = weighted(1.0, 0.3)
        mixed = advantages(there[order], weights, [GROUPS[n] for n in order], settings)
        torch.testing.assert_close(mixed, advantages(there, weights, GROUPS, settings)[order])
        assert torch.equal(there, before)  # rewards stay what they were

    def test_the_spread_of_rewards(self):
        same, deviation = spread(REWARDS, weighted(1.0, 1.0), GROUPS)
        assert same == 0.5
        assert deviation == pytest.approx(float(REWARDS[:3].double().sum(1).std()) / 2, rel=1e-6)

    def test_one_completion_alone_teaches_nothing(self):
        assert advantages(torch.tensor([[3.0]]), weighted(1.0), [1], PolicySettings()).tolist() == [0.0]
