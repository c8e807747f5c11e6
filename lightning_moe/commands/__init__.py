"""The commands of `lightning-moe`, one a file: `add_parser` says what it takes, `run` gives its exit code."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on, for an option of a command."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number
