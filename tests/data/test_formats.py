"""Each format's rows become the documents one would write by hand; rows of no or another format are refused."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.data.formats import Conversation, PlainText, detect_format, read_documents
from qlora.data.records import Record
from qlora.errors import DataError

_TURNS = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})


def _read(*rows: dict[str, Any], data_format: Any = "auto", has_chat_template: bool = True) -> list[Any]:
    records = [Record(row, f"rows.jsonl:{number}") for number, row in enumerate(rows, start=1)]
    return list(read_documents(records, data_format, has_chat_template=has_chat_template))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "messages"),
        ({"prompt": "", "prompt_id": "", "messages": []}, "messages"),
        ({"prompt": "", "completion": ""}, "prompt_completion"),
        ({"instruction": "", "input": "", "output": "", "text": ""}, "alpaca"),
        ({"text": "", "meta": {}}, "text"),
    ],
)
def test_the_format_is_told_from_the_fields(fields: dict[str, Any], expected: str) -> None:
    assert detect_format(Record(fields, "here")) == expected


def test_unknown_fields_are_answered_with_all_forms() -> None:
    with pytest.raises(DataError, match="no known format") as caught:
        _read({"question": "Q", "answer": "A"})
    assert caught.value.place == "rows.jsonl:1"
    assert "fields question, answer" in str(caught.value)
    for name in ("messages", "completion", "instruction", "text"):
        assert name in str(caught.value.wanted)


def test_messages_stay_as_they_are_without_nulls() -> None:
    messages = [{"role": "user", "content": "Q", "name": None}, {"role": "assistant", "content": "A", "tool_calls": None}]
    assert _read({"messages": messages}) == [Conversation(_TURNS, "rows.jsonl:1")]


def test_sharegpt_speakers_become_roles() -> None:
    rows = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert _read(rows) == [Conversation(_TURNS, "rows.jsonl:1")]


def test_tools_are_kept_and_may_be_a_string() -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    for given in (list(tools), '[{"type": "function", "function": {"name": "f"}}]'):
        assert _read({"messages": list(_TURNS), "tools": given})[0].tools == tools
    with pytest.raises(DataError, match="`tools` is a string that is not JSON"):
        _read({"messages": list(_TURNS), "tools": "{"})


def test_prompt_and_completion_are_turns_with_a_template_and_plain_text_without() -> None:
    row = {"prompt": "Q", "completion": "A"}
    assert _read(row) == [Conversation(_TURNS, "rows.jsonl:1", num_prompt_messages=1)]
    assert _read(row, has_chat_template=False) == [PlainText("QA", "rows.jsonl:1", answer_start=1)]


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    assert _read({"prompt": [_TURNS[0]], "completion": [_TURNS[1]]}) == [
        Conversation(_TURNS, "rows.jsonl:1", num_prompt_messages=1)
    ]
    with pytest.raises(DataError, match="`completion` is not a list of messages"):
        _read({"prompt": [_TURNS[0]], "completion": "A"})


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    with_input, without = _read(
        {"instruction": "I", "input": "X", "output": "O"}, {"instruction": "I", "input": "", "output": "O"}
    )
    assert with_input.messages[0] == {"role": "user", "content": "I\n\nX"}
    assert without.messages == ({"role": "user", "content": "I"}, {"role": "assistant", "content": "O"})


def test_alpaca_without_a_template_uses_the_published_prompts() -> None:
    with_input, without = _read(
        {"instruction": "I", "input": "X", "output": "O"}, {"instruction": "I", "output": "O"}, has_chat_template=False
    )
    # Copied from github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT.
    published_with = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nI\n\n### Input:\nX\n\n### Response:"
    )
    published_without = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nI\n\n### Response:"
    )
    assert with_input.text[: with_input.answer_start] == published_with
    assert without.text[: without.answer_start] == published_without
    assert with_input.text[with_input.answer_start :] == without.text[without.answer_start :] == "O"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "no field `messages`"),
        ({"messages": "Q"}, "`messages` is not a list of messages"),
        ({"messages": []}, "without messages"),
        ({"messages": ["Q"]}, r"`messages\[0\]` is not an object"),
        ({"messages": [{"content": "Q"}]}, r"the role of `messages\[0\]` is not a string"),
        ({"messages": [_TURNS[0], {"role": "assistant"}]}, r"the content of `messages\[1\]` is not a string"),
        ({"messages": [{"role": "user", "content": 3}]}, r"the content of `messages\[0\]` is not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is not text"),
        ({"conversations": [{"from": "ghost", "value": "Q"}]}, "unknown speaker"),
    ],
)
def test_a_row_that_differs_from_the_first_is_named_with_the_expected_form(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        _read({"messages": list(_TURNS)}, row)
    assert caught.value.place == "rows.jsonl:2"
    assert caught.value.wanted is not None


@pytest.mark.parametrize(
    ("row", "data_format", "reason"),
    [
        ({"prompt": "Q"}, "prompt_completion", "no field `completion`"),
        ({"prompt": "Q", "completion": None}, "prompt_completion", "`completion` is not a string"),
        ({"instruction": "I", "output": ["O"]}, "alpaca", "`output` is not a string"),
        ({"messages": []}, "text", "no field `text`"),
        ({"text": 5}, "text", "`text` is not a string"),
    ],
)
def test_a_named_format_is_held(row: dict[str, Any], data_format: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        _read(row, data_format=data_format)


def test_a_message_may_call_tools_instead_of_saying_something() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert _read({"messages": [_TURNS[0], message]})[0].messages[1] == message


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    record = Record({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "hi"}]}, "rows:1")
    (document,) = read_documents([record], "messages", has_chat_template=True)
    assert isinstance(document, Conversation)
    assert [message["content"] for message in document.messages] == ["hello", "hi"]
