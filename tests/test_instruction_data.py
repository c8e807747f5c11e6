"""The recipe's data: real pairs, the loss on the answers only, nothing dropped in silence."""

import pytest
import torch
from instruction_data import IGNORED, InstructionData, Pair, standard_library_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")


@pytest.fixture(scope="module")
def data():
    module = InstructionData(batch_size=4, max_length=200)
    module.setup("fit")
    return module


def test_pairs_are_many_distinct_and_the_same_every_time():
    pairs = standard_library_pairs()
    assert len(pairs) > 1000
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert all(pair.answer for pair in pairs)
    assert pairs == standard_library_pairs()


def test_labels_are_the_answer_and_the_end():
    data = InstructionData()
    example = data.encode(Pair("Signature: f(x)\nMeaning: ", "Return x."))
    answer = example["labels"][example["labels"] != IGNORED]
    assert data.tokenizer.decode(answer, skip_special_tokens=True) == "Return x."
    assert answer[-1] == data.tokenizer.eos_token_id
    assert example["input_ids"].shape == example["labels"].shape
    assert torch.equal(example["input_ids"][-len(answer) :], answer)


def test_padding_is_neither_seen_nor_learned(data):
    batch = next(iter(data.val_dataloader()))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["input_ids"][padding] == data.tokenizer.pad_token_id).all()


def test_long_pairs_are_left_out_and_counted(data):
    num_pairs = len(standard_library_pairs())
    kept = len(data._training) + len(data._validation)
    assert 0 < data.num_skipped == num_pairs - kept
    assert max(example["input_ids"].numel() for example in data._training) <= 200


def test_held_out_pairs_are_not_trained_on(data):
    held_out = {tuple(example["input_ids"].tolist()) for example in data._validation}
    assert len(held_out) == len(data.held_out)
    assert not held_out & {tuple(example["input_ids"].tolist()) for example in data._training}


def test_order_is_shuffled_and_resumes(data):
    loader = data.train_dataloader()
    batches = iter(loader)
    first = next(batches)
    state = loader.state_dict()
    second = next(batches)
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert torch.equal(next(iter(resumed))["input_ids"], second["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"max_length": 1}, "data.max_length must be at least 2"),
        ({"validation_every": 1}, "data.validation_every must be at least 2"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        InstructionData(**options)


def test_length_that_leaves_nothing():
    with pytest.raises(ValueError, match="raise it"):
        InstructionData(max_length=3).setup("fit")
