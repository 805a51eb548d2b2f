"""Tiny tokenizers of the kinds that models have, and chat templates as real models write them."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CONTROLS = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip
CORPUS = [
    "What is two and two? Two and two is four.",
    "system user assistant model\nYou answer in one word. ### Instruction: ### Response:",
    "Name a colour. Blue. Another one? Red. The capital of France is Paris.",
] * 4

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim \
+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}\
{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """\
{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

MISTRAL = """\
{{ '<s>' }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>'}}{% endif %}{% endfor %}"""

# The system turn goes into the last user turn, so that no conversation begins as its own first turns do.
MISTRAL_LAST = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}\
{%- else %}{%- set rest = messages %}{%- endif %}{{- '<s>' }}{%- for message in rest %}\
{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}\
{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}\
{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + message['content'] + '</s>' }}\
{%- endif %}{%- endfor %}"""

# Qwen3: reasoning stays in the turns after the last question only, where an empty one is written if there is none.
QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages %}\
{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
{%- for message in messages %}{%- if message.role != 'assistant' %}\
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- else %}\
{%- set content = message.content %}{%- set reasoning = '' %}{%- if '</think>' in content %}\
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}\
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}\
{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}\
{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}\
{%- for call in message.tool_calls %}{{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{%- endfor %}\
{{- '<|im_end|>\n' }}{%- endif %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# DeepSeek-R1's distillates: the generation prompt opens the reasoning, which every finished turn has lost.
DEEPSEEK = """\
{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}\
{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|assistant|>' + content + '</s>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

# GLM-4: the next turn's token is what ends a turn.
GLM = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Qwen3.5 without thinking: the generation prompt closes the reasoning, which a row may hold all the same.
NO_THINKING = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}\
{% set parts = message['content'].split('</think>') %}\
{{ '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') + '\n</think>\n\n' }}\
{{ parts[-1].strip() + '<|im_end|>\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"""

# No token ends a turn.
BARE = """\
{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# Phi-3: its control tokens swallow the white space behind them.
PHI3 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "chatml-marked": CHATML_MARKED,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "mistral-last": MISTRAL_LAST,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
    "glm": GLM,
    "no-thinking": NO_THINKING,
    "bare": BARE,
    "phi3": PHI3,
}


def byte_level(bos=False):
    """As GPT-2, Llama 3 and Qwen have: byte-level BPE, with or without BOS added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _wrapped(tokenizer, bos)


def metaspace(bos=True):
    """As Llama 2, Mistral and Gemma have: SentencePiece-like BPE with byte fallback and a leading ▁."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *CONTROLS, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, bos)


def _wrapped(tokenizer, bos):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=CONTROLS[3:],
    )


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer in plain Python, which knows no offsets."""

    def __init__(self, **kwargs):
        super().__init__(bos_token="<s>", eos_token="</s>", pad_token="<pad>", **kwargs)
        self.add_special_tokens({"additional_special_tokens": CONTROLS[3:]})

    @property
    def vocab_size(self):
        return 1000

    def get_vocab(self):
        return {chr(i): i for i in range(1000)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.fixture
def make_tokenizer():
    """(kind, template name or None) → a tokenizer."""
    kinds = {"byte-level": byte_level, "metaspace": metaspace, "python": CharacterTokenizer}

    def make(kind="byte-level", template=None, **options):
        tokenizer = kinds[kind](**options)
        tokenizer.chat_template = TEMPLATES[template] if template else None
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path):
    """Write rows (as JSON lines) or text to a file, and return its path."""

    def write(content, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return write
