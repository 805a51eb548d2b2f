"""The whole method on a small real model, in minutes: what `theodora demo` and `make demo` run."""

from theodora.demo.job import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
