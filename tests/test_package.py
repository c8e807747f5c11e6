"""The package as a whole: what it exports, what it imports, and that it needs neither Triton nor a GPU."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_moe

ROOT = Path(lightning_moe.__file__).parents[1]
BLOCK = "import sys; sys.modules['{}'] = None; import lightning_moe"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_public_names():
    assert lightning_moe.__all__ == sorted(lightning_moe.__all__, key=lambda name: (name.islower(), name))
    assert all(getattr(lightning_moe, name).__doc__ for name in lightning_moe.__all__)


@pytest.mark.parametrize(("module", "is_needed"), [("triton", False), ("torch", True)])
def test_imports_without_triton(module, is_needed):
    done = subprocess.run([sys.executable, "-c", BLOCK.format(module)], capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode != 0) == is_needed, done.stderr.decode()


def test_the_package_imports_neither_recipes_nor_tests():
    names = {name for path in (ROOT / "lightning_moe").rglob("*.py") for name in imported(path)}
    assert "lightning_moe.ops.experts" in names
    assert not {name for name in names if name.split(".")[0] in ("recipes", "tests", "qwen3_lora", "helpers")}


def test_recipes_import_public_names_only():
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not [name for name in imported(path) if name and name.startswith("lightning_moe.")]


FLOORS = [
    {"ops"},
    {
        "integrations",
        "health",
        "metrics",
        "patch_report",
        "discovery",
        "patching",
        "adapter_updates",
        "adapters",
        "export",
    },
    {"callbacks"},
]


def floor(module):
    """The floor of a module of the package, by its name."""
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def ours():
    for path in (ROOT / "lightning_moe").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module != "lightning_moe":
            yield module, {name for name in imported(path) if name.startswith("lightning_moe.")}


def test_no_floor_imports_one_above_it():
    for module, names in ours():
        assert all(floor(name) <= floor(module) for name in names), module


def test_arithmetic_imports_torch_alone():
    allowed = {"torch", "triton", "lightning_moe", *sys.stdlib_module_names}
    for path in (ROOT / "lightning_moe" / "ops").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_the_readmes_commands_are_those_of_ci():
    command = 'python -m pip install -c .ci/constraints.txt -e ".[dev]" && python -m pytest'
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_readmes_versions_are_those_of_ci():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for name, (lowest, highest) in runpy.run_path(str(ROOT / ".ci" / "bounds.py"))["KNOWN"].items():
        assert f"{name} {lowest} to {highest}" in readme


def test_the_designs_names_are_public():
    asked = {"MoEGateGradCallback", "MemoryMonitor", "PatchReport", "patch_moe", "unpatch_moe", "gategrad"}
    assert asked | {"moe_experts"} <= set(lightning_moe.__all__)


WITHOUT_TRITON = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["triton"] = None
import torch
from lightning_moe import moe_experts
hidden = torch.randn(4, 8, requires_grad=True)
gates = torch.rand(4, 2, requires_grad=True)
index = torch.tensor([[0, 1]]).expand(4, 2)
moe_experts(hidden, index, gates, torch.randn(2, 8, 8), torch.randn(2, 8, 4)).sum().backward()
assert gates.grad.abs().sum() > 0
assert not [name for name in sys.modules if name.startswith("lightning_moe.triton")]
"""


def test_trains_without_triton_and_without_a_gpu():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_import_check_sees_a_forbidden_import(tmp_path):
    (tmp_path / "bad.py").write_text("from recipes import qwen3_lora\nimport tests.reference\n")
    assert list(imported(tmp_path / "bad.py")) == ["recipes", "tests.reference"]
