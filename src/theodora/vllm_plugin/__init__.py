"""A plug-in that teaches stock vLLM to serve DoRA adapters beside LoRA and the base model, in one batch.

vLLM finds it by its entry point (`vllm.general_plugins`) wherever Theodora is installed in vLLM's environment: nothing
is to be set. Adapters are PEFT's folders, given as LoRA adapters are: `LoRARequest`, `--lora-modules`, and the run-time
endpoint. Each token's output is scaled by its own adapter's g = m / ‖W + s·B·A‖, in float32, g computed once when an
adapter is loaded; a token without DoRA is scaled by ones. What is not served right is refused when it is loaded.

vLLM has no API for this, so the plug-in replaces a few of its methods, in whatever version it finds. Where one of them
is missing it changes nothing and says so. Where all are there, it proves itself when a model is loaded (`proof`): what
cannot be shown to follow the formula serves no DoRA, and base and LoRA go on as without the plug-in.
"""

from __future__ import annotations

import logging

__all__ = ["TESTED", "register"]

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests in tests/vllm_plugin passed on."""

_log = logging.getLogger("vllm.theodora")  # a child of vLLM's own logger: its level and format


def register() -> None:
    """Put the plug-in into vLLM. vLLM calls this in every process, sometimes twice; a second call does nothing.

    Raises nothing for a version in which a place is missing: vLLM stays as it is, which refuses DoRA adapters, and a
    line in its log says so.
    """
    from importlib.metadata import PackageNotFoundError, version

    import vllm

    try:
        own = version("theodora")
    except PackageNotFoundError:
        own = "from source"
    installed = vllm.__version__.split("+")[0]
    versions = f"This is Theodora {own} in vLLM {installed}; its tests ran on vLLM {', '.join(TESTED)}"
    try:
        from theodora.vllm_plugin.patches import patch_vllm

        patch_vllm(versions)
    except (ImportError, AttributeError) as error:
        _log.warning(
            "Theodora's DoRA plug-in does not fit this vLLM, which stays as it is and refuses DoRA adapters: %s. %s.",
            error,
            versions,
        )
