"""The whole method on a small real model, in minutes: what `theodora demo` and `make demo` run."""

from theodora.demo.job import run_demo
from theodora.demo.pace import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
