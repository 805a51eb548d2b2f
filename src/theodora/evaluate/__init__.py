"""How good a causal language model is on a set of rows: loss, and exact match."""

from theodora.evaluate.scores import Scores, evaluate, text_loss

__all__ = ["Scores", "evaluate", "text_loss"]
