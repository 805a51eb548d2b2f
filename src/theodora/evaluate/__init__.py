"""How good a model is on a set of rows: loss, exact match, which answers it finds likelier, or scores higher."""

from theodora.evaluate.preferences import PreferenceScores, evaluate_preferences
from theodora.evaluate.reward_models import RewardScores, evaluate_reward_model
from theodora.evaluate.scores import Scores, evaluate, text_loss

__all__ = [
    "PreferenceScores",
    "RewardScores",
    "Scores",
    "evaluate",
    "evaluate_preferences",
    "evaluate_reward_model",
    "text_loss",
]
