"""Models that vLLM can run, adapters on them, and what PEFT makes of both."""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny

PROMPTS = ("The capital of France", "once upon a time", "12 + 30 =")
TOKENS = 16

# vLLM's attention wants heads of 32 or more.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
ADAPTERS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "dora": {"r": 8, "target_modules": "all-linear", "use_dora": True},
    # Other ranks and scales by layer, and layers left out of a packed qkv.
    "dora2": {
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 11},
    },
}
PARTIAL = {
    "qwen2": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
}


def save_model(folder: Path, family: str) -> Path:
    """A random model, each of its biases well away from zero, and a tokenizer."""
    model = tiny.tiny_model(family, **SIZES | ({"head_dim": 32} if family == "gemma" else {}))
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, family: str, name: str, *, seed: int = 0, **changes) -> Path:
    """PEFT's own adapter, moved away from its start."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": PARTIAL[family], **ADAPTERS[name], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.15)
                elif "magnitude" in key:
                    parameter.mul_(1 + 0.15 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def peft_answers(base: Path, adapter: Path | None) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens after each prompt, and their log-probabilities."""
    tokenizer = tiny.tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        model.eval()
        answers = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            found, scores = [], []
            for _ in range(TOKENS):
                with torch.no_grad():
                    log_p = model(ids).logits[0, -1].double().log_softmax(0)
                found.append(int(log_p.argmax()))
                scores.append(float(log_p.max()))
                ids = torch.cat([ids, log_p.argmax()[None, None]], 1)
            answers.append((found, scores))
    return answers


def without_magnitudes(folder: Path, adapter: Path) -> Path:
    """The same adapter as plain LoRA would be: what engines that drop magnitudes serve."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "magnitude" not in k}, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    return folder
