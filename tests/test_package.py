"""The package as a whole: its public names, its floors by imports, and what it does without."""

import ast
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_moe

ROOT = Path(lightning_moe.__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_public_names():
    assert lightning_moe.__all__ == sorted(lightning_moe.__all__, key=lambda name: (name.islower(), name))
    assert all(getattr(lightning_moe, name).__doc__ for name in lightning_moe.__all__)


def test_the_package_imports_neither_recipes_nor_tests():
    names = {name for path in (ROOT / "lightning_moe").rglob("*.py") for name in imported(path)}
    assert "lightning_moe.ops.experts" in names
    assert not {name for name in names if name.split(".")[0] in ("recipes", "tests", "qwen3_lora", "helpers")}


def test_recipes_import_public_names_only():
    for path in (ROOT / "recipes").rglob("*.py"):
        names = {name for name in imported(path) if name and name.startswith("lightning_moe.")}
        # One benchmark measures the kernels themselves, which nothing public names.
        assert names == ({"lightning_moe.ops"} if path.name == "grouped_products.py" else set()), path


# Lowest first: arithmetic, knowledge of other libraries, what patches and measures a model, a Trainer's hooks.
FLOORS = [
    {"ops", "version"},
    {"integrations"},
    {
        "activation_estimate", "adapter_updates", "adapters", "captured_step", "cuda_graph", "discovery", "dispatch",
        "expert_load", "health", "patch_state", "metrics", "patch_report", "patching",
        "planning", "quantization", "saved_activations", "unmerged_lora",
    },
    {"callbacks", "commands", "cli", "__main__"},
]  # fmt: skip


def floor(module):
    """The floor of a module of the package, by its name."""
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def above(root):
    """(module, import) of whatever a package in a folder imports from above its own floor, or from its front door."""
    for path in sorted((root / "lightning_moe").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if module != "lightning_moe":
            ours = (name for name in imported(path) if name.partition(".")[0] == "lightning_moe")
            yield from ((module, name) for name in ours if "." not in name or floor(name) > floor(module))


def test_no_floor_imports_one_above_it():
    assert list(above(ROOT)) == []


def test_the_floors_check_fails_on_an_import_from_above(tmp_path):
    for room, line in (
        ("ops", "from lightning_moe.integrations.unsupported import Unsupported"),
        ("integrations", "import lightning_moe.health"),
        ("adapters", "from lightning_moe import patch_moe"),
        ("callbacks", "from lightning_moe.ops import experts"),
    ):
        (tmp_path / "lightning_moe" / room).mkdir(parents=True)
        (tmp_path / "lightning_moe" / room / "module.py").write_text(line)
    assert [module.split(".")[1] for module, _ in above(tmp_path)] == ["adapters", "integrations", "ops"]


def test_ops_imports_torch_alone():
    allowed = {"torch", "triton", "lightning_moe", *sys.stdlib_module_names}
    for path in (ROOT / "lightning_moe" / "ops").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


def test_every_package_and_the_marker_of_its_types_are_in_the_wheel():
    folders = (path.parent.relative_to(ROOT) for path in (ROOT / "lightning_moe").rglob("__init__.py"))
    assert sorted(".".join(folder.parts) for folder in folders) == SETUPTOOLS["packages"]
    assert SETUPTOOLS["package-data"] == {"lightning_moe": ["py.typed"]}
    assert (ROOT / "lightning_moe" / "py.typed").read_bytes() == b""


def test_the_version_is_in_one_place():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "lightning_moe.version.__version__"}
    version = runpy.run_path(str(ROOT / "lightning_moe" / "version.py"))["__version__"]
    assert lightning_moe.__version__ == version == str(Version(version))


def test_the_metadata_say_what_the_package_is():
    assert {"Typing :: Typed", "Intended Audience :: Science/Research"} <= set(PROJECT["classifiers"])
    assert not [name for name in PROJECT["classifiers"] if name.startswith("License")]  # beside `license`, an error
    assert "urls" not in PROJECT  # there is none to name


# What each extra's packages are imported as, and a file that does, or has Lightning do it.
EXTRAS = {
    "recipes": {
        "jsonargparse": ("LightningCLI", "recipes/qwen3_lora.py"),
        "matplotlib": ("matplotlib", "lightning_moe/expert_load.py"),
        "tensorboard": ("TensorBoardLogger", "recipes/configs/tiny.yaml"),
        "torchdata": ("torchdata", "recipes/lora/data.py"),
    },
    "liger": {"liger-kernel": ("liger_kernel", "recipes/lora/base_model.py")},
    "quantized": {"bitsandbytes": ("bitsandbytes", "lightning_moe/integrations/bitsandbytes_nf4.py")},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_something_uses(extra):
    asked = [Requirement(line).name for line in PROJECT["optional-dependencies"][extra]]
    assert asked == list(EXTRAS[extra])
    for name, file in EXTRAS[extra].values():
        assert name in (ROOT / file).read_text("utf-8")
    required = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not required & set(asked)


def test_the_extras_are_all_there():
    assert {*EXTRAS, "dev"} == PROJECT["optional-dependencies"].keys()
    assert "lightning_moe[recipes,quantized]" in PROJECT["optional-dependencies"]["dev"]


def test_the_readmes_commands_are_those_of_ci():
    command = 'python -m pip install -c .ci/constraints.txt -e ".[dev]" && python -m pytest'
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command.replace("install", "install -q") in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_manuals_versions_are_those_of_ci():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    manual = (ROOT / "lightning_moe" / "README.md").read_text("utf-8")
    bounds = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    for name, versions in runpy.run_path(str(ROOT / ".ci" / "bounds.py"))["KNOWN"].items():
        lowest, between, highest = map(Version, versions)
        assert f"{name} {lowest} to {highest}" in readme
        assert f"\n| {name} | {lowest} | {between} | {highest} |\n" in manual
        assert lowest < between < highest
        assert {lowest, between, highest} == {*bounds[name].filter([lowest, between, highest])}


@pytest.mark.parametrize(
    ("side", "pinned"),
    [
        ("lowest", {"torch==2.11", "transformers==5.17", "peft==0.21.0", "lightning==2.6.1"}),
        ("between", {"torch==2.13.*", "transformers==5.20.*", "peft==0.21.1.*", "lightning==2.6.4.*"}),
        ("highest", set()),
    ],
)
def test_what_ci_pins_to_try_the_versions(side, pinned):
    command = [sys.executable, str(ROOT / ".ci" / "bounds.py"), side]
    printed = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert pinned <= printed
    assert len(printed) == {"lowest": len(PROJECT["dependencies"]), "between": 4, "highest": 0}[side]


def test_the_designs_names_are_public():
    asked = {
        "MoEGateGradCallback", "MemoryMonitor", "ExpertLoadMonitor", "AdapterUpdateCheck", "AdapterExport",
        "PatchReport", "patch_moe", "unpatch_moe", "gategrad", "moe_experts", "LowRank", "export_adapter",
    }  # fmt: skip
    assert asked <= set(lightning_moe.__all__)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing}))
