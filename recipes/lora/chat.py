"""Records to token ids and labels: chats and prompts with answers, through the model's own chat template.

A record is {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": ..., "completion": ...} with texts or
lists of messages, either with "tools": [...] for the chat template. The loss is on what the assistant says, the end of
its turn included.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Document:
    """One record as tokens.

    Attributes:
        input_ids: the tokens.
        labels: the same where there is a loss, `IGNORED` elsewhere.
        prompt: the text before the assistant's first turn.
        answer: the text of that turn.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str
    answer: str


def read_records(source: str, split: str) -> list[tuple[str, Any]]:
    """Each record of a source with where it is: a JSON Lines file, or a dataset that the `datasets` package knows.

    A file's records are its lines as they stand, which `parse` reads.

    Args:
        source: a path that ends in .jsonl or .json, or a dataset's name.
        split: of a dataset.

    Raises:
        ValueError: where there is no such source.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise ValueError(f"data.source {source!r}: there is no such file")
        with path.open("rb") as file:
            return [(f"{path}:{number}", line) for number, line in enumerate(file, start=1) if line.strip()]
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.source {source!r} is not a .jsonl file, and to load it as a dataset the package is missing: "
            'pip install "datasets>=4"'
        ) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ValueError(
            f"data.source {source!r}: datasets {datasets.__version__} may run a dataset's own code: "
            'pip install "datasets>=4"'
        )
    try:
        rows = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.source {source!r}, split {split!r}: {error}") from error
    return [(f"{source}[{split}], row {number}", row) for number, row in enumerate(rows)]


def parse(record: Any) -> tuple[list[dict[str, Any]] | tuple[str, str], list[Any] | None]:
    """A record's messages, or its prompt and completion where both are texts, and its tools.

    Args:
        record: an object, or the line of a file that holds one: JSON in UTF-8.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode())
        except ValueError as error:
            raise ValueError(f"not JSON in UTF-8: {error}") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is an object, not {type(record).__name__}")
    tools = record.get("tools") or None
    if not isinstance(tools, list | None):
        raise ValueError(f'"tools" is a list of objects, not {type(tools).__name__}')
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise ValueError("the completion is empty")
            return (prompt, completion), tools
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise ValueError("prompt and completion are two texts or two lists of messages")
        if not completion:
            raise ValueError("the completion is empty")
        messages = [*prompt, *completion]
    else:
        raise ValueError('neither "messages" nor "prompt" and "completion"')
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is a list with at least one message')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
        content, is_said = message.get("content"), message["role"] == ASSISTANT
        if is_said and message.get("tool_calls"):
            continue
        if not isinstance(content, str) or is_said and not content.strip():
            raise ValueError(f"message {number} needs a content, a text")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError("no message is the assistant's")
    return [dict(message) for message in messages], tools


class Encoder:
    """Makes documents of records.

    Args:
        tokenizer: the model's.
        chat_template: a Jinja template in place of the tokenizer's own.
        assistant_only_loss: whether what the assistant does not say has no loss.

    Raises:
        ValueError: where the tokenizer has no token to end an answer with.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, assistant_only_loss: bool = True
    ) -> None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token to end an answer with: set one in its configuration")
        own: Any = tokenizer.chat_template
        self._tokenizer = tokenizer
        self._end = str(tokenizer.eos_token)
        self._template = chat_template or (own.get("default") if isinstance(own, dict) else own)
        self._assistant_only_loss = assistant_only_loss

    def encode(self, record: Any) -> Document:
        """One record.

        Raises:
            ValueError: saying what is wrong with it.
        """
        said, tools = parse(record)
        if self._template is None:
            if tools or not isinstance(said, tuple):
                raise ValueError(
                    "the tokenizer has no chat template for messages and tools: set data.chat_template to a Jinja file"
                )
            return self._join([(said[0], False), (said[1], True)], ends=True)
        if tools and "tools" not in self._template:
            raise ValueError("the chat template writes no tools: set data.chat_template to one that does")
        if isinstance(said, tuple):
            said = [{"role": "user", "content": said[0]}, {"role": ASSISTANT, "content": said[1]}]
        try:
            if re.search(r"\{%-?\s*generation\s*-?%\}", self._template):  # Transformers' marks around what is said
                return self._marked(said, tools)
            return self._join(self._pieces(said, tools), ends=False)
        except (TemplateError, TypeError) as error:  # where the template adds None to a text, say
            raise ValueError(f"the chat template does not render it: {error}") from error

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, asks: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=asks
        )
        assert isinstance(text, str)
        return text

    def _pieces(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[tuple[str, bool]]:
        """The rendered chat in pieces, each with whether the assistant says it."""
        whole = self._render(messages, tools, asks=False)
        pieces, said = [], 0
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if self._end in str(message):
                raise ValueError(
                    f"message {turn} has {self._end} in it, where its end would be taken to be: take that out, or set "
                    "data.chat_template to one with {% generation %} marks"
                )
            before = self._render(messages[:turn], tools, asks=True)
            if turn and messages[turn - 1]["role"] == ASSISTANT or not whole.startswith(before) or len(before) < said:
                raise ValueError(
                    f"the chat template renders what comes before message {turn} differently without it, so the "
                    "assistant's words cannot be told: set data.chat_template to one with {% generation %} marks"
                )
            found = whole.find(self._end, len(before))
            if found < 0 and turn < len(messages) - 1:
                raise ValueError(
                    f"the chat template writes no {self._end} after message {turn}, so its end cannot be told: set "
                    "data.chat_template to one with {% generation %} marks"
                )
            stop = len(whole) if found < 0 else found + len(self._end)
            pieces += [(whole[said : len(before)], False), (whole[len(before) : stop], True)]
            said = stop
        return [*pieces, (whole[said:], False)]

    def _join(self, pieces: list[tuple[str, bool]], ends: bool) -> Document:
        """Tokenizes piece by piece, as inference sees a prompt and then writes an answer."""
        ids: list[int] = []
        labels: list[int] = []
        for text, is_said in pieces:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if is_said or not self._assistant_only_loss else [IGNORED] * len(tokens)
        if ends:
            ids.append(self._tokenizer.eos_token_id)
            labels.append(self._tokenizer.eos_token_id)
        first = next(number for number, (_, is_said) in enumerate(pieces) if is_said)
        prompt = "".join(text for text, _ in pieces[:first])
        return Document(ids, labels, prompt, pieces[first][0].removesuffix(self._end))

    def _marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Document:
        encoded: Any = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, said = list(encoded["input_ids"]), encoded["assistant_masks"]
        if not any(said):
            raise ValueError("the chat template's {% generation %} marks enclose nothing that the assistant says")
        labels = ids if not self._assistant_only_loss else [t if s else IGNORED for t, s in zip(ids, said, strict=True)]
        first = next(turn for turn, message in enumerate(messages) if message["role"] == ASSISTANT)
        return Document(
            ids,
            list(labels),
            self._render(messages[:first], tools, asks=True),
            str(messages[first].get("content") or ""),
        )


def encode_all(records: Iterable[tuple[str, Any]], encoder: Encoder) -> list[Document]:
    """Every record's document.

    Raises:
        ValueError: naming the bad records by where they are.
    """
    documents, problems = [], []
    for where, record in records:
        try:
            documents.append(encoder.encode(record))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "\n  ".join(problems[:SHOWN_PROBLEMS])
        raise ValueError(f"{len(problems)} bad records; mend or remove them:\n  {listed}{more}")
    return documents
