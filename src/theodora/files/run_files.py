"""What a run's folder holds, by name: for whoever writes it, and whoever looks into it without loading torch."""

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FIGURE_FILE = "loss.png"
CARD_FILE = "README.md"
HELD_OUT_FILE = "held_out.jsonl"
BAD_BATCHES_FILE = "bad_batches.jsonl"
RUN_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    CARD_FILE,
    METRICS_FILE,
    FIGURE_FILE,
    CONFIG_FILE,
    HELD_OUT_FILE,
    BAD_BATCHES_FILE,
    CHECKPOINTS,
)
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
"""What a run that trains all weights leaves instead of an adapter; large ones have shards beside the index."""
FULL_LINE = "method: full"
"""The line of a record that says so."""
RECORD_HEAD = "# Every setting of this run."
"""How a run's own `config.yaml` begins: by that a run is told from what has the names of its files."""
