"""Tests of records becoming tokens: what the assistant writes has a loss and nothing else, bad records are named."""

import json
import sys

import pytest
from lora.chat import IGNORED, TRAINING_TEMPLATE, ChatTokenizer, encode_all, parse, read_records
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

END = "<|im_end|>"

ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# ChatML, as Qwen3 Instruct has it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}" + ASKS
)
# As Qwen3's: the answer to the last query has a think block, and an earlier one loses it.
QWEN3_LIKE = (
    "{% set last = namespace(query=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}"
    "{% endfor %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% set parts = message.content.split('</think>\\n\\n') %}"
    "{% if message.role == 'assistant' and loop.index0 > last.query %}"
    "{{ parts[0] if parts | length > 1 else '<think>\\n\\n' }}{{ '</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\\n' }}{% endfor %}" + ASKS
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + ASKS
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say a.\nPlease."},
    {"role": "assistant", "content": "a\n\nand so on"},
    {"role": "user", "content": "Say b."},
    {"role": "assistant", "content": "b"},
]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "clock")]


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


def written(tokenizer, document):
    """The texts that have a loss."""
    pieces, previous = [], None
    for position, label in enumerate(document.labels):
        if label != IGNORED:
            assert label == document.input_ids[position]
            if previous != position - 1:
                pieces.append([])
            pieces[-1].append(label)
            previous = position
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("template", "think"),
    [(CHATML, ""), (QWEN3_LIKE, "<think>\n\n</think>\n\n"), (MARKED, "")],
    ids=["chatml", "qwen3", "marks of its own"],
)
def test_the_loss_is_on_every_assistant_turn_and_its_end(tokenizer, template, think):
    document = ChatTokenizer(tokenizer, template).encode({"messages": CHAT})
    whole = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert tokenizer.decode(document.input_ids) == whole
    assert written(tokenizer, document) == [f"a\n\nand so on{END}", f"{think}b{END}"]
    assert document.prompt.endswith("Please.<|im_end|>\n<|im_start|>assistant\n")
    assert document.answer == "a\n\nand so on"


def test_thoughts_stay_in_the_last_answer_and_leave_earlier_ones(tokenizer):
    thought = "<think>\nThe é of b.\n</think>\n\n"
    chat = [m | {"content": thought + m["content"]} if m["role"] == "assistant" else m for m in CHAT]
    document = ChatTokenizer(tokenizer).encode({"messages": chat})
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert written(tokenizer, document) == [f"a\n\nand so on{END}", f"{thought}b{END}"]


def test_the_training_template_writes_tools_calls_and_responses_as_qwen3(tokenizer):
    call = {"function": {"name": "clock", "arguments": {"zone": "Kyōto", "exact": None}}}
    chat = [
        *CHAT[:2],
        {"role": "assistant", "content": "", "tool_calls": [call, {"name": "weather", "arguments": "{}"}]},
        {"role": "tool", "content": "noon"},
        {"role": "tool", "content": "fair"},
        {"role": "assistant", "content": "Noon."},
    ]
    template = TRAINING_TEMPLATE.read_text(encoding="utf-8")
    document = ChatTokenizer(tokenizer, template).encode({"messages": chat, "tools": TOOLS[1:]})
    calls = (
        '<tool_call>\n{"name": "clock", "arguments": {"zone": "Kyōto", "exact": null}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "weather", "arguments": {{}}}}\n</tool_call>{END}'
    )
    system = (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "clock", "parameters": {}}}\n</tools>\n\nFor each function call, '
        "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        f'{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>{END}\n'
    )
    assert tokenizer.decode(document.input_ids) == (
        f"{system}<|im_start|>user\nSay a.\nPlease.{END}\n<|im_start|>assistant\n{calls}\n"
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response>\n<tool_response>\nfair\n</tool_response>"
        f"{END}\n<|im_start|>assistant\nNoon.{END}\n"
    )
    assert written(tokenizer, document) == [calls, f"Noon.{END}"]


def test_a_template_without_marks_that_renders_otherwise_is_unsupported(tokenizer):
    remedy = r"set data.chat_template to a Jinja file with \{% generation %\} marks"
    with pytest.raises(ValueError, match=f"chats:1: .* renders this record otherwise than qwen3.jinja.*{remedy}"):
        encode_all([("chats:1", {"messages": CHAT})], ChatTokenizer(tokenizer, "{{ 'Hello! ' }}" + CHATML))
    llama_like = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match=f"is not like Qwen3's: {remedy}"):
        ChatTokenizer(tokenizer, llama_like)
    document = ChatTokenizer(tokenizer, llama_like, assistant_only_loss=False).encode({"messages": CHAT})
    assert tokenizer.decode(document.labels).endswith("assistant: b\n")


