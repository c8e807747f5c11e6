"""Private names of other libraries: few, read in integrations/ alone, whatever line of the tree reads them."""

import ast
import re
from pathlib import Path

import lightning_moe

ROOT = Path(lightning_moe.__file__).parents[1]
MOST = 22
# Whether backward may run again has no public counterpart, nor has a tensor that stands for others, or an operator that
# moves it; and ops/ imports nothing that stands above it.
ELSEWHERE = {
    ("lightning_moe/ops/autograd.py", "_C._autograd._get_current_graph_task_keep_graph"),
    ("lightning_moe/ops/quantized.py", "_make_wrapper_subclass"),
    ("lightning_moe/ops/quantized.py", "_to_copy"),
}
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # documented
SUFFIXES = {"_blocks", "_scales", "_scale_inv"}  # of tensors' names in checkpoints
OURS = re.compile("gategrad|lightning_moe")  # in the names that we put on others' objects
PRIVATE = re.compile(r"(?<![\w\]}])_[a-zA-Z]\w*")


def trees(root, *folders):
    """The parsed modules in the folders of a root, by their path."""
    paths = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


def defined(tree):
    """The names that a module defines: what it calls its functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def used(tree):
    """The private names that a module reads of any object: attributes, imports, and strings that name them.

    Of a chain of private attributes, `torch._C._autograd`, the whole is one name.
    """
    # What is said in docstrings is not read, and what f-strings begin is named elsewhere.
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in skipped:
            chain = [node.attr]
            while is_private(chain[0]) and isinstance(node.value, ast.Attribute) and is_private(node.value.attr):
                node = node.value
                skipped.add(id(node))
                chain.insert(0, node.attr)
            yield ".".join(chain)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield from PRIVATE.findall(node.value)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (part for module in modules for part in module.split("."))


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def private_names(trees):
    """(path, name) of every private name that a tree of modules reads and does not define."""
    own = (NAMED_TUPLES | SUFFIXES).union(*map(defined, trees.values()))
    return {
        (path, name)
        for path, tree in trees.items()
        for name in used(tree)
        if is_private(name) and name not in own and not OURS.search(name)
    }


def test_private_names_are_read_in_integrations_alone():
    found = private_names(trees(ROOT, "lightning_moe"))
    assert {place for place in found if not place[0].startswith("lightning_moe/integrations/")} == ELSEWHERE


def test_private_names_are_few():
    found = private_names(trees(ROOT, "lightning_moe"))
    assert len({name for _, name in found}) <= MOST


def test_each_private_name_stands_in_the_first_lines_of_its_file():
    """With the versions that it was read in."""
    found = private_names(trees(ROOT, "lightning_moe/integrations"))
    assert found
    for path, name in found:
        documentation = ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8")))
        assert name.rpartition(".")[2] in documentation, (path, name)
        assert re.search(r"[Rr]ead (here|in|there)|names read", documentation), path


MODULE = '''
"""Docstrings may speak of _anything."""
import torch._first
from library import _second
from ours import _defined
_KEY = "_lightning_moe_key"

class Own:
    def __init__(self):
        self._mine = 1

def _defined(model, value):
    model._third = value
    getattr(model, "_fourth")
    name = "base._fifth"
    model._sixth._seventh()
    return model._mine, f"{name}_bias", value._asdict(), _defined, model.__dict__
'''


def test_every_way_to_read_a_private_name_is_found(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(MODULE)
    found = private_names(trees(tmp_path, "package"))
    assert {path for path, _ in found} == {"package/module.py"}
    assert {name for _, name in found} == {"_first", "_second", "_third", "_fourth", "_fifth", "_sixth._seventh"}
