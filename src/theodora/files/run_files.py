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
RECORD_HEAD = "# Every setting of this run."
"""How a run's own `config.yaml` begins: by that a run is told from what has the names of its files."""
