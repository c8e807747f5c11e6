"""Uses the installed package from outside the clone: what `.ci/package` runs in a clean environment.

The README is the one in the wheel's metadata.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import lightning_moe

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 151936, "dtype": "bfloat16",
}  # fmt: skip
PROGRAM = str(Path(sysconfig.get_path("scripts"), "lightning-moe"))


def run(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command, which must end with that code."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def main() -> None:
    """Uses it; the first that does not hold is an AssertionError."""
    metadata = importlib.metadata.metadata("lightning_moe")
    assert Path(lightning_moe.__file__).is_relative_to(sysconfig.get_path("purelib")), lightning_moe.__file__
    assert metadata["Version"] == lightning_moe.__version__
    assert all(getattr(lightning_moe, name) for name in lightning_moe.__all__)
    print(f"lightning_moe {lightning_moe.__version__}: {len(lightning_moe.__all__)} public names")

    readme = metadata.get_payload()
    quickstart = next(
        found for found in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "trainer.fit" in found
    )
    (report,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    ten_steps = quickstart.replace("max_epochs=1", "max_steps=10")
    for program in (quickstart, ten_steps, ten_steps.replace("lightning.pytorch", "pytorch_lightning")):
        printed = [line.rstrip() for line in run(sys.executable, "-c", program).stderr.splitlines()]
        assert all(line in printed for line in report.splitlines()), printed
    print("the README's quickstart; ten steps, in a Trainer of lightning and in one of pytorch_lightning")

    help_ = run(PROGRAM, "--help").stdout
    assert help_ == run(sys.executable, "-m", "lightning_moe", "--help").stdout
    assert lightning_moe.__version__ in run(PROGRAM, "--version").stdout
    commands = re.findall(r"^    (\w+) ", help_, re.MULTILINE)
    for command in commands:
        run(PROGRAM, command, "--help")
    Path("config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert "48 active" in run(PROGRAM, "inspect", ".").stdout
    assert "there is no" in run(PROGRAM, "inspect", "./nowhere", code=2).stderr
    planned = json.loads(run(PROGRAM, "plan", ".", "--tokens", "4096", "--gpu", "80", "--json").stdout)
    assert planned["fits"] is True
    assert 57 < planned["peak_gib"] < 62
    assert "H1000" in run(PROGRAM, "plan", ".", "--gpu", "H1000", code=2).stderr
    print(f"lightning-moe {', '.join(commands)}")


if __name__ == "__main__":
    main()
