"""The command line: `lightning-moe COMMAND`, also as `python -m lightning_moe COMMAND`."""

import argparse
import sys

from lightning_moe.commands import export, inspect, merge, plan, verify
from lightning_moe.version import __version__

COMMANDS = (plan, inspect, export, merge, verify)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with its code unless that is 0."""
    parser = argparse.ArgumentParser(
        prog="lightning-moe",
        description="Tools around Mixture-of-Experts training with lightning_moe.",
        epilog="Exit codes: 0 for done, or yes; 1 for no; 2 where something is wrong or missing, named in one line on "
        "stderr. `lightning-moe COMMAND --help` has a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"lightning_moe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code = options.run(options)
    except (ValueError, OSError) as error:
        code = _fail(options.command, " ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        code = _fail(options.command, "interrupted", 130)
    if code:
        sys.exit(code)


def _fail(command: str, message: str, code: int) -> int:
    print(f"lightning-moe {command}: {message}", file=sys.stderr)
    return code
