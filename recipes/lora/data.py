"""The recipe's data: chats from a file or a dataset, in batches without padding.

Documents stand end to end in one row, and their boundaries go with them. The order is shuffled, and restored when a run
resumes. The default is tiny.jsonl, questions and answers that a small random model learns without a download.
"""

from bisect import bisect_left, insort
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import track
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorWithFlattening

from lightning_moe import CUDAGraphCallback
from lora.chat import IGNORED, ChatTokenizer, Document, encode_all, read_records

TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))
Pack = list[Document]

# What a batch says of itself beside what the model takes.
COUNTS = ("num_documents", "num_tokens")

TINY = Path(__file__).with_name("tiny.jsonl")


class InstructionData(LightningDataModule):
    """Documents in batches without padding.

    Args:
        batch_size: documents per step and device, or packs of them.
        max_length: tokens of a document, or of a pack.
        tokenizer: a hub name or a folder; None takes ByT5's bytes.
        source: a .jsonl file of chats, or of prompts with completions (see chat.py); or the name of a dataset that the
            `datasets` package loads. None takes tiny.jsonl.
        split: of a dataset.
        chat_template: a file with a Jinja template in place of the tokenizer's own.
        assistant_only_loss: no loss on what the assistant does not write.
        long_documents: `truncate` or `skip` documents of more than `max_length` tokens; both are counted and reported.
        packing: `none`: a step has `batch_size` documents. `bfd`, best-fit decreasing: it has `batch_size` packs,
            documents end to end that do not see each other. `wrapped`: all documents make one text, cut into sequences
            of exactly `max_length` tokens, as in pre-training.
        validation_every: every so many documents, one is held out.
        seed: of the order of the training data.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 8,
        max_length: PositiveInt = 256,
        tokenizer: str | None = None,
        source: str | None = None,
        split: str = "train",
        chat_template: Path | None = None,
        assistant_only_loss: bool = True,
        long_documents: Literal["truncate", "skip"] = "truncate",
        packing: Literal["none", "bfd", "wrapped"] = "none",
        validation_every: TwoOrMore = 20,  # type: ignore[valid-type]
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)  # checkpoints hold plain types
        self.max_length = int(max_length)
        self.source = str(TINY) if source is None else source
        self.split = split
        self.long_documents = long_documents
        self.packing = packing
        self.seed = seed
        self.validation_every = validation_every
        self.tokenizer: PreTrainedTokenizerBase = (
            ByT5Tokenizer()
            if tokenizer is None
            else AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)  # None would ask on the terminal
        )
        template = None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
        self._chat = ChatTokenizer(self.tokenizer, template, assistant_only_loss)
        self._collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        self._training: list[Pack] = []
        self._validation: list[Pack] = []
        self._most_documents = 0
        self._report: list[str] = []
        self.held_out: list[Document] = []

    def setup(self, stage: str) -> None:
        """Reads, tokenizes, packs; once.

        Raises:
            ValueError: on bad records, named by where they stand, and if there are too few of them.
        """
        if self._training:
            return
        records = read_records(self.source, self.split)
        trainer = self.trainer
        shows = trainer is not None and trainer.is_global_zero and trainer.progress_bar_callback is not None
        documents = self._fit(encode_all(track(records, "tokenizing", transient=True, disable=not shows), self._chat))
        if len(documents) < 2:
            raise ValueError(
                f"data: {len(records)} records leave {len(documents)} documents of at most {self.max_length} tokens, "
                "and it takes two, one of them to validate: give more records, or raise data.max_length"
            )
        every = min(self.validation_every, len(documents))
        self.held_out = documents[::every]
        self._training = self._pack([d for number, d in enumerate(documents) if number % every], "training")
        self._validation = self._pack(self.held_out, "validation")
        self._most_documents = self.batch_size * max(map(len, self._training), default=0)

    def state_dict(self) -> dict[str, Any]:
        """What a position in the data depends on, for checkpoints."""
        options = {name: getattr(self, name) for name in ("max_length", "packing", "seed")}
        step = {"batch_size x ranks": self.batch_size * self._world_size}
        return step | options | {"number of sequences": len(self._training)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares a checkpoint's data with these, if training is to go on.

        Raises:
            ValueError: naming what differs.
        """
        mine = self.state_dict()
        differing = [name for name, value in state_dict.items() if mine[name] != value]
        if differing and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            listed = "; ".join(f"{name} is {mine[name]!r} and was {state_dict[name]!r}" for name in differing)
            raise ValueError(
                f"the checkpoint's position is not one in these data: {listed}. "
                "Set it as it was, or train anew: no --ckpt_path"
            )

    def report(self) -> list[str]:
        """What became of the records, a line each."""
        return self._report

    def _fit(self, documents: list[Document]) -> list[Document]:
        """Truncates or leaves out long documents, and leaves out those without a label within the length."""
        limit = None if self.packing == "wrapped" else self.max_length
        kept, what = [d for d in documents if limit is None or len(d.input_ids) <= limit], "left out"
        num_long = len(documents) - len(kept)
        if self.long_documents == "truncate":
            kept = [Document(d.input_ids[:limit], d.labels[:limit], d.prompt, d.answer) for d in documents]
            what = "truncated"
        fitting = [document for document in kept if _tokens_with_loss([[document]])]
        num_tokens = sum(len(document.input_ids) for document in fitting)
        share = _tokens_with_loss([fitting]) / max(num_tokens, 1)
        self._report = [
            f"{len(fitting):,} documents of {len(documents):,}, {num_tokens:,} tokens, {share:.0%} of them with a loss"
        ]
        if num_long:
            self._report.append(f"{num_long:,} documents longer than {self.max_length:,} tokens are {what}")
        if without_loss := len(kept) - len(fitting):
            self._report.append(
                f"{without_loss:,} documents have no token with a loss within that length and are left out"
            )
        return fitting

    def _pack(self, documents: list[Document], what: str) -> list[Pack]:
        if self.packing == "none":
            return [[document] for document in documents]
        packs = self._wrap(documents, what) if self.packing == "wrapped" else pack_bfd(documents, self.max_length)
        num_tokens = sum(len(document.input_ids) for pack in packs for document in pack)
        full = num_tokens / (len(packs) * self.max_length)
        self._report.append(f"{what}: {len(packs):,} packs of {self.max_length:,} tokens, {full:.1%} full")
        return packs

    def _wrap(self, documents: list[Document], what: str) -> list[Pack]:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(self.seed)).tolist()
        ids = [token for number in order for token in documents[number].input_ids]
        labels = [label for number in order for label in documents[number].labels]
        if len(ids) < self.max_length:
            if what == "validation":  # too little to hold out as much as one sequence: the beginning of a long one
                return [[Document(ids, labels, "", "")]]
            raise ValueError(
                f"data.packing 'wrapped' wants {self.max_length:,} tokens for one sequence and there are {len(ids):,}: "
                "lower data.max_length, or give more records"
            )
        starts = range(0, len(ids) - self.max_length + 1, self.max_length)
        cuts = [slice(start, start + self.max_length) for start in starts]
        return [[Document(ids[cut], labels[cut], "", "")] for cut in cuts]

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def collate(self, packs: list[Pack]) -> dict[str, Any]:
        """This rank's share of a batch for all ranks: one row of documents end to end.

        Returns:
            `input_ids`, `labels` (`IGNORED` at each document's first token) and `position_ids` (from 0 in each
            document), (1, tokens) int64; `cu_seq_lens_q` and `cu_seq_lens_k`, the documents' boundaries,
            (documents + 1,) int32; `max_length_q` and `max_length_k`, the longest one's tokens; `weight`, by which the
            mean over the ranks of their mean losses is that over all tokens with a loss. A rank for which nothing is
            left runs along with the first pack, at weight 0.
        """
        rank = 0 if self.trainer is None else self.trainer.global_rank
        share = packs[rank :: self._world_size]
        weight = self._world_size * _tokens_with_loss(share) / max(_tokens_with_loss(packs), 1)
        rows = [{"input_ids": d.input_ids, "labels": d.labels} for pack in share or packs[:1] for d in pack]
        return {**self._collator(rows), "weight": weight}

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Gives packs to train on one shape where steps are captured in CUDA graphs."""
        trainer: Any = self.trainer
        graphs = [c.graphed for c in trainer.callbacks if isinstance(c, CUDAGraphCallback) and c.graphed is not None]
        if not trainer.training or self.packing != "bfd" or all(graphed.reason is not None for graphed in graphs):
            return batch
        return fill_up(batch, self.batch_size * self.max_length, self._most_documents, self.max_length)

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled anew in each epoch, with a position that checkpoints keep.

        Every rank draws the batches of all and takes its share, so that order and position are the same in each, and
        in any number of them.

        With `trainer.limit_train_batches`, a run that stops at the last batch that it allows in an epoch goes on with
        the batches that were left out there.
        """
        step = self.batch_size * self._world_size
        if len(self._training) < step:
            each = f" on each of {self._world_size} ranks" if self._world_size > 1 else ""
            raise ValueError(
                f"data.batch_size {self.batch_size}{each} is more than the {len(self._training)} sequences to train "
                "on: lower it"
            )
        return StatefulDataLoader(
            self._training,
            batch_size=step,
            # Of its own generator: the loader draws from one too as each epoch begins, which no checkpoint restores.
            sampler=RandomSampler(self._training, generator=torch.Generator().manual_seed(self.seed)),
            drop_last=True,
            collate_fn=self.collate,
        )

    def val_dataloader(self) -> StatefulDataLoader:
        """The held-out documents in order."""
        step = self.batch_size * self._world_size
        return StatefulDataLoader(self._validation, batch_size=step, collate_fn=self.collate)


