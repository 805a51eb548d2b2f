"""A trained adapter in the forms that other programs read, and whether two forms of a model say the same."""

from theodora.export.comparison import Verification, verify
from theodora.export.exporting import Approximation, ExportReport, VerificationFailed, export_adapter

__all__ = ["Approximation", "ExportReport", "Verification", "VerificationFailed", "export_adapter", "verify"]
