"""Adapter files that other programs read."""
