"""A plug-in that teaches stock vLLM to serve DoRA adapters beside LoRA and the base model, in one batch.

vLLM finds it by its entry point (`vllm.general_plugins`) wherever Theodora is installed in vLLM's environment: nothing
is to be set. Adapters are PEFT's folders, given as LoRA adapters are: `LoRARequest`, `--lora-modules`, and the run-time
endpoint. Each token's output is scaled by its own adapter's g = m / ‖W + s·B·A‖, in float32, g computed once when an
adapter is loaded; a token without DoRA is scaled by ones. What is not served right is refused when it is loaded.

vLLM has no API for this, so the plug-in replaces a few of its methods. It does so only on the versions it was tested
on (`TESTED`); on others it says so and leaves vLLM as it is, which then refuses DoRA adapters itself.
"""

from __future__ import annotations

import logging
import os

__all__ = ["ANY_VERSION", "TESTED", "register"]

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests in tests/vllm_plugin pass on."""
ANY_VERSION = "THEODORA_VLLM_ANY_VERSION"
"""Set this environment variable to 1 to use the plug-in on another version, at your own risk."""

_log = logging.getLogger("vllm.theodora")  # a child of vLLM's own logger: its level and format


def register() -> None:
    """Put the plug-in into vLLM. vLLM calls this in every process, sometimes more than once; again does nothing.

    Raises nothing for a version that was not tested: vLLM stays as it is, and a line in its log says so.
    """
    from importlib.metadata import PackageNotFoundError, version

    import vllm

    try:
        own = version("theodora")
    except PackageNotFoundError:
        own = "from source"
    found = vllm.__version__.split("+")[0]
    if found not in TESTED and os.environ.get(ANY_VERSION) != "1":
        _log.warning(
            "Theodora's DoRA plug-in was tested with vLLM %s; this is %s, which stays as it is and refuses DoRA "
            "adapters. %s=1 uses the plug-in all the same.",
            ", ".join(TESTED),
            found,
            ANY_VERSION,
        )
        return
    from theodora.vllm_plugin.patches import patch_vllm

    if patch_vllm():
        _log.info("Theodora %s serves DoRA adapters in vLLM %s.", own, found)
