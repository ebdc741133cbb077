"""Targets of rendered conversations, read back as text: what a person would mark with a pen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.data.chat import ChatRenderer
from qlora.data.formats import Conversation, PlainText
from qlora.data.token_rows import TokenRow, encode_rows
from qlora.errors import DataError

# Leading white space, emoji of several bytes, and code with runs of spaces, which some offsets leave out.
_FIRST = "The answer is 😀 é.\n\n    def f(x):\n        return x"
_SECOND = "It is the other answer"
_CONVERSATION = (("system", "S"), ("user", "Question?"), ("assistant", _FIRST), ("user", "And?"), ("assistant", _SECOND))


def _conversation(*turns: tuple[str, str], num_prompt_messages: int = 0) -> Conversation:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(messages, "rows.jsonl:1", num_prompt_messages)


def _encode(tokenizer: Any, document: Conversation | PlainText, train_on: Any = "assistant") -> TokenRow:
    row = encode_rows(tokenizer, [ChatRenderer(tokenizer, train_on).render(document)])[0]
    assert row is not None
    return row


def _targets(tokenizer: Any, row: TokenRow) -> list[str]:
    """The text of each run of targets."""
    runs: list[list[int]] = []
    before = False
    for token, is_target in zip(row.input_ids, row.is_target, strict=True):
        if is_target:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = is_target
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("chatml_eos_differs", "<|im_end|>"),
        ("chatml_marked", "<|im_end|>"),
        ("chatml_marked_eos_differs", "<|im_end|>"),
        ("chatml_marked_wide", "<|im_end|>"),
        ("chatml_marked_never", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
    ],
)
def test_every_answer_is_learned_up_to_its_end_of_turn_token(make_tokenizer, family: str, end: str) -> None:
    tokenizer = make_tokenizer(family)
    row = _encode(tokenizer, _conversation(*_CONVERSATION))
    assert _targets(tokenizer, row) == [_FIRST + end, _SECOND + end]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(
        list(_conversation(*_CONVERSATION).messages), tokenize=False
    )


def test_a_template_without_generation_prompt_learns_from_the_end_of_the_users_turn(make_tokenizer) -> None:
    tokenizer = make_tokenizer("mistral")
    row = _encode(tokenizer, _conversation(*_CONVERSATION[1:]))
    assert _targets(tokenizer, row) == [f" {_FIRST}</s>", f" {_SECOND}</s>"]


def test_a_token_that_only_ends_whole_texts_does_not_hide_earlier_answers(make_tokenizer) -> None:
    tokenizer = make_tokenizer("phi3")
    row = _encode(tokenizer, _conversation(*_CONVERSATION))
    assert _targets(tokenizer, row) == [f"{_FIRST}<|end|>", f"{_SECOND}<|end|>\n<|endoftext|>"]


def test_answers_that_lose_their_thoughts_later_are_context_and_the_last_is_learned(make_tokenizer) -> None:
    tokenizer = make_tokenizer("qwen3")
    turns = (("user", "Q"), ("assistant", "<think>\nold\n</think>\n\nA"), ("user", "And?"))
    renderer = ChatRenderer(tokenizer, "assistant")
    document = _conversation(*turns, ("assistant", "<think>\nnew\n</think>\n\nB"))
    assert _targets(tokenizer, _encode(tokenizer, document)) == ["<think>\nnew\n</think>\n\nB<|im_end|>"]
    rendered = renderer.render(document)
    assert rendered.is_unstable
    assert "old" not in rendered.text

    alone = _conversation(*turns[:2])
    assert _targets(tokenizer, _encode(tokenizer, alone)) == ["<think>\nold\n</think>\n\nA<|im_end|>"]
    assert not renderer.render(alone).is_unstable


def test_what_follows_the_last_answer_is_left_out_and_the_answer_is_learned_as_the_last(make_tokenizer) -> None:
    for family in ("qwen3", "chatml"):
        tokenizer = make_tokenizer(family)
        turns = (("user", "Q"), ("assistant", "<think>\nold\n</think>\n\nA"))
        row = _encode(tokenizer, _conversation(*turns, ("user", "And?")))
        assert row.input_ids == _encode(tokenizer, _conversation(*turns)).input_ids
        assert _targets(tokenizer, row) == ["<think>\nold\n</think>\n\nA<|im_end|>"]


def test_a_generation_prompt_that_opens_a_thought_does_not_hide_the_answer(make_tokenizer) -> None:
    tokenizer = make_tokenizer("deepseek_r1")
    document = _conversation(("user", "Q"), ("assistant", "<think>\nold\n</think>A"), ("user", "And?"), ("assistant", "B"))
    assert _targets(tokenizer, _encode(tokenizer, document)) == ["A</s>", "B</s>"]
    assert ChatRenderer(tokenizer, "assistant").render(document).is_unstable


def test_a_template_that_ends_turns_with_a_line_break_gets_an_end_to_learn(make_tokenizer) -> None:
    tokenizer = make_tokenizer("bare")
    row = _encode(tokenizer, _conversation(*_CONVERSATION))
    assert _targets(tokenizer, row) == [f" {_FIRST}\n", f" {_SECOND}\n</s>"]


@pytest.mark.parametrize("family", ["chatml", "chatml_marked", "chatml_marked_wide", "llama3"])
def test_an_answer_in_the_prompt_is_context(make_tokenizer, family: str) -> None:
    tokenizer = make_tokenizer(family)
    row = _encode(tokenizer, _conversation(*_CONVERSATION, num_prompt_messages=4))
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    assert _targets(tokenizer, row) == [_SECOND + end]


def test_markers_that_leave_answers_out_do_not_shift_what_is_prompt(make_tokenizer) -> None:
    tokenizer = make_tokenizer("chatml_marked_last")
    answers = [_FIRST + "<|im_end|>", _SECOND + "<|im_end|>"]
    assert _targets(tokenizer, _encode(tokenizer, _conversation(*_CONVERSATION))) == answers[1:]
    row = _encode(tokenizer, _conversation(*_CONVERSATION, num_prompt_messages=2))
    assert _targets(tokenizer, row) == answers
    row = _encode(tokenizer, _conversation(*_CONVERSATION, num_prompt_messages=4))
    assert _targets(tokenizer, row) == answers[1:]


def test_nested_markers_are_one(make_tokenizer) -> None:
    tokenizer = make_tokenizer("chatml_marked_nested")
    row = _encode(tokenizer, _conversation(*_CONVERSATION))
    assert _targets(tokenizer, row) == [_FIRST + "<|im_end|>", _SECOND + "<|im_end|>"]


def test_a_conversation_without_an_answer_has_no_target(make_tokenizer) -> None:
    row = _encode(make_tokenizer("chatml"), _conversation(("user", "Q")))
    assert not row.has_target
    row = _encode(make_tokenizer("chatml"), _conversation(*_CONVERSATION, num_prompt_messages=5))
    assert not row.has_target


def test_an_empty_answer_is_learned_as_its_end(make_tokenizer) -> None:
    for family in ("chatml", "chatml_marked_wide"):
        tokenizer = make_tokenizer(family)
        row = _encode(tokenizer, _conversation(("user", "Q"), ("assistant", "")))
        assert _targets(tokenizer, row) == ["<|im_end|>"]


def test_the_end_of_turn_stays_a_target_where_it_is_also_padding(make_tokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    row = _encode(tokenizer, _conversation(("user", "Q"), ("assistant", "A")))
    learned = [token for token, is_target in zip(row.input_ids, row.is_target, strict=True) if is_target]
    assert learned[-1] == tokenizer.pad_token_id


def test_training_on_all_learns_every_token_but_the_first(make_tokenizer) -> None:
    for document in (_conversation(*_CONVERSATION), PlainText("a text", "here", answer_start=3)):
        row = _encode(make_tokenizer("chatml_marked"), document, "all")
        assert row.is_target == [False] + [True] * (len(row.input_ids) - 1)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_the_beginning_of_text_is_never_doubled(make_tokenizer, family: str) -> None:
    tokenizer = make_tokenizer(family, adds_bos=True)
    for document in (
        _conversation(("user", "Q"), ("assistant", "A")),
        PlainText("a text", "here"),
        PlainText(f"{tokenizer.bos_token}a text", "here"),
    ):
        row = _encode(tokenizer, document)
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_plain_text_is_learned_with_its_end(make_tokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    row = _encode(tokenizer, PlainText("  a text", "here"))
    assert tokenizer.decode(row.input_ids) == "<s>  a text</s>"
    assert _targets(tokenizer, row) == ["  a text</s>"]


def test_an_end_that_the_tokenizer_adds_by_itself_is_learned_once(make_tokenizer) -> None:
    tokenizer = make_tokenizer(None, adds_eos=True)
    row = _encode(tokenizer, PlainText("a text", "here"))
    assert tokenizer.decode(row.input_ids) == "a text</s>"
    assert row.is_target[-1]


def test_a_plain_completion_is_learned_from_the_prompts_end(make_tokenizer) -> None:
    tokenizer = make_tokenizer(None)
    row = _encode(tokenizer, PlainText("hello world", "here", answer_start=5))
    assert _targets(tokenizer, row) == [" world</s>"]


def test_tools_reach_the_template(make_tokenizer, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = ({"role": "user", "content": "Q"},)
    renderer = ChatRenderer(make_tokenizer(), "all", str(template))
    assert renderer.render(Conversation(messages, "here", tools=({"name": "hammer"},))).text == "hammerQ"


def test_no_chat_template_lists_the_ways_out(make_tokenizer) -> None:
    with pytest.raises(DataError, match="the tokenizer has none") as caught:
        ChatRenderer(make_tokenizer(None), "assistant").render(_conversation(("user", "Q"), ("assistant", "A")))
    for way in ("data.chat_template", "instruct", "prompt and completion", "text"):
        assert way in str(caught.value.next_step)
    assert caught.value.place == "rows.jsonl:1"


def test_a_conversation_the_template_refuses_is_named(make_tokenizer) -> None:
    with pytest.raises(DataError, match="refuses the conversation") as caught:
        ChatRenderer(make_tokenizer("mistral"), "assistant").render(_conversation(("assistant", "A"), ("user", "Q")))
    assert caught.value.place == "rows.jsonl:1"
    assert "roles must alternate" in str(caught.value.found)


def test_a_template_file_that_cannot_be_read_is_named(make_tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        ChatRenderer(make_tokenizer(), "assistant", str(tmp_path / "none.jinja"))
    assert "none.jinja" in str(caught.value.place)


def test_masks_agree_with_transformers_where_its_markers_work(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("chatml_marked")
    document = _conversation(("user", "Q"), ("assistant", "Plain words here"), ("user", "R"), ("assistant", "More"))
    theirs = tokenizer.apply_chat_template(
        list(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = _encode(tokenizer, document)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    length = len(row.input_ids)
    assert row.input_ids == theirs["input_ids"][:length]
    # The markers of this template leave out the end of the turn, which we add.
    ours = [int(flag and token != end) for flag, token in zip(row.is_target, row.input_ids, strict=True)]
    assert ours == theirs["assistant_masks"][:length]
    assert sum(row.is_target) == sum(ours) + 2
