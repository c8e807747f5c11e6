"""The list of reasons: each is used, each that is used is in it, and a message names what it is about."""

import ast
from pathlib import Path

import pytest

import lightning_moe
from lightning_moe.integrations.unsupported import REASONS, unsupported

PACKAGE = Path(lightning_moe.__file__).parent


def codes_used():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "unsupported":
                yield node.args[0].value


def test_every_reason_is_in_the_list_and_every_one_of_the_list_is_used():
    assert set(codes_used()) == set(REASONS)


def test_a_reason_has_a_code_and_a_message():
    reason = unsupported("trained_parameters", names="alpha, beta")
    assert reason.code == "trained_parameters"
    assert "alpha, beta" in reason.message
    assert str(reason) == f"{reason.message} [trained_parameters]"


def test_a_code_that_is_not_in_the_list_is_an_error():
    with pytest.raises(KeyError, match="nowhere"):
        unsupported("nowhere")
