"""Which tokens end an answer. (It stands on the lowest floor, because merging needs it, too.)"""

from theodora.ends import end_token_ids

__all__ = ["end_token_ids"]