def test_marks_around_nothing_are_named(tokenizer):
    with pytest.raises(ValueError, match="marks enclose nothing that the assistant writes"):
        ChatTokenizer(tokenizer, CHATML + "{% generation %}{% endgeneration %}").encode({"messages": CHAT})


def test_without_assistant_only_loss_every_token_has_one(tokenizer):
    document = ChatTokenizer(tokenizer, assistant_only_loss=False).encode({"messages": CHAT})
    assert document.labels == document.input_ids


def test_prompt_and_completion_are_two_turns_where_there_is_a_template(tokenizer):
    texts = ChatTokenizer(tokenizer).encode({"prompt": "Say b.", "completion": "b"})
    messages = ChatTokenizer(tokenizer).encode({"prompt": CHAT[3:4], "completion": CHAT[4:]})
    assert texts == messages
    assert written(tokenizer, texts) == [f"<think>\n\n</think>\n\nb{END}"]


def test_prompt_and_completion_stand_side_by_side_where_there_is_no_template():
    tokenizer = ByT5Tokenizer()
    document = ChatTokenizer(tokenizer).encode({"prompt": "ab", "completion": "cd"})
    ids = tokenizer("abcd", add_special_tokens=False)["input_ids"]
    assert document.input_ids == [*ids, tokenizer.eos_token_id]
    assert document.labels == [IGNORED, IGNORED, *ids[2:], tokenizer.eos_token_id]
    assert (document.prompt, document.answer) == ("ab", "cd")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"prompt": CHAT[3:4], "completion": CHAT[4:]},
        {"prompt": "a", "completion": "b", "tools": TOOLS},
    ],
)
def test_messages_and_tools_need_a_template(record):
    with pytest.raises(ValueError, match="no chat template for messages and tools: set data.chat_template"):
        ChatTokenizer(ByT5Tokenizer()).encode(record)


def test_a_tokenizer_without_offsets_cannot_tell_the_assistants_tokens():
    with pytest.raises(ValueError, match=r"ByT5Tokenizer does not say .* set data.assistant_only_loss to false"):
        ChatTokenizer(ByT5Tokenizer(), MARKED)
    document = ChatTokenizer(ByT5Tokenizer(), MARKED, assistant_only_loss=False).encode({"messages": CHAT})
    assert document.labels == document.input_ids


@pytest.mark.parametrize("record", [{"messages": CHAT[:3]}, {"prompt": CHAT[:2], "completion": CHAT[2:3]}])
def test_the_template_writes_a_records_tools(tokenizer, record):
    writes_tools = "{% for tool in tools or [] %}{{ '(' + tool.function.name + ')' }}{% endfor %}"
    chat = ChatTokenizer(tokenizer, writes_tools + MARKED)
    document, without = chat.encode(record | {"tools": TOOLS}), chat.encode(record | {"tools": None})
    assert tokenizer.decode(document.input_ids) == "(weather)(clock)" + tokenizer.decode(without.input_ids)
    assert document.prompt == "(weather)(clock)" + without.prompt
    assert written(tokenizer, document) == written(tokenizer, without)


def test_tools_that_the_template_does_not_write_are_unsupported(tokenizer):
    with pytest.raises(ValueError, match="writes no tools: set data.chat_template to one that does"):
        ChatTokenizer(tokenizer).encode({"messages": CHAT, "tools": TOOLS})


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_marks_of_the_format_in_a_text_do_not_move_the_loss(tokenizer, template):
    asks = CHAT[1] | {"content": f"What is {END}\n<|im_start|>assistant\n?"}
    answer = {"role": "assistant", "content": f"{END} ends a turn, I wrote"}
    document = ChatTokenizer(tokenizer, template).encode({"messages": [asks, answer]})
    assert written(tokenizer, document) == [f"{END} ends a turn, I wrote{END}"]


def test_a_chat_that_the_assistant_begins_has_no_prompt(tokenizer):
    document = ChatTokenizer(tokenizer, CHATML).encode({"messages": CHAT[2:]})
    assert (document.prompt, document.answer) == ("", CHAT[2]["content"])


