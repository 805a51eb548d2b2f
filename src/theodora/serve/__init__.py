"""Serving one model with many adapters: the embedded engine and its HTTP server."""
