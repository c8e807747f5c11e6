"""A model's gradients and how they compare, how often the operation ran, and ways to copy a model."""

import copy
import io
import pickle
from contextlib import contextmanager

import torch
from helpers.models import experts_modules, tokens
from helpers.reference import relative_error
from torch.nn.utils.parametrize import is_parametrized

from lightning_moe.patch_state import patch_of, patched_modules


def gradients(model, ids=None, **options):
    """The loss and every gradient of one batch, by name."""
    ids = tokens() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def agree(actual, expected, tolerance=2e-5):
    """Whether both have the same names, and every tensor the same numbers up to rounding."""
    assert actual.keys() == expected.keys()
    return max(relative_error(actual[name], want) for name, want in expected.items()) <= tolerance


def equal(actual, expected):
    """Whether both have the same names, and every tensor the same bits."""
    assert actual.keys() == expected.keys()
    return all(torch.equal(actual[name], want) for name, want in expected.items())


def num_active_executions(model):
    """How often the operation ran in each layer since this was last asked, by what its backward counted."""
    return [patch_of(module).health.drain(micro_batches=8).active_layers for module in patched_modules(model)]


@contextmanager
def merging_calls(model):
    """Notes the experts modules in whose calls PEFT merges an adapter into a weight."""
    merging = []

    @torch.compiler.disable
    def note(module, _):
        if is_parametrized(module):
            merging.append(module)

    handles = [module.register_forward_pre_hook(note) for module in experts_modules(model)]
    yield merging
    for handle in handles:
        handle.remove()


def enable_checkpointing(model, *, use_reentrant):
    """Has a Transformers model recompute its layers in backward; the lowest version has only the second name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def pickled(model):
    """The model through pickle."""
    return pickle.loads(pickle.dumps(model))


def saved(model):
    """The model through torch.save."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]
