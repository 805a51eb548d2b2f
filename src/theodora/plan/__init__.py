"""What a run will hold in memory, before anything is loaded."""
