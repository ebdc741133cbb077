"""Turns a record of any known form into a conversation or a plain text.

- `messages`: `messages` is a list of `{"role", "content"}`; `conversations` with `from` and `value` (ShareGPT) is read
  too. `tools` may stand beside it.
- `prompt_completion`: `prompt` and `completion`, two strings (a user's and an assistant's turn) or two lists of messages.
  The prompt's own turns are never targets.
- `alpaca`: `instruction`, a blank line and `input`, if there is one, are the user's turn; `output` is the assistant's.
- `text`: plain text, learned from its first to its last token.

Where a tokenizer has no chat template, `prompt_completion` strings are joined as they are, and `alpaca` uses the prompt
that the Stanford Alpaca data set was published with: a base model that never saw a chat needs none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qlora.data.records import Record
from qlora.errors import DataError

FormatName = Literal["messages", "prompt_completion", "alpaca", "text"]

EXPECTED: dict[str, str] = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "prompt_completion": '{"prompt": "...", "completion": "..."}, both strings or both lists of messages',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}, input may be left out',
    "text": '{"text": "..."}',
}

# https://github.com/tatsu-lab/stanford_alpaca#data-release
_ALPACA_INTRODUCTION = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered by a chat template.

    Args:
        messages: each with a `role` and a `content` (or `tool_calls`), at least one.
        place: where the record stands.
        num_prompt_messages: how many messages at the start are prompt, whose turns are never targets.
        tools: JSON schemas of tools, for templates that list them.
    """

    messages: tuple[dict[str, Any], ...]
    place: str
    num_prompt_messages: int = 0
    tools: tuple[dict[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        if not self.messages:
            raise DataError("a conversation without messages", place=self.place, wanted=EXPECTED["messages"])
        for index, message in enumerate(self.messages):
            _check_message(message, f"message {index}", self.place)
        if not 0 <= self.num_prompt_messages <= len(self.messages):
            raise ValueError(f"{self.num_prompt_messages} prompt messages of {len(self.messages)}")


@dataclass(frozen=True)
class PlainText:
    """Text that no chat template touches.

    Args:
        text: the whole text.
        place: where the record stands.
        answer_start: the character from which on tokens are targets, unless all of them are.
    """

    text: str
    place: str
    answer_start: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.answer_start <= len(self.text):
            raise ValueError(f"answer at character {self.answer_start} of {len(self.text)}")


def detect_format(record: Record) -> FormatName:
    """Tell the format from a record's fields.

    Raises:
        DataError: no known format has such fields.
    """
    fields = record.fields
    if "messages" in fields or "conversations" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "text" in fields:
        return "text"
    raise DataError(
        "the row is of no known format",
        place=record.place,
        found="fields " + (", ".join(fields) or "none"),
        wanted="one of: " + "; ".join(EXPECTED.values()),
        next_step="rename the fields, or name the format (data.format)",
    )


def read_documents(
    records: Iterable[Record], data_format: FormatName | Literal["auto"], *, has_chat_template: bool
) -> Iterator[Conversation | PlainText]:
    """Yield each record as a conversation or plain text. Rank-local.

    Args:
        records: all of one format.
        data_format: the format, or auto to take the first record's.
        has_chat_template: whether prompts can be rendered as turns of a chat.

    Raises:
        DataError: a record that lacks a field or holds another type than the format wants, with its place.
    """
    for record in records:
        if data_format == "auto":
            data_format = detect_format(record)
        yield _document(record, data_format, has_chat_template)


def _document(record: Record, data_format: FormatName, has_chat_template: bool) -> Conversation | PlainText:
    if data_format == "messages":
        name = "conversations" if "conversations" in record.fields and "messages" not in record.fields else "messages"
        return Conversation(_messages(record, name, data_format), record.place, tools=_tools(record))
    if data_format == "prompt_completion":
        return _prompt_completion(record, has_chat_template)
    if data_format == "alpaca":
        return _alpaca(record, has_chat_template)
    return PlainText(_string(record, "text", data_format), record.place)


def _prompt_completion(record: Record, has_chat_template: bool) -> Conversation | PlainText:
    if isinstance(record.fields.get("prompt"), list):
        prompt = _messages(record, "prompt", "prompt_completion")
        completion = _messages(record, "completion", "prompt_completion")
        return Conversation(prompt + completion, record.place, num_prompt_messages=len(prompt), tools=_tools(record))
    before, after = (_string(record, name, "prompt_completion") for name in ("prompt", "completion"))
    if has_chat_template:
        return _turns(before, after, record.place)
    return PlainText(before + after, record.place, answer_start=len(before))


def _alpaca(record: Record, has_chat_template: bool) -> Conversation | PlainText:
    instruction, output = (_string(record, name, "alpaca") for name in ("instruction", "output"))
    context = _string(record, "input", "alpaca") if record.fields.get("input") is not None else ""
    if has_chat_template:
        return _turns(f"{instruction}\n\n{context}" if context else instruction, output, record.place)
    with_context = ", paired with an input that provides further context" if context else ""
    prompt = f"{_ALPACA_INTRODUCTION.format(with_context)}\n\n### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{context}\n\n### Response:" if context else "### Response:"
    return PlainText(prompt + output, record.place, answer_start=len(prompt))


def _turns(user: str, assistant: str, place: str) -> Conversation:
    messages = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return Conversation(messages, place, num_prompt_messages=1)


def _string(record: Record, name: str, data_format: FormatName) -> str:
    value = _field(record, name, data_format)
    if not isinstance(value, str):
        raise _wrong_type(f"`{name}`", value, "a string", data_format, record.place)
    return value


def _messages(record: Record, name: str, data_format: FormatName) -> tuple[dict[str, Any], ...]:
    value = _field(record, name, data_format)
    if not isinstance(value, list):
        raise _wrong_type(f"`{name}`", value, "a list of messages", data_format, record.place)
    return tuple(_message(message, f"{name}[{index}]", record.place) for index, message in enumerate(value))


def _message(message: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong_type(f"`{name}`", message, "an object", "messages", place)
    # Tables spell an absent key as null, and templates would print it as "None".
    message = {key: value for key, value in message.items() if value is not None}
    if "from" in message and "role" not in message:
        role = _SHAREGPT_ROLES.get(str(message["from"]))
        if role is None:
            wanted = ", ".join(_SHAREGPT_ROLES)
            raise DataError(f"`{name}` is from an unknown speaker", place=place, found=message["from"], wanted=wanted)
        message = {"role": role, "content": message.get("value")}
    _check_message(message, f"`{name}`", place)
    if isinstance(message.get("content"), list):
        # Most templates of text models print what they get: a list would be learned as Python writes it.
        message = {**message, "content": "".join(part["text"] for part in message["content"])}
    return message


def _check_message(message: dict[str, Any], name: str, place: str) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _wrong_type(f"the role of {name}", role, "a string", "messages", place)
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                found = part.get("type") if isinstance(part, dict) else type(part).__name__
                wanted = 'text alone: {"type": "text", "text": "..."}'
                raise DataError(
                    f"the content of {name} has a part that is not text", place=place, found=found, wanted=wanted
                )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise _wrong_type(f"the content of {name}", content, "a string", "messages", place)


def _tools(record: Record) -> tuple[dict[str, Any], ...] | None:
    tools = record.fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError("`tools` is a string that is not JSON", place=record.place, found=str(error)) from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _wrong_type("`tools`", tools, "a list of JSON schemas", "messages", record.place)
    return tuple(tools)


def _field(record: Record, name: str, data_format: FormatName) -> Any:
    if name not in record.fields:
        raise DataError(
            f"the row has no field `{name}`",
            place=record.place,
            found="fields " + (", ".join(record.fields) or "none"),
            wanted=EXPECTED[data_format],
            next_step="correct the row; all rows of one list of sources are of one format",
        )
    return record.fields[name]


def _wrong_type(what: str, value: Any, wanted: str, data_format: FormatName, place: str) -> DataError:
    found = "nothing" if value is None else f"{type(value).__name__}: {str(value)[:60]}"
    return DataError(f"{what} is not {wanted}", place=place, found=found, wanted=EXPECTED[data_format])
