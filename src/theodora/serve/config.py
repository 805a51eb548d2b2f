"""What can be chosen about a server. No torch, so that `theodora serve --help` is instant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from theodora.coerce import coerce_all
from theodora.config import QuantizeTo, is_number
from theodora.errors import ConfigError, bullet_list


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A server: its model, what it holds, how much it takes on, and who may ask.

    Raises:
        ConfigError: naming every field that makes no sense.
    """

    model: str
    """Folder or hub name of the base model."""
    served_name: str | None = None
    """Name of the base model in requests. Default: as given."""
    dtype: str = "auto"
    """Dtype of the base model: auto (as stored), fp32, bf16, fp16."""
    quantize: QuantizeTo | None = None
    """Quantise the base's linear layers as they are loaded: nf4, int8, int4, fp8, none. Default: as the base of the
    adapters was while they were trained, if all of them say the same."""
    device: str | None = None
    """Device to run on. Default: the GPU, if there is one."""

    slots: int = 32
    """Adapters that can be in one batch; others wait in host memory for their turn."""
    host_adapters: int | None = None
    """Adapters that wait in host memory; others are read from disk when they are asked for. Default: all."""
    max_rank: int = 64
    """Largest rank of an adapter."""

    max_batch: int = 64
    """Requests in one batch."""
    max_queue: int = 256
    """Requests that may wait; one more is answered with 429."""
    max_batch_tokens: int | None = None
    """Tokens in one forward pass. Default: 1024 on a CPU, 2048 on a GPU."""
    max_length: int | None = None
    """Tokens of prompt and answer together. Default: the model's window."""
    kv_tokens: int | None = None
    """Tokens whose keys and values are held. Default: 32768 on a CPU, what fits on a GPU."""
    kv_memory: float | None = None
    """Share of a GPU's free memory for keys and values. Default: transformers' choice."""
    page_size: int | None = None
    """Tokens in a page of keys and values. Default: 32 on a CPU, 256 on a GPU."""
    cuda_graphs: bool | None = None
    """Run batches as CUDA graphs. Default: on a GPU, where the host is the limit without them."""
    prefix_reuse: bool = True
    """Reuse keys and values of prompts that begin alike and go through the same adapter."""

    tool_call_parser: str = "auto"
    """How the model writes calls of tools: auto (as its chat template shows), none (they stay text), or a name (hermes,
    llama3_json, mistral, …)."""
    reasoning_parser: str = "auto"
    """Tags of reasoning, which is told apart in chats: auto (as the template shows), none, or a name (think, …)."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but the loopback is open to others: use api_key_file with it."""
    port: int = 8000
    """Port to listen on; 0 takes any that is free, and says which."""
    api_key_file: str | None = None
    """File with one key on each line (blank lines and lines that begin with # aside); requests must carry one of them
    (Authorization: Bearer KEY)."""
    adapter_folder: str | None = None
    """Allow /v1/load_lora_adapter and /v1/unload_lora_adapter, for adapters inside this folder."""
    max_body: int = 4_000_000
    """Bytes of a request; a larger one is answered with 413."""
    max_connections: int = 1024
    """Connections at a time; of more, those that are still sending their requests give way."""
    timeout: float = 600.0
    """Seconds for one answer; after that it is ended with 504."""
    client_timeout: float = 30.0
    """Seconds that a client may take to send a request's head, to send its body, and to take more of its answer."""
    grace: float = 30.0
    """Seconds that answers under way may take after Ctrl-C or SIGTERM."""

    @property
    def name(self) -> str:
        """The base model's name in requests."""
        return self.served_name or self.model

    def __post_init__(self) -> None:
        values, problems = coerce_all({field.name: getattr(self, field.name) for field in fields(self)}, ServeConfig)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if problems or (problems := list(self._problems())):
            raise ConfigError("The server's configuration makes no sense:" + bullet_list(problems))

    def _problems(self) -> Iterator[str]:
        from theodora.serve.calls.families import BY_NAME, THINKING_BY_NAME

        for name, known in (("tool_call_parser", BY_NAME), ("reasoning_parser", THINKING_BY_NAME)):
            if (value := getattr(self, name)) not in ("auto", "none", *known):
                yield f"{name} is {value!r}; expected auto, none, {', '.join(known)}"
        if is_number(self.port) and self.port > 65535:
            yield f"port is {self.port}; expected at most 65535"
        for field in fields(self):
            value, allowed = getattr(self, field.name), field.name in _ZERO
            if is_number(value) and (value < 0 or (value == 0 and not allowed)):
                yield f"{field.name} is {value}; expected {'at least' if allowed else 'more than'} 0"


_ZERO = ("max_queue", "port", "grace")
