"""How good a causal language model is on a set of rows: loss, exact match, and which answers it finds likelier."""

from theodora.evaluate.preferences import PreferenceScores, evaluate_preferences
from theodora.evaluate.scores import Scores, evaluate, text_loss

__all__ = ["PreferenceScores", "Scores", "evaluate", "evaluate_preferences", "text_loss"]
