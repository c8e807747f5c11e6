"""Trainer hooks, one callback a file. None needs a place of its own among the Trainer's callbacks."""
