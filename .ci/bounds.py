"""Constraints for pip: `lowest` pins each dependency to its lower bound in pyproject.toml, `highest` none.

`between` pins those that matter most to the versions in the middle, here.

Fails where the bounds leave out a version that the project is known to run with.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

# The lowest that is allowed, one in between, and the newest that the tests have seen. lightning_moe/README.md has them.
KNOWN = {
    "torch": ("2.11", "2.13", "2.15"),
    "transformers": ("5.17", "5.20", "5.24"),
    "peft": ("0.21.0", "0.21.1", "0.21.2"),
    "lightning": ("2.6.1", "2.6.4", "2.6.6"),
}


def main(side: str) -> None:
    """Prints the constraints."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirements = {found.name: found for found in map(Requirement, project["dependencies"])}
    for name, versions in KNOWN.items():
        for version in versions:
            if version not in requirements[name].specifier:
                sys.exit(f"the bounds of pyproject.toml leave out {name} {version}")
    if side == "lowest":
        for name, requirement in requirements.items():
            print(f"{name}=={next(bound.version for bound in requirement.specifier if bound.operator == '>=')}")
    if side == "between":
        for name, (_, version, _) in KNOWN.items():
            print(f"{name}=={version}.*")


if __name__ == "__main__":
    main(sys.argv[1])
