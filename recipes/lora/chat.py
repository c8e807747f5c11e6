"""Records to token ids and labels, through the model's chat template.

A record is {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": ..., "completion": ...} with two texts or
two lists of messages; either may have "tools": [...]. The loss is on what the assistant writes: on the tokens between
the chat template's {% generation %} marks, which templates/qwen3.jinja has for tokenizers whose template has none.
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
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_PROBLEMS = 5
TRAINING_TEMPLATE = Path(__file__).parent / "templates" / "qwen3.jinja"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = "set data.chat_template to a Jinja file with {% generation %} marks around what the assistant writes"


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
    """The records of a JSON Lines file, or of a dataset that the `datasets` package loads, each with where it stands.

    A file's lines are not read by `datasets`: it guesses types (texts that look like dates come back as dates), fills
    in the keys of other records, and does not say which line is bad.

    Args:
        source: a path that ends in .jsonl or .json, or a dataset's name or folder.
        split: of a dataset.

    Raises:
        ValueError: if there is no such source.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise ValueError(f"data.source {source!r}: there is no such file")
        lines = path.read_bytes().split(b"\n")
        return [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        import datasets

        if int(datasets.__version__.partition(".")[0]) < 4:
            raise ImportError(f"datasets {datasets.__version__} may run a dataset's own code")
    except ImportError as error:
        raise ValueError(f'data.source {source!r} is no .jsonl file: {error}. pip install "datasets>=4"') from error
    try:
        rows = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.source {source!r}, split {split!r}: {error}") from error
    return [(f"{source}[{split}], row {number}", _drop_none(row)) for number, row in enumerate(rows)]


def _drop_none(value: Any) -> Any:
    """Without the keys that a dataset's schema fills in because other rows have them."""
    if isinstance(value, dict):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value


def parse(record: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A record's messages and tools; a prompt and a completion that are texts become a user's and an assistant's turn.

    Args:
        record: an object, or the line of a file that holds one: JSON in UTF-8.

    Raises:
        ValueError: saying what is wrong with the record.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is an object, not {type(record).__name__}")
    tools = record.get("tools") or None
    if not isinstance(tools, list | None):
        raise ValueError(f'"tools" is a list of objects, not {type(tools).__name__}')
    messages, prompt, completion = (record.get(name) for name in ("messages", "prompt", "completion"))
    if messages is None:
        if prompt is None or completion is None:
            raise ValueError('neither "messages" nor "prompt" and "completion"')
        if not completion or isinstance(completion, str) and not completion.strip():
            raise ValueError("the completion is empty")
        if isinstance(prompt, str) and isinstance(completion, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tools
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise ValueError("prompt and completion are two texts or two lists of messages")
        messages = [*prompt, *completion]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is a list with at least one message')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
        content, is_answer = message.get("content"), message["role"] == "assistant"
        if is_answer and message.get("tool_calls"):
            continue
        if not isinstance(content, str) or is_answer and not content.strip():
            raise ValueError(f"message {number} needs a content, a text")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's")
    return [dict(message) for message in messages], tools


class ChatTokenizer:
    """Makes documents of records.

    Args:
        tokenizer: the model's.
        chat_template: a Jinja template in place of the tokenizer's own.
        assistant_only_loss: whether what the assistant does not write has no loss.

    Raises:
        ValueError: if the tokenizer cannot end an answer, or the assistant's tokens cannot be told with this template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, assistant_only_loss: bool = True
    ) -> None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token to end an answer with: set one in its configuration")
        template = chat_template
        if template is None and tokenizer.chat_template is not None:
            template = tokenizer.get_chat_template()  # the default one, where there are several
        self._tokenizer = tokenizer
        self._assistant_only_loss = assistant_only_loss
        self._template = template
        self._own: dict[str, Any] = {"chat_template": template}
        self._training = self._own
        if template is None or not assistant_only_loss:
            return
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for, so the assistant's "
                "tokens cannot be told from the others: set data.assistant_only_loss to false"
            )
        if not GENERATION.search(template):
            if "<|im_start|>" not in template:
                raise ValueError(f"the chat template has no {{% generation %}} marks and is not like Qwen3's: {REMEDY}")
            text = TRAINING_TEMPLATE.read_text(encoding="utf-8")
            self._training = {"chat_template": text, "thinks": "<think>" in template}

    def encode(self, record: Any) -> Document:
        """One record.

        Args:
            record: an object, or the line of a file that holds one: JSON in UTF-8.

        Raises:
            ValueError: saying what is wrong with the record.
        """
        if isinstance(record, bytes):
            try:
                record = json.loads(record.decode())
            except ValueError as error:
                raise ValueError(f"not JSON in UTF-8: {error}") from error
        messages, tools = parse(record)
        if self._template is None:
            if tools or "messages" in record or not isinstance(record["prompt"], str):
                raise ValueError(
                    "the tokenizer has no chat template for messages and tools: set data.chat_template to a Jinja file"
                )
            return self._join(record["prompt"], record["completion"])
        if tools and "tools" not in self._template:
            raise ValueError("the chat template writes no tools: set data.chat_template to one that does")
        try:
            return self._render(messages, tools)
        except (TemplateError, TypeError) as error:  # a template that adds None to a text, for example
            raise ValueError(f"the chat template does not render it: {error}") from error

    def _join(self, prompt: str, completion: str) -> Document:
        asked, answered = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)
        )
        answered = [*answered, self._tokenizer.eos_token_id]
        ignored = [IGNORED] * len(asked) if self._assistant_only_loss else asked
        return Document([*asked, *answered], [*ignored, *answered], prompt, completion)

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Document:
        def render(turns: list[dict[str, Any]], template: dict[str, Any], **options: Any) -> Any:
            return self._tokenizer.apply_chat_template(turns, tools=tools, **template, **options)

        if self._training is not self._own and (
            render(messages, self._training, tokenize=False) != render(messages, self._own, tokenize=False)
        ):
            raise ValueError(
                "the chat template has no {% generation %} marks and renders this record otherwise than "
                f"{TRAINING_TEMPLATE.name}, which has: {REMEDY}"
            )
        encoded = render(
            messages, self._training, return_dict=True, return_assistant_tokens_mask=self._assistant_only_loss
        )
        ids = labels = list(encoded["input_ids"])
        if self._assistant_only_loss:
            if not any(encoded["assistant_masks"]):
                raise ValueError("the chat template's {% generation %} marks enclose nothing that the assistant writes")
            labels = [
                token if written else IGNORED for token, written in zip(ids, encoded["assistant_masks"], strict=True)
            ]
        first = next(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        asked = render(messages[:first], self._own, tokenize=False, add_generation_prompt=True) if first else ""
        return Document(ids, labels, asked, str(messages[first].get("content") or ""))


def encode_all(records: Iterable[tuple[str, Any]], tokenizer: ChatTokenizer) -> list[Document]:
    """Every record's document.

    Raises:
        ValueError: naming the first bad records by where they stand.
    """
    documents, problems = [], []
    for where, record in records:
        try:
            documents.append(tokenizer.encode(record))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "\n  ".join(problems[:SHOWN_PROBLEMS])
        raise ValueError(f"{len(problems)} bad records; mend or remove them:\n  {listed}{more}")
    return documents
