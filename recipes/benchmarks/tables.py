"""Tables with where their numbers are from: on the terminal, and as Markdown."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text


def provenance(script: str, *packages: str) -> str:
    """Card, versions, commit and command."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    command = " ".join([f"python recipes/benchmarks/{Path(script).name}", *sys.argv[1:]])
    return f"{device}, {versions}, commit {commit}; `{command}`"


def show(title: str, source: str, headers: list[str], rows: list[list[str]]) -> None:
    """Prints a table; nothing in it is markup."""
    table = Table(*headers, title=Text(title), caption=Text(source))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=max(Console().width, 150)).print(table)


def write(path: Path, title: str, source: str, headers: list[str], rows: list[list[str]]) -> None:
    """Writes a table as Markdown."""
    lines = [f"{title}. {source}", "", f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")
