"""The inputs of the jobs: a tiny model as a folder and as GGUF, rows, an adapter."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel

import tiny
from quantised import save_adapted, save_plain, save_quantised
from theodora import AdapterConfig, inject_adapter, save_adapter


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.tiny_model()
    model.save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}" + "!" * (a % 5)} for a in range(3) for b in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_gguf(model, folder / "tiny.gguf")
    inject_adapter(model, AdapterConfig(rank=2, init="orthogonal"))
    save_adapter(model, folder / "adapter")
    save_quantised(save_plain(folder / "plain"), folder / "quantised", "int8")
    save_adapted(folder / "quantised", folder / "of quantised")
    return folder


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A llama as a GGUF file, with the tokenizer of `tiny_tokenizer`."""
    config, tokenizer = model.config, tiny.tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words_too = ["ab", *(f"<|unused{n}|>" for n in range(config.vocab_size))]  # a GGUF tokenizer has a merge
    tokens = ([word for word, _ in words] + words_too)[: config.vocab_size]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tiny.EOS_ID)
    writer.add_bos_token_id(tiny.BOS_ID)
    writer.add_pad_token_id(tiny.PAD_ID)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
