"""What lies on disk: opened once, read distrustfully, written whole. Nothing here knows a live model."""
