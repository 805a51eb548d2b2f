"""What a model writes, told apart: text, reasoning, and calls of tools, for the formats of the common families."""
