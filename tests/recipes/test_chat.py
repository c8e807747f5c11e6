"""Tests of records becoming tokens: what the assistant says has a loss and nothing else, bad records are named."""

import json
import sys
from types import SimpleNamespace

import pytest
from lora.chat import IGNORED, Encoder, encode_all, parse, read_records
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

END = "<|im_end|>"

# As Qwen3's: an assistant turn after the last question has a think block, an earlier one loses it.
QWEN3_LIKE = (
    """
{%- set last = namespace(query=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > last.query %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""".replace("\n{%-", "{%-")
    .replace("\n{{-", "{{-")
    .strip()
)
MARKED = QWEN3_LIKE.replace(
    "{{- message.content + '<|im_end|>\\n' }}",
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}",
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say a.\nPlease."},
    {"role": "assistant", "content": "a\n\nand so on"},
    {"role": "user", "content": "Say b."},
    {"role": "assistant", "content": "b"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and the chat's marks."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = token_decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token=END, additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = QWEN3_LIKE
    return fast


def said(tokenizer, document):
    """The text that has a loss, pieces apart."""
    pieces, previous = [], None
    for position, label in enumerate(document.labels):
        if label != IGNORED:
            assert label == document.input_ids[position]
            if previous != position - 1:
                pieces.append([])
            pieces[-1].append(label)
            previous = position
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("template", [QWEN3_LIKE, MARKED], ids=["by prefixes", "by marks"])
def test_the_loss_is_on_every_assistant_turn_and_its_end(tokenizer, template):
    document = Encoder(tokenizer, template).encode({"messages": CHAT})
    whole = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert tokenizer.decode(document.input_ids) == whole
    think = "" if template == MARKED else "<think>\n\n</think>\n\n"
    assert said(tokenizer, document) == [f"a\n\nand so on{END}", f"{think}b{END}"]
    assert document.prompt.endswith("Please.<|im_end|>\n<|im_start|>assistant\n")
    assert document.answer == "a\n\nand so on"


def test_without_assistant_only_loss_every_token_has_one(tokenizer):
    document = Encoder(tokenizer, assistant_only_loss=False).encode({"messages": CHAT})
    assert document.labels == document.input_ids


def test_prompt_and_completion_are_two_turns_where_there_is_a_template(tokenizer):
    texts = Encoder(tokenizer).encode({"prompt": "Say b.", "completion": "b"})
    messages = Encoder(tokenizer).encode({"prompt": CHAT[3:4], "completion": CHAT[4:]})
    assert texts == messages
    assert said(tokenizer, texts) == [f"<think>\n\n</think>\n\nb{END}"]


def test_prompt_and_completion_stand_side_by_side_where_there_is_none():
    tokenizer = ByT5Tokenizer()
    document = Encoder(tokenizer).encode({"prompt": "ab", "completion": "cd"})
    ids = tokenizer("abcd", add_special_tokens=False)["input_ids"]
    assert document.input_ids == [*ids, tokenizer.eos_token_id]
    assert document.labels == [IGNORED, IGNORED, *ids[2:], tokenizer.eos_token_id]
    assert (document.prompt, document.answer) == ("ab", "cd")


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="no chat template for messages and tools: set data.chat_template"):
        Encoder(ByT5Tokenizer()).encode({"messages": CHAT})


WRITES_TOOLS = "{% for tool in tools or [] %}{{ '(' + tool.function.name + ')' }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "clock")]


