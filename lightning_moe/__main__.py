"""`python -m lightning_moe`."""

from lightning_moe.cli import main

main()
