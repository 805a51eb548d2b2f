"""Training an adapter: a configuration in, a folder with the adapter and its record out. Built on TRL's SFT trainer."""

from theodora.train.result import TrainResult
from theodora.train.run import train

__all__ = ["TrainResult", "train"]