def num_documents(batch: dict[str, Any]) -> int:
    """Of a batch; `batch_size_fn` of Lightning's ThroughputMonitor."""
    return batch.get("num_documents", batch["cu_seq_lens_q"].numel() - 1)


def num_tokens(batch: dict[str, Any]) -> int:
    """Of a batch; `length_fn` of Lightning's ThroughputMonitor."""
    return batch.get("num_tokens", batch["input_ids"].numel())


def fill_up(batch: dict[str, Any], length: int, documents: int, longest: int) -> dict[str, Any]:
    """A batch of one shape, whatever is in it: documents without a loss after its own, and then empty ones.

    Their text is the batch's own beginning, so that the router sees text.

    Args:
        batch: from `InstructionData.collate`.
        length: tokens that it is to have.
        documents: the most that a batch has.
        longest: tokens that a document has at most.
    """
    ids, ends = batch["input_ids"], batch["cu_seq_lens_q"]
    missing = length - ids.shape[1]
    more = ids.repeat(1, -(-missing // ids.shape[1]))[:, :missing]
    positions = torch.arange(missing)[None] % longest
    number = documents + -(-length // longest) + 1 - ends.numel()  # attention takes none beyond the longest
    after = (ids.shape[1] + longest * torch.arange(1, number + 1, dtype=ends.dtype)).clamp(max=length)
    filled = {
        "input_ids": torch.cat([ids, more], 1),
        "labels": torch.cat([batch["labels"], torch.full_like(more, IGNORED)], 1),
        "position_ids": torch.cat([batch["position_ids"], positions], 1),
        "cu_seq_lens_q": torch.cat([ends, after]), "cu_seq_lens_k": torch.cat([ends, after]),
        "max_length_q": longest, "max_length_k": longest,
        "num_documents": num_documents(batch), "num_tokens": num_tokens(batch),
    }  # fmt: skip
    return batch | filled


def _tokens_with_loss(packs: list[Pack]) -> int:
    return sum(label != IGNORED for pack in packs for document in pack for label in document.labels[1:])


def pack_bfd(documents: list[Document], capacity: int) -> list[Pack]:
    """Packs of at most `capacity` tokens: the longest document first, each into the fullest pack that has room."""
    packs: list[Pack] = []
    room: list[tuple[int, int]] = []  # what each pack still takes, and which it is, ascending
    for document in sorted(documents, key=lambda document: -len(document.input_ids)):
        length = len(document.input_ids)
        place = bisect_left(room, (length, -1))
        if place == len(room):
            packs.append([document])
            insort(room, (capacity - length, len(packs) - 1))
        else:
            left, number = room.pop(place)
            packs[number].append(document)
            insort(room, (left - length, number))
    return packs
