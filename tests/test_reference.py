"""lightning_moe/REFERENCE.md: every public name, as the docstrings are now; its examples run."""

import ast
import doctest
import re
import runpy
from pathlib import Path

import pytest

import lightning_moe

ROOT = Path(lightning_moe.__file__).parents[1]
PAGE = (ROOT / "lightning_moe" / "REFERENCE.md").read_text("utf-8")
ENTRIES = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLE = re.compile(r"```pycon\n(.*?)```", re.DOTALL)


def failures(entry):
    """How many lines of an entry's examples fail, each example by itself."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    tests = (parser.get_doctest(text, {"__name__": "__main__"}, "example", None, 0) for text in EXAMPLE.findall(entry))
    return sum(runner.run(test, out=lambda _: None).failed for test in tests)


def test_the_page_is_what_the_docstrings_give():
    written = runpy.run_path(str(ROOT / ".ci" / "reference.py"))["page"]()
    assert written == PAGE, "PYTHONPATH=. python .ci/reference.py writes it anew"


def test_every_public_name_is_there_with_its_signature_and_its_docstring():
    assert list(ENTRIES) == lightning_moe.__all__
    for name, entry in ENTRIES.items():
        assert f"- [`{name}`](#{name.lower()}): " in PAGE
        assert entry.startswith(f"\n```python\n{name}(")
        first = getattr(lightning_moe, name).__doc__.strip().splitlines()[0]
        assert f"\n{first}\n" in entry


def test_every_signature_is_one():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        name, _, rest = block.strip().partition("(")
        (function,) = ast.parse(f"def f({rest}: ...").body
        assert not {"self", "cls"} & {argument.arg for argument in function.args.args}
        assert name.partition(".")[0] in lightning_moe.__all__


def test_every_argument_of_a_signature_is_explained():
    entry = ENTRIES["moe_experts"]
    arguments = re.findall(r"^    (\w+): ", entry.partition("```\n")[0], re.MULTILINE)
    assert len(arguments) > 10
    assert (
        re.findall(r"^- `(\w+)`: ", entry.partition("**Arguments**")[2].partition("**Returns**")[0], re.M) == arguments
    )


def test_code_is_in_examples_that_run():
    assert not re.search(r"\n\n    \S", PAGE)
    assert PAGE.count(">>> ") == sum(found.count(">>> ") for found in EXAMPLE.findall(PAGE))


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if ">>>" in entry])
def test_examples_run(name):
    assert failures(ENTRIES[name]) == 0


def test_the_check_of_examples_fails_where_one_does():
    entry = ENTRIES["moe_experts"]
    assert failures(entry.replace("torch.Size([5, 16])", "torch.Size([5, 17])")) == 1
    assert failures(entry.replace("import torch", "import math")) > 1
