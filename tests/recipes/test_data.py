"""Tests of the data module: documents, packs and their boundaries, what is reported, the order a run resumes in."""

import json
from types import SimpleNamespace

import pytest
import torch
from lora.chat import IGNORED, Document
from lora.data import TINY, InstructionData, pack_bfd

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital. is deprecated")  # torchdata's use of torch


def records(path, lengths):
    """Prompts of two bytes, completions that make documents of these lengths (one more token ends each)."""
    lines = [{"prompt": "ab", "completion": "x" * (length - 3)} for length in lengths]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture
def data(tmp_path):
    def make(lengths, **options):
        module = InstructionData(source=records(tmp_path / "some.jsonl", lengths), **options)
        module.setup("fit")
        return module

    return make


def lengths_of(packs):
    return [[len(document.input_ids) for document in each] for each in packs]


def test_the_default_is_short_questions_with_answers():
    records = [json.loads(line) for line in TINY.read_text(encoding="utf-8").splitlines()]
    assert len({record["prompt"] for record in records}) == len(records) > 200
    assert all(record["prompt"].startswith("Q: ") for record in records)
    module = InstructionData()
    module.setup("fit")
    assert len(module.report()) == 1  # none truncated, none left out


def test_one_document_in_twenty_is_held_out():
    module = InstructionData()
    module.setup("fit")
    total = len(module._training) + len(module._validation)
    assert len(module._validation) == -(-total // 20)
    held_out = {document.prompt for document in module.held_out}
    assert not held_out & {document.prompt for pack in module._training for document in pack}
    assert module.held_out[0].prompt.startswith("Q: ")


def test_documents_stand_end_to_end_without_padding(data):
    module = data([10, 12, 14, 16], batch_size=3, validation_every=4)
    batch = next(iter(module.train_dataloader()))
    bounds = batch["cu_seq_lens_q"].tolist()
    tokens = 12 + 14 + 16
    assert bounds[0] == 0
    assert bounds[-1] == tokens
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (1, tokens)
        assert batch[name].dtype == torch.int64
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])
    assert batch["max_length_q"] == batch["max_length_k"] == 16
    assert type(batch["max_length_q"]) is type(batch["max_length_k"]) is int
    for start, end in zip(bounds, bounds[1:], strict=False):
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        labels, ids = batch["labels"][0, start:end], batch["input_ids"][0, start:end]
        assert labels[:2].tolist() == [IGNORED, IGNORED]  # the prompt
        assert torch.equal(labels[2:], ids[2:])


