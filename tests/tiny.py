"""Tiny random language models of the families people fine-tune, and a tokenizer that reads any text.

Use the fixtures of `conftest.py`; import from here (`from tiny import FAMILIES`) for `pytest.mark.parametrize`.
Weights and biases are drawn large enough that logits are of order 1 and every bias matters: with the usual tiny
initialisation a comparison of logits passes whatever the code does.
"""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 272  # 3 special tokens and 256 bytes, rounded up to a multiple of 16
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}

# Family (transformers' model_type) -> configuration. GPT-2 has Conv1D layers, Phi-3 fused qkv and gate_up
# projections, GPT-NeoX a fused qkv and an untied `embed_out`, Qwen2 and Phi biases.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "gemma": {**_GROUPED, "head_dim": 8},
    "phi": _DECODER,
    "phi3": {**_GROUPED, "original_max_position_embeddings": 512},
    "gpt2": {
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _DECODER,
    "mistral": {**_GROUPED, "head_dim": 8, "sliding_window": None},
}


def tiny_model(
    family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """Build a random model in eval mode: 2 layers, hidden size 32, vocabulary 272; equal for equal arguments.

    Args:
        family: a key of `FAMILIES`, or a model_type whose configuration has Llama's names.
        tied: whether the output head shares the embedding's weight.
        dtype: of every parameter.
        seed: of the weights; the global random state is left alone.
        **config: overrides, by the names of the family's transformers configuration.
    """
    settings = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings | FAMILIES.get(family, _GROUPED) | config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without merges: one token per byte of UTF-8, with ChatML's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
