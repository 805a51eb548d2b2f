"""Hostile input: whatever a file holds, readers either understand it or raise an error of ours.

Each test draws a few examples in the default run and many more under `make fuzz` (FUZZ_EXAMPLES=5000). What hypothesis
finds is shrunk, printed, and kept in `.hypothesis`; put it beside the others as an `@example`.
"""