def test_what_a_template_does_not_render_is_named(tokenizer):
    strict = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"chats:1: the chat template does not render it: roles must alternate"):
        encode_all([("chats:1", {"messages": CHAT})], ChatTokenizer(tokenizer, strict))
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    with pytest.raises(ValueError, match=r"chats:1: the chat template does not render it"):
        encode_all([("chats:1", {"messages": [*CHAT[:2], calls]})], ChatTokenizer(tokenizer))


def test_of_several_templates_the_default_is_taken(tokenizer, monkeypatch):
    expected = ChatTokenizer(tokenizer, QWEN3_LIKE).encode({"messages": CHAT})
    monkeypatch.setattr(tokenizer, "chat_template", {"default": QWEN3_LIKE, "tool_use": "tools"})
    assert ChatTokenizer(tokenizer).encode({"messages": CHAT}) == expected


def test_a_tokenizer_without_an_end_is_unsupported():
    tokenizer = ByT5Tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        ChatTokenizer(tokenizer)


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
    ],
)
def test_what_is_wrong_with_a_record_is_named(record, reason):
    with pytest.raises(ValueError, match=reason):
        parse(record)


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(["", json.dumps({"prompt": "é", "completion": "2024-01-02"}), " "]), encoding="utf-8")
    records = read_records(str(path), "train")
    assert [where for where, _ in records] == [f"{path}:2"]
    (document,) = encode_all(records, ChatTokenizer(ByT5Tokenizer()))
    assert (document.prompt, document.answer) == ("é", "2024-01-02")
    with pytest.raises(ValueError, match="there is no such file"):
        read_records(str(tmp_path / "other.jsonl"), "train")


def test_bad_lines_are_named_with_file_and_number(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    good, bad = b'{"prompt": "a", "completion": "b"}\n', b'{"prompt": "a"}\n'
    path.write_bytes(good + b'{"prompt": \n' + b'{"prompt": "\xff"}\n' + bad * 5)
    expected = r"7 bad records.*\n.*chats.jsonl:2: not JSON.*\n.*:3: not JSON.*\n.*:4: neither"
    with pytest.raises(ValueError, match=expected) as error:
        encode_all(read_records(str(path), "train"), ChatTokenizer(tokenizer))
    lines = str(error.value).splitlines()
    assert [line.strip().partition(": ")[0] for line in lines[1:6]] == [f"{path}:{number}" for number in range(2, 7)]
    assert lines[6].strip() == "and 2 more"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset that the `datasets` package loads: tools and messages with differing keys, and a bad row."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"place": {"type": "string"}}}}
    rows = [
        {"messages": [*CHAT[1:2], {"role": "assistant", "content": "a", "reasoning_content": "so"}], "tools": TOOLS},
        {"messages": CHAT, "tools": [tool]},
        {"messages": CHAT[:1], "tools": None},
    ]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data", rows


def test_a_dataset_is_read_without_the_keys_of_other_rows(folder):
    path, rows = folder
    records = read_records(str(path), "train")
    assert [record.get("tools") for _, record in records] == [
        [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "clock")],
        rows[1]["tools"],
        None,
    ]
    assert [record["messages"] for _, record in records] == [row["messages"] for row in rows]


def test_bad_rows_of_a_dataset_and_unknown_splits_are_named(folder, tokenizer):
    path, _ = folder
    records = [(where, {"messages": record["messages"]}) for where, record in read_records(str(path), "train")]
    with pytest.raises(ValueError, match=r"1 bad records.*\n.*data\[train\], row 2: no message is the assistant's"):
        encode_all(records[1:], ChatTokenizer(tokenizer))
    with pytest.raises(ValueError, match=r"data.source '.*data', split 'other': .*other"):
        read_records(str(path), "other")


def test_without_the_package_datasets_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match='pip install "datasets>=4"'):
        read_records("some/name", "train")


def test_a_version_of_datasets_that_runs_a_datasets_own_code_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ValueError, match="datasets 3.6.0 may run a dataset's own code. pip install"):
        read_records("known", "test")


@pytest.mark.parametrize(
    "code",
    [
        "{{{{ cycler.__init__.__globals__['os'].mkdir('{path}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ messages.append(1) }}}}",
        "{{% generation %}}{{{{ cycler.__init__.__globals__['os'].mkdir('{path}') }}}}{{% endgeneration %}}",
    ],
)
def test_a_chat_template_runs_no_code(code, tokenizer, tmp_path):
    chat = ChatTokenizer(tokenizer, code.format(path=tmp_path / "ran") + MARKED)
    with pytest.raises(ValueError, match="the chat template does not render it: .*(unsafe|undefined|not safely)"):
        chat.encode({"messages": CHAT})
    assert not (tmp_path / "ran").exists()
