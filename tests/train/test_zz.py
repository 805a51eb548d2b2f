import json
from pathlib import Path
import pytest

def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]

def test_one(run, tmp_path):
    result = run(objective="grpo", reward=["length:3"], num_generations=4, max_completion_length=8, per_device_train_batch_size=8, max_steps=12, logging_steps=1, held_out=8, temperature=1.0, learning_rate=3e-2)
    for n in ("loss","reward","eval_reward","completions/mean_length","entropy","sampling/sampling_logp_difference/mean","frac_reward_zero_std","reward_std","kl", "rewards/length/mean"):
        print(n, lines(tmp_path/"run", n))
    print(result.figures, result.samples)
    print((tmp_path/"run"/"README.md").read_text()[:3000])
    print(result.eval_loss)

def test_kl(run, tmp_path):
    result = run(objective="grpo", reward=["length:3"], num_generations=4, max_completion_length=8, per_device_train_batch_size=8, max_steps=4, logging_steps=1, held_out=8, temperature=0.7, learning_rate=3e-2, beta=0.1, gradient_accumulation_steps=2)
    for n in ("loss","reward","eval_reward","kl", "eval_kl", "eval_entropy", "sampling/sampling_logp_difference/mean"):
        print(n, lines(tmp_path/"run", n))
