"""The conformance suite: every operation on an adapter against the float64 formula, for ours and for PEFT's."""
