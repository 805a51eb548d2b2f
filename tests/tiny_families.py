"""A tiny random model of any family that transformers builds, from the family's own configuration class.

The default configuration of a family is that of a model people use, so what its fields hold says what they mean: sizes,
counts, ids of tokens, patterns of layers. Each is made small by its name; what has to fit together and does not then,
stands in `SPECIAL`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import tiny

LAYERS = 2
HIDDEN, HEADS, GROUPS, HEAD = 32, 4, 2, 8

_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}

_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": HEAD,
    "per_layer_config": {"1": {"head_dim": 2 * HEAD}},
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": HEAD,
    "laurel_rank": 4,
}

_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ple_embed_dim": HIDDEN,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
}

# What has to be said for a family beside its sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": _SECTIONS}
        for name in (
            *("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"),
            *("glm4v", "glm46v", "glmga", "glm_ocr"),
        )
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [1, 1, 0]}}},
    "cosmos3_edge": {"text_config": _SECTIONS},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 32},
    "minicpm3": {"initializer_range": 0.02},
    "mistral4": {"qk_head_dim": 2 * HEAD, "head_dim": 2 * HEAD},
    "qwen2_5_omni_thinker": {"text_config": _SECTIONS, "vision_start_token_id": 268},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 268},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_attention_heads": HEADS,
        "num_buckets": 4,
    },
    "emu3": {"text_config": {}, "vq_config": {"base_channels": 32, "channel_multiplier": [1]}, "vocabulary_map": {}},
    "chameleon": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1]},
        "vocabulary_map": {"<image>": 271, "IMGIMGA": 270},
    },
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "longcat_flash": {"qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD, "qk_head_dim": 2 * HEAD},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "step3p7": {"text_config": {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
}

# Parts that a family's default configuration leaves out, and its checkpoints have.
WITH_PARTS = {"gemma4": ("vision_config", "audio_config")}

# What fields are called → what they get, the first that matches the whole name and whose kind fits.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|n_vocab|vocab_size_per_layer_input|text_vocab_size", tiny.VOCAB_SIZE),
    (r"pad_token_id", tiny.PAD_ID),
    (r"bos_token_id|decoder_start_token_id|sep_token_id", tiny.BOS_ID),
    (r"eos_token_id", tiny.EOS_ID),
    (r"image_size|vision_image_size|img_size|patch_size|.*_image_size", None),
    (r"num_hidden_layers|n_layers?|num_layers|depth|(en|de)coder_layers|num_block|num_hidden_blocks", LAYERS),
    (r"num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_group_num|num_query_groups", GROUPS),
    (
        r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|.*_num_attention_heads|attention_heads",
        HEADS,
    ),
    (r"(qk_|v_|attention_)?head_dim|d_kv|attention_head_size", HEAD),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|emb_dim|decoder_hidden_size|out_hidden_size", HIDDEN),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|n_inner|ffn_hidden_size|lru_width)|filter_size|d_inner", 48),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|seq_length|max_sequence_length", 512),
    (r"sliding_window|attention_window|local_attention", 64),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_k|num_experts_per_token|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"(q|kv|o)_lora_rank", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim", HEAD),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r".*dropout.*|.*_pdrop", 0.0),
    (r"initializer_range|init_std", 0.2),
)


def families() -> dict[str, type[PreTrainedModel]]:
    """Every `model_type` with the class that its checkpoints hold: the vision-language one, where there are both."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    found: dict[str, type[PreTrainedModel]] = {}
    for name in sorted(names):
        mapping = (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            else MODEL_FOR_CAUSAL_LM_MAPPING
        )
        classes = mapping[CONFIG_MAPPING[name]]
        found[name] = classes[0] if isinstance(classes, tuple) else classes
    return found


def small_config(kind: type[PreTrainedConfig], special: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The family's default configuration with every size made small."""
    return kind(**_merged(small_fields(kind), special or {}))


def small_fields(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a configuration that have to differ from the default for a tiny model."""
    default = kind()
    values: dict[str, Any] = {}
    own = default.to_dict()
    for name, value in own.items():
        try:
            inner = getattr(default, name, None)
        except Exception:  # heterogeneous configurations: it differs by layer
            inner = None
        part = kind.sub_configs.get(name)
        if value is None and part is not None and name in WITH_PARTS.get(kind.model_type, ()):
            values[name] = small_fields(part) | {"model_type": part.model_type}
        elif isinstance(inner, PreTrainedConfig):
            values[name] = small_fields(type(inner)) | {"model_type": inner.model_type}
        elif not name.startswith("_"):
            small = _small(name, value)
            if small is not value:
                values[name] = small
    layers = values.get("num_hidden_layers", LAYERS)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := own.get(name), list) and kinds:
            values[name] = _pattern(kinds, layers)
    if own.get("kv_lora_rank"):  # every head has keys of its own, made from few numbers
        values["num_key_value_heads"] = HEADS
    return values


def _merged(values: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for name, value in special.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = _merged(result[name], value) if both else value
    return result


def _small(name: str, value: Any) -> Any:
    if value is None:  # which means a default of the model's code, for a large model
        return {"head_dim": HEAD, "num_key_value_heads": GROUPS, "num_experts_per_tok": 2}.get(name)
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name) and size is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                return value
            return size if isinstance(size, float) == isinstance(value, float) and value != size else value
    if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= tiny.VOCAB_SIZE:
        return tiny.VOCAB_SIZE - 2
    return value


def _pattern(kinds: list[Any], count: int) -> list[Any]:
    """As many layers, with each kind of them first to last where there is room."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * count)[:count]


def tiny_family(name: str, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A random model in eval mode, whose weights are drawn large enough to matter."""
    config = small_config(CONFIG_MAPPING[name], SPECIAL.get(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class._from_config(config).eval()


_MIXTURE: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD, "num_experts_per_tok": 2},
    "experts_implementation": "eager",  # torch's grouped product takes no float64
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4},
}
"""Family -> configuration. Experts (E, O, I), gate and up one after the other; the same, stored one by one as `w1`,
`w2` and `w3`; (E, I, O), gate and up in turns, with biases."""
MIXTURE_IDS = torch.arange(18).view(2, 9) * 3 % 64


def tiny_mixture(name: str, **config: Any) -> PreTrainedModel:
    """A random model in eval mode whose MLPs are mixtures of 4 experts; equal for equal arguments."""
    fields = _MIXTURE | MIXTURES[name] | config
    if name == "gpt_oss":
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**fields))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("_bias"):
                torch.nn.init.normal_(parameter)
    return model.eval()
