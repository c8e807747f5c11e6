"""The commands of `lightning-moe`, one a file: `add_parser` says what it takes, `run` gives its exit code."""
