"""What an adapter is, and how far it has moved its base."""

from theodora.analysis.inspection import AdapterReport, Group, ModuleReport, inspect_adapter

__all__ = ["AdapterReport", "Group", "ModuleReport", "inspect_adapter"]
