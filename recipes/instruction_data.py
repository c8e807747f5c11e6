"""Instruction pairs that every Python has: signatures of the standard library (prompt), docstrings (answer).

A byte-level tokenizer needs no download, so the recipe trains on real text without a network. The loss is on the
answer only. The order of the data is restored when a run resumes.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips

MODULES = (
    "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "codecs", "collections", "concurrent.futures",
    "configparser", "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "email.message", "enum", "fractions",
    "functools", "glob", "gzip", "heapq", "html", "http.client", "inspect", "io", "itertools", "json", "logging",
    "math", "os", "os.path", "pathlib", "pickle", "queue", "random", "re", "shlex", "shutil", "socket", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "unittest",
    "urllib.parse", "uuid", "weakref", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One instruction and its answer, as text."""

    prompt: str
    answer: str


def standard_library_pairs() -> list[Pair]:
    """Signature and first docstring paragraph of the standard library's public functions, classes and methods."""
    pairs = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, member in _public_members(module):
            pairs[f"{module_name}.{name}"] = member
            if inspect.isclass(member):
                pairs.update({f"{module_name}.{name}.{method}": f for method, f in _public_members(member)})
    return [pair for name, member in sorted(pairs.items()) if (pair := _pair(name, member)) is not None]


def _public_members(owner: Any) -> Iterator[tuple[str, Any]]:
    for name, member in inspect.getmembers(owner, callable):
        if not name.startswith("_"):
            yield name, member


def _pair(name: str, member: Any) -> Pair | None:
    try:
        signature = str(inspect.signature(member))
    except (TypeError, ValueError):  # written in C, without a signature
        return None
    documentation = inspect.getdoc(member)
    if not documentation or " at 0x" in signature:  # an address would differ from run to run
        return None
    answer = " ".join(documentation.split("\n\n")[0].split())
    return Pair(f"Signature: {name}{signature}\nMeaning: ", answer)


class InstructionData(LightningDataModule):
    """The pairs, tokenized, padded to the longest of each batch, with labels on the answers.

    Args:
        batch_size: sequences per step and device.
        max_length: tokens per sequence; longer pairs are left out and counted.
        tokenizer: a hub name or a folder; None takes ByT5's bytes.
        validation_every: every so many pairs, one is held out.
        seed: of the order of the training data.
    """

    def __init__(
        self,
        batch_size: int = 8,
        max_length: int = 256,
        tokenizer: str | None = None,
        validation_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2),
                                   ("validation_every", validation_every, 2)):  # fmt: skip
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, not {value}")
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.validation_every = validation_every
        self.tokenizer: PreTrainedTokenizerBase = (
            ByT5Tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
        )
        self.held_out: list[Pair] = []
        self.num_skipped = 0

    def setup(self, stage: str) -> None:
        """Tokenizes; says how many pairs were too long."""
        pairs = standard_library_pairs()
        encoded = [(pair, self.encode(pair)) for pair in pairs]
        fitting = [(pair, example) for pair, example in encoded if example["input_ids"].numel() <= self.max_length]
        self.num_skipped = len(pairs) - len(fitting)
        if len(fitting) < self.validation_every:
            raise ValueError(f"data.max_length {self.max_length} leaves {len(fitting)} of {len(pairs)} pairs: raise it")
        self.held_out = [pair for pair, _ in fitting[:: self.validation_every]]
        self._validation = [example for _, example in fitting[:: self.validation_every]]
        self._training = [example for position, (_, example) in enumerate(fitting) if position % self.validation_every]

    def encode(self, pair: Pair) -> dict[str, Tensor]:
        """One pair as `input_ids` and `labels`, (tokens,) int64 each; the prompt's labels are ignored."""
        prompt = self.tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(pair.answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return {
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([IGNORED] * len(prompt) + answer),
        }

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pads on the right: `input_ids`, `labels` and `attention_mask`, (batch, tokens) int64 each."""
        padding = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        rows = [{**example, "attention_mask": torch.ones_like(example["input_ids"])} for example in examples]
        return {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled, with a position that checkpoints keep."""
        generator = torch.Generator().manual_seed(self.seed)
        return StatefulDataLoader(
            self._training,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=generator,
            collate_fn=self.collate,
        )

    def val_dataloader(self) -> StatefulDataLoader:
        """The held-out pairs in order."""
        return StatefulDataLoader(self._validation, batch_size=self.batch_size, collate_fn=self.collate)
