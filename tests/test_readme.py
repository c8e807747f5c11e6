"""The README and the manuals: what they show runs, and what they link to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_moe

ROOT = Path(lightning_moe.__file__).parents[1]
MANUALS = [
    path.relative_to(ROOT) for folder in (".", "lightning_moe", "recipes") for path in (ROOT / folder).glob("*.md")
]
MANUALS += [path.relative_to(ROOT) for path in (ROOT / "recipes" / "benchmarks").glob("*.md")]


def test_the_quickstart_prints_the_report_that_is_shown(tmp_path):
    text = (ROOT / "README.md").read_text("utf-8")
    program = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "trainer.fit" in block)
    (report,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line.rstrip() for line in done.stderr.splitlines()]
    assert all(line in printed for line in report.splitlines()), done.stderr


@pytest.mark.parametrize("manual", MANUALS, ids=str)
def test_links_lead_to_files(manual):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / manual).read_text("utf-8"))
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (ROOT / manual.parent / target).exists()] == []
