"""The version, in one place: `pyproject.toml` and `lightning_moe.__version__` read it here."""

__version__ = "0.1.0.dev0"