import lightning_moe.ops
assert lightning_moe.ops.moe_experts is lightning_moe.moe_experts and lightning_moe.LowRank
assert not hasattr(lightning_moe, "no_such_name")
lightning_moe.MoEGateGradCallback
"""


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["peft", "lightning", "transformers", "torchmetrics"], "peft"), (["lightning"], "lightning")],
)
def test_ops_imports_where_a_dependency_is_missing_and_the_callback_names_it(missing, named):
    code = WITHOUT.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    error = done.stderr.strip().splitlines()[-1]
    assert error == f"ImportError: lightning_moe.MoEGateGradCallback needs {named}: pip install lightning_moe"


WITHOUT_TRITON = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.modules["triton"] = None
import torch
from lightning_moe import MoEGateGradCallback, moe_experts
hidden = torch.randn(4, 8, requires_grad=True)
gates = torch.rand(4, 2, requires_grad=True)
index = torch.tensor([[0, 1]]).expand(4, 2)
moe_experts(hidden, index, gates, torch.randn(2, 8, 8), torch.randn(2, 8, 4)).sum().backward()
assert gates.grad.abs().sum() > 0
assert "lightning_moe.ops.triton_kernels" not in sys.modules
"""


@pytest.mark.parametrize(("missing", "is_needed"), [("triton", False), ("torch", True)])
def test_trains_without_triton_and_without_a_gpu(missing, is_needed):
    code = WITHOUT_TRITON.replace("triton", missing, 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode != 0) == is_needed, done.stderr


def test_the_import_check_fails_on_a_forbidden_import(tmp_path):
    (tmp_path / "bad.py").write_text("from recipes import qwen3_lora\nimport tests.reference\n")
    assert list(imported(tmp_path / "bad.py")) == ["recipes", "tests.reference"]


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imported(path) if name and name.split(".")[-1].startswith("test_")], path