@pytest.mark.parametrize("template", [QWEN3_LIKE, MARKED], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize("record", [{"messages": CHAT[:3]}, {"prompt": CHAT[:2], "completion": CHAT[2:3]}])
def test_a_records_tools_are_the_templates(tokenizer, template, record):
    encoder = Encoder(tokenizer, WRITES_TOOLS + template)
    document, without = encoder.encode(record | {"tools": TOOLS}), encoder.encode(record | {"tools": None})
    assert tokenizer.decode(document.input_ids) == "(weather)(clock)" + tokenizer.decode(without.input_ids)
    assert document.prompt == "(weather)(clock)" + without.prompt
    assert said(tokenizer, document) == said(tokenizer, without)


def test_tools_that_nothing_would_write_are_refused(tokenizer):
    with pytest.raises(ValueError, match="writes no tools: set data.chat_template to one that does"):
        Encoder(tokenizer).encode({"messages": CHAT, "tools": TOOLS})
    with pytest.raises(ValueError, match="no chat template for messages and tools"):
        Encoder(ByT5Tokenizer()).encode({"prompt": "a", "completion": "b", "tools": TOOLS})


def test_an_answer_with_the_end_in_it_is_refused_by_prefixes_and_whole_by_marks(tokenizer):
    answer = {"role": "assistant", "content": f"{END} ends a turn, it said"}
    record = [("chats:7", {"messages": [*CHAT[:2], answer]})]
    with pytest.raises(ValueError, match=r"chats:7: message 2 has <\|im_end\|> in it, .*: take that out, or set data"):
        encode_all(record, Encoder(tokenizer))
    (document,) = encode_all(record, Encoder(tokenizer, MARKED))
    assert said(tokenizer, document) == [f"{END} ends a turn, it said{END}"]
    asks = [CHAT[0], CHAT[1] | {"content": f"What is {END}?"}, CHAT[2]]
    (document,) = encode_all([("chats:8", {"messages": asks})], Encoder(tokenizer))
    assert said(tokenizer, document) == ["<think>\n\n</think>\n\n" + CHAT[2]["content"] + END]


def test_a_template_whose_prefixes_differ_is_refused_with_the_remedy(tokenizer):
    counting = "{{ messages | length }}" + QWEN3_LIKE
    with pytest.raises(ValueError, match=r"before message 2 differently .* \{% generation %\} marks"):
        Encoder(tokenizer, counting).encode({"messages": CHAT})


def test_an_answer_without_an_end_does_not_run_on_into_the_next_message(tokenizer):
    endless = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    endless += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(ValueError, match=r"writes no <\|im_end\|> after message 2"):
        Encoder(tokenizer, endless).encode({"messages": CHAT[:4]})
    assert said(tokenizer, Encoder(tokenizer, endless).encode({"messages": CHAT[:3]})) == ["a\n\nand so on\n"]


def test_an_answer_whose_end_is_that_of_a_later_one_is_refused(tokenizer):
    ends_once = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    ends_once += "{{ 'assistant: ' if add_generation_prompt else '<|im_end|>' }}"
    with pytest.raises(ValueError, match=r"set data.chat_template to one with \{% generation %\} marks"):
        Encoder(tokenizer, ends_once).encode({"messages": CHAT})


def test_what_a_template_does_not_render_is_named(tokenizer):
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chats:1: the chat template does not render it: roles must alternate"):
        encode_all([("chats:1", {"messages": CHAT})], Encoder(tokenizer, strict))
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    with pytest.raises(ValueError, match=r"chats:1: the chat template does not render it"):
        encode_all([("chats:1", {"messages": [*CHAT[:2], calls]})], Encoder(tokenizer))


def test_of_several_templates_the_default_is_taken(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", {"default": QWEN3_LIKE, "tool_use": "tools"})
    assert Encoder(tokenizer).encode({"messages": CHAT}) == Encoder(tokenizer, QWEN3_LIKE).encode({"messages": CHAT})


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = ByT5Tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        Encoder(tokenizer)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "an object, not list"),
        ({}, 'neither "messages" nor "prompt" and "completion"'),
        ({"prompt": "a"}, "neither"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"prompt": "a", "completion": CHAT}, "two texts or two lists"),
        ({"messages": CHAT, "tools": "[]"}, '"tools" is a list of objects, not str'),
        ({"messages": []}, "at least one message"),
        ({"messages": CHAT[:2]}, "no message is the assistant's"),
        ({"messages": ["hello"]}, "message 0 needs a role, one of system"),
        ({"messages": [*CHAT[:2], {"role": "model", "content": "a"}]}, "message 2 needs a role"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": 3}]}, "message 2 needs a content"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}, "message 2 needs a content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": None}]}, "message 0 needs a content"),
        ({"prompt": CHAT[:3], "completion": []}, "the completion is empty"),
        (b'{"prompt": ', "not JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, reason):
    with pytest.raises(ValueError, match=reason):
        parse(record)


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(["", json.dumps({"prompt": "é", "completion": "b"}), " "]), encoding="utf-8")
    records = read_records(str(path), "train")
    assert [(where, parse(line)) for where, line in records] == [(f"{path}:2", (("é", "b"), None))]
    with pytest.raises(ValueError, match="there is no such file"):
        read_records(str(tmp_path / "other.jsonl"), "train")


def test_bad_lines_are_named_with_file_and_number(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n' + '{"prompt": "a"}\n' * 6)
    with pytest.raises(ValueError, match=r"7 bad records.*\n.*chats.jsonl:2: not JSON.*\n.*:3: neither") as error:
        encode_all(read_records(str(path), "train"), Encoder(tokenizer))
    lines = str(error.value).splitlines()
    assert [line.strip().partition(": ")[0] for line in lines[1:6]] == [f"{path}:{number}" for number in range(2, 7)]
    assert lines[6].strip() == "and 2 more"


@pytest.fixture
def datasets(monkeypatch):
    """A package `datasets` that knows one dataset."""

    class DatasetsError(Exception):
        pass

    def load_dataset(name, split):
        if name != "known":
            raise DatasetsError("no such dataset")
        return [{"prompt": "a", "completion": "b", "messages": None}, {"prompt": "a"}]

    exceptions = SimpleNamespace(DatasetsError=DatasetsError)
    package = SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions, __version__="4.8.5")
    monkeypatch.setitem(sys.modules, "datasets", package)
    return package


def test_a_dataset_is_read_and_its_bad_rows_are_named(datasets, tokenizer):
    records = read_records("known", "test")
    assert len(encode_all(records[:1], Encoder(tokenizer))) == 1
    with pytest.raises(ValueError, match=r"known\[test\], row 1: neither"):
        encode_all(records, Encoder(tokenizer))
    with pytest.raises(ValueError, match="data.source 'unknown', split 'train': no such dataset"):
        read_records("unknown", "train")


def test_without_the_package_datasets_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match='pip install "datasets>=4"'):
        read_records("some/name", "train")


def test_a_version_of_datasets_that_runs_a_datasets_own_code_is_refused(datasets):
    datasets.__version__ = "3.6.0"
    with pytest.raises(ValueError, match="datasets 3.6.0 may run a dataset's own code: pip install"):
        read_records("known", "test")


@pytest.mark.parametrize(
    "template",
    [
        "{{{{ cycler.__init__.__globals__['os'].mkdir('{path}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ messages.append(1) }}}}",
        "{{% generation %}}{{{{ cycler.__init__.__globals__['os'].mkdir('{path}') }}}}{{% endgeneration %}}",
    ],
)
def test_a_chat_template_runs_no_code(template, tokenizer, tmp_path):
    encoder = Encoder(tokenizer, template.format(path=tmp_path / "ran"))
    with pytest.raises(ValueError, match="the chat template does not render it: .*(unsafe|undefined|not safely)"):
        encoder.encode({"messages": CHAT})
    assert not (tmp_path / "ran").exists()