def test_the_first_token_of_a_document_has_no_loss_even_where_prompts_have(data):
    module = data([10, 12, 14], batch_size=2, validation_every=3, assistant_only_loss=False)
    batch = next(iter(module.train_dataloader()))
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == IGNORED).all()
    assert (batch["labels"] == IGNORED).sum() == 2
    assert "3 documents of 3, 36 tokens, 92% of them with a loss" in module.report()


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_token_with_a_loss_weighs_the_same_over_any_number_of_ranks(data, ranks, loader):
    """In the last batch of the validation, which has one document, too."""
    module = data(range(10, 24), batch_size=6 // ranks, validation_every=2)
    shares = []
    for rank in range(ranks):
        module.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
        shares.append(list(getattr(module, loader)()))
    for batch in zip(*shares, strict=True):
        counts = [(each["labels"][0, 1:] != IGNORED).sum().item() for each in batch]
        by_token = sum({each["input_ids"].numel(): count for each, count in zip(batch, counts, strict=True)}.values())
        for each, count in zip(batch, counts, strict=True):
            assert each["weight"] in (0, pytest.approx(ranks * count / by_token))
        assert sum(each["weight"] for each in batch) == pytest.approx(ranks)
    assert [len(batches) for batches in shares] == [1 if loader == "train_dataloader" else 2] * ranks


def test_best_fit_decreasing_fills_packs_and_keeps_documents_whole(data):
    lengths = [50, 60, 30, 40, 70, 20, 10, 90, 33]
    module = data(lengths, max_length=100, packing="bfd", batch_size=1, validation_every=9)
    assert sorted(sum(lengths_of(module._training), [])) == sorted(lengths[1:])
    assert all(sum(each) <= 100 for each in lengths_of(module._training))
    assert len(module._training) == 4  # of 353 tokens
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape[1] == batch["cu_seq_lens_q"][-1] <= 100
    assert "training: 4 packs of 100 tokens, 88.2% full" in module.report()


def test_best_fit_takes_the_fullest_pack_that_has_room():
    documents = [Document([0] * length, [0] * length, "", "") for length in (3, 6, 2, 4, 5)]
    assert lengths_of(pack_bfd(documents, 10)) == [[6, 4], [5, 3, 2]]


def test_wrapped_packing_cuts_sequences_of_exactly_the_length(data):
    module = data([30] * 11, max_length=64, packing="wrapped", batch_size=1, validation_every=11)
    assert lengths_of(module._training) == [[64]] * 4  # of 300 tokens
    batch = next(iter(module.train_dataloader()))
    assert batch["cu_seq_lens_q"].tolist() == [0, 64]
    assert batch["position_ids"].tolist() == [list(range(64))]
    with pytest.raises(ValueError, match="wants 512 tokens for one sequence and there are 300: lower data.max_length"):
        data([30] * 11, max_length=512, packing="wrapped", validation_every=11)


def test_wrapped_sequences_are_the_documents_in_an_order_of_the_seed(data):
    options = {"max_length": 40, "packing": "wrapped", "validation_every": 10}
    lengths = [9, *range(10, 19)]
    documents = {document.answer: document for (document,) in data(lengths, validation_every=10)._training}
    streams = []
    for seed in (0, 0, 1):
        sequences = [sequence for (sequence,) in data(lengths, seed=seed, **options)._training]
        streams.append(([t for s in sequences for t in s.input_ids], [t for s in sequences for t in s.labels]))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    in_order = [list(documents.values())[number] for number in order]
    assert streams[0][0] == [token for document in in_order for token in document.input_ids][:120]  # of 126
    assert streams[0][1] == [label for document in in_order for label in document.labels][:120]
    assert streams[0] == streams[1] != streams[2]


def test_the_order_is_shuffled_by_the_seed(data):
    def order(seed):
        loader = data(range(10, 30), batch_size=1, validation_every=20, seed=seed).train_dataloader()
        return [batch["input_ids"].shape[1] for batch in loader]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == list(range(11, 30)) != order(0)


def test_long_documents_are_truncated_and_reported(data):
    module = data([10, 12, 40, 50], max_length=32, batch_size=3, validation_every=4)
    assert sorted(sum(lengths_of(module._training), [])) == [12, 32, 32]
    assert "2 documents longer than 32 tokens are truncated" in module.report()


def test_long_documents_are_left_out_and_reported(data):
    module = data([10, 12, 40, 50], max_length=32, validation_every=4, long_documents="skip")
    assert lengths_of(module._training) == [[12]]
    assert "2 documents longer than 32 tokens are left out" in module.report()


def test_documents_without_a_loss_within_the_length_are_left_out_and_reported(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [{"prompt": "p" * length, "completion": "x"} for length in (2, 2, 40)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    module = InstructionData(source=str(path), max_length=32)
    module.setup("fit")
    assert "1 documents have no token with a loss within that length and are left out" in module.report()
    assert "2 documents of 3, 8 tokens, 50% of them with a loss" in module.report()


def test_too_few_documents_are_named(data):
    with pytest.raises(ValueError, match="1 records leave 1 documents .* and it takes two"):
        data([10])
    with pytest.raises(ValueError, match="data.batch_size 8 is more than the 2 sequences to train on"):
        data([10, 10, 10], batch_size=8).train_dataloader()


def test_bad_lines_are_named_before_anything_is_trained(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: neither"):
        InstructionData(source=str(path)).setup("fit")


@pytest.mark.parametrize("packing", ["none", "bfd", "wrapped"])
def test_the_order_resumes_where_it_stopped(data, packing):
    options = {"packing": packing, "max_length": 50, "batch_size": 1, "validation_every": 8}
    lengths = [20, 30, 25, 40, 35, 50, 45, 15]
    whole = [batch["input_ids"].tolist() for batch in data(lengths, **options).train_dataloader()]
    loader = data(lengths, **options).train_dataloader()
    batches = iter(loader)
    begun = [next(batches)["input_ids"].tolist() for _ in range(2)]
    assert len(whole) > 3
    state = loader.state_dict()
    resumed = data(lengths, **options).train_dataloader()
    resumed.load_state_dict(state)
    assert begun + [batch["input_ids"].tolist() for batch in resumed] == whole


@pytest.mark.parametrize("stop", [(0, 2), (0, 7), (1, 3), (1, 7)])  # epoch, batches of the 7 in it
def test_later_epochs_resume_in_their_order_too(data, stop):
    options = {"batch_size": 1, "validation_every": 8}
    lengths = [20, 30, 25, 40, 35, 50, 45, 15]

    def sizes(batches):
        return [batch["input_ids"].shape[1] for batch in batches]

    loader = data(lengths, **options).train_dataloader()
    whole = [sizes(loader) for _ in range(4)]
    assert len({tuple(epoch) for epoch in whole}) == 4
    epoch, count = stop
    loader = data(lengths, **options).train_dataloader()
    for _ in range(epoch):
        list(loader)
    batches = iter(loader)
    begun = sizes(next(batches) for _ in range(count))
    resumed = data(lengths, **options).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert begun + sizes(resumed) == whole[epoch]
    assert [sizes(resumed) for _ in whole[epoch + 1 :]] == whole[epoch + 1 :]


def test_a_chat_template_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.jinja"):
        InstructionData(chat_template="nowhere.jinja")
