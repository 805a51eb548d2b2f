"""The plug-in in a real vLLM: `make test-vllm`, in an environment of its own. Elsewhere it runs in a stand-in."""

import importlib.util
import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its layers can be looked at
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}

collect_ignore_glob = (
    []
    if importlib.util.find_spec("vllm")
    else ["test_offline.py", "test_ranks.py", "test_rollouts.py", "test_server.py", "test_units.py"]
)
