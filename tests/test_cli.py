"""The program `lightning-moe`: help, version, exit codes, one line for an error."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_moe
from lightning_moe import cli

ROOT = Path(lightning_moe.__file__).parents[1]
NAMES = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]


def ends(arguments, capsys):
    """The exit code and what was printed to stdout and stderr."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    return exit.value.code, *capsys.readouterr()


def test_every_command_is_a_file_of_its_own():
    files = {path.stem for path in (ROOT / "lightning_moe" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(NAMES)
    assert sorted(NAMES) == sorted(set(NAMES))


def test_help_names_every_command_and_the_exit_codes(capsys):
    code, out, err = ends(["--help"], capsys)
    assert (code, err) == (0, "")
    assert "usage: lightning-moe" in out
    assert "Exit codes: 0 for done, or yes; 1 for no; 2 where" in " ".join(out.split())
    for name in NAMES:
        assert f"\n    {name} " in out


@pytest.mark.parametrize("name", NAMES)
def test_each_commands_help_says_what_it_does(name, capsys):
    code, out, _ = ends([name, "--help"], capsys)
    assert code == 0
    assert f"usage: lightning-moe {name}" in out
    assert len(out.partition("options:")[0].split(".")) > 1


def test_the_version(capsys):
    assert ends(["--version"], capsys)[:2] == (0, f"lightning_moe {lightning_moe.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["inspect"], ["inspect", "x", "--no-such-option"]])
def test_a_line_that_argparse_refuses_exits_with_two(arguments, capsys):
    code, out, err = ends(arguments, capsys)
    assert (code, out) == (2, "")
    assert "error: " in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (0, None, ""),
        (1, 1, ""),
        (ValueError("a folder\nthat is none"), 2, "lightning-moe inspect: a folder that is none\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "lightning-moe inspect: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "lightning-moe inspect: interrupted\n"),
    ],
)
def test_exit_codes(outcome, code, said, capsys, monkeypatch):
    def run(options):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("lightning_moe.commands.inspect.run", run)
    if code is None:
        cli.main(["inspect", "model"])
        assert capsys.readouterr().err == said
    else:
        assert ends(["inspect", "model"], capsys) == (code, "", said)


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    def run(options):
        raise RuntimeError("a defect")

    monkeypatch.setattr("lightning_moe.commands.inspect.run", run)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["inspect", "model"])


def test_the_script_and_the_module_are_the_same_program(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"lightning-moe": "lightning_moe.cli:main"}
    command = [sys.executable, "-m", "lightning_moe", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "")
    assert line == f"lightning-moe inspect: there is no {tmp_path / 'config.json'}"
