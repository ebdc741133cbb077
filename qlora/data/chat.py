"""Renders a conversation with its chat template and finds the characters that the model must learn to write.

What to learn is an assistant's turn from its first character to its end-of-turn token, which must be learned or the
model never stops. The line break that many templates print after that token is not learned: generation has ended.

- A template with `{% generation %}` markers says itself where a turn starts and ends. Markers that leave out the
  end-of-turn token are widened by it; markers that turn out to mark nothing are ignored.
- Without markers, a turn is what comes to the text when the conversation goes on by it: rendered up to the turn with
  `add_generation_prompt`, and rendered with it. That is also exactly what the model sees and writes when it is used.
- Some templates render a turn differently once it is no longer the last (they strip the thoughts of earlier turns, or
  move the system prompt). Such an earlier turn is not what the model should write when its turn comes, so it is context
  and no target. A generation prompt that opens more than the text shows (a thought) is followed as far as the text
  goes. Either way the row is counted as unstable.
- What follows the last answer is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora.data.formats import Conversation, PlainText
from qlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class RenderedRow:
    """Text on its way to the tokenizer.

    Args:
        text: the whole row.
        target_spans: (first, past the last) characters to be learned, ascending and apart.
        place: where the record stands.
        add_special_tokens: whether the tokenizer adds its own (a template has already printed them).
        append_eos: whether the end-of-sequence token follows the text, as a target.
        is_unstable: whether the template shows a turn otherwise than it is generated, so that turns were left out of the
            targets or the start of one was guessed.
    """

    text: str
    target_spans: tuple[tuple[int, int], ...]
    place: str
    add_special_tokens: bool
    append_eos: bool
    is_unstable: bool = False

    def __post_init__(self) -> None:
        edge = 0
        for start, stop in self.target_spans:
            if not edge <= start <= stop <= len(self.text):
                raise ValueError(f"{self.place}: target spans {self.target_spans} in {len(self.text)} characters")
            edge = stop


class ChatRenderer:
    """Renders conversations and plain texts for one tokenizer. Rank-local.

    Args:
        tokenizer: whose template and special tokens are used.
        train_on: `all`, or the assistant's turns (`assistant` and `completion` mean the same).
        template_file: a Jinja file to use instead of the tokenizer's template.

    Raises:
        DataError: the template file cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: Literal["assistant", "completion", "all"],
        template_file: str | None = None,
    ) -> None:
        self.template = _read_template(template_file) if template_file is not None else _own_template(tokenizer)
        self._train_on_all = train_on == "all"
        self._has_markers = self.template is not None and _GENERATION_MARKER.search(self.template) is not None
        self._named_special_tokens = dict(tokenizer.special_tokens_map)
        special = set(tokenizer.all_special_tokens)
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special_tokens = sorted(special, key=len, reverse=True)
        self._eos_token = tokenizer.eos_token
        self._bos_token = tokenizer.bos_token

    def render(self, document: Conversation | PlainText) -> RenderedRow:
        """Render a document and find its targets.

        Raises:
            DataError: there is no chat template for a conversation, or the template refuses it.
        """
        if isinstance(document, PlainText):
            return self._plain_text(document)
        if not self._train_on_all:
            document = _up_to_last_answer(document)
        text, marked_spans = self._render(document, list(document.messages), with_markers=True)
        is_unstable = False
        if self._train_on_all:
            spans = [(0, len(text))]
        elif (chosen := self._answers_marked(document, text, marked_spans)) is not None:
            spans = chosen
        else:
            spans, is_unstable = self._answers_by_prefix(document, text)
        # A template that ends a turn without a token of its own leaves it to the end-of-sequence token to stop.
        ends_with_answer = document.messages[-1]["role"] == "assistant"
        append_eos = bool(spans) and ends_with_answer and not self._turn_ends(text, spans[-1][0])
        return RenderedRow(text, tuple(spans), document.place, False, append_eos, is_unstable)

    def _plain_text(self, document: PlainText) -> RenderedRow:
        start = 0 if self._train_on_all else document.answer_start
        has_bos = self._bos_token is not None and document.text.startswith(self._bos_token)
        return RenderedRow(document.text, ((start, len(document.text)),), document.place, not has_bos, True)

    def _answers_marked(
        self, document: Conversation, text: str, marked_spans: list[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        """The template's own spans, None where they cannot be used."""
        spans = _merged(marked_spans)
        if document.num_prompt_messages:
            answers = [message["role"] == "assistant" for message in document.messages]
            if len(spans) != sum(answers):
                return None
            spans = spans[sum(answers[: document.num_prompt_messages]) :]
        if not spans:
            return None
        # What follows the markers of the last turn ends turns; after an earlier one it might be the next turn's head.
        stop_tokens = {self._eos_token, self._next_special_token(text, spans[-1][1])[0]} - {"", None}
        widened = []
        for start, stop in spans:
            ends = self._turn_ends(text[:stop], start)
            following, past_following = self._next_special_token(text, stop)
            if ends:
                stop = ends[0]
            elif following in stop_tokens:
                stop = past_following
            widened.append((start, stop))
        return _merged(widened)

    def _answers_by_prefix(self, document: Conversation, text: str) -> tuple[list[tuple[int, int]], bool]:
        """Spans found by rendering up to each turn and with it, and whether any turn had to be left out or guessed."""
        messages = list(document.messages)
        spans: list[tuple[int, int]] = []
        is_unstable = False
        for index in range(document.num_prompt_messages, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            start, start_is_exact = self._turn_start(document, index, text)
            stop = None if start is None else self._turn_stop(document, index, text, start)
            if start is not None and stop is not None and start < stop:
                spans.append((start, stop))
            is_unstable = is_unstable or stop is None or not start_is_exact
        return spans, is_unstable

    def _turn_start(self, document: Conversation, index: int, text: str) -> tuple[int | None, bool]:
        before = list(document.messages[:index])
        prompt = self._try_render(document, before, add_generation_prompt=True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt), True
        # The generation prompt may open more than the history shows ("<think>"): the turn starts where they part.
        history = self._try_render(document, before)
        if prompt is None or history is None or not text.startswith(history):
            return None, False
        common = next((at for at, (one, other) in enumerate(zip(prompt, text, strict=False)) if one != other), 0)
        return (common if common > len(history) else None), False

    def _turn_stop(self, document: Conversation, index: int, text: str, start: int) -> int | None:
        is_last = index == len(document.messages) - 1
        as_last = text if is_last else self._try_render(document, list(document.messages[: index + 1]))
        if as_last is None:
            return None
        for stop in self._turn_ends(as_last, start) or [len(as_last)]:
            if text[:stop] == as_last[:stop]:
                return stop
        return None

    def _turn_ends(self, text: str, start: int) -> list[int]:
        """Where text[start:] may be said to end its turn, last first: past each special token of the run of special
        tokens and white space that it ends with."""
        ends = []
        stop = start + len(text[start:].rstrip())
        while token := next((token for token in self._special_tokens if text.endswith(token, start, stop)), None):
            ends.append(stop)
            stop -= len(token)
            stop = start + len(text[start:stop].rstrip())
        return ends

    def _next_special_token(self, text: str, position: int) -> tuple[str, int]:
        """The special token at a position or after white space there, and the position past it; "" where there is none."""
        position += len(text[position:]) - len(text[position:].lstrip())
        token = next((token for token in self._special_tokens if text.startswith(token, position)), "")
        return token, position + len(token)

    def _try_render(
        self, document: Conversation, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str | None:
        """Render part of a conversation; None where the template refuses it, as many do without a user's turn."""
        try:
            return self._render(document, messages, add_generation_prompt=add_generation_prompt)[0]
        except DataError:
            return None

    def _render(
        self,
        document: Conversation,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        with_markers: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        # The function under apply_chat_template: it says where the markers are in characters, before tokens blur them.
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.template is None:
            raise _no_template(document.place)
        use_markers = with_markers and self._has_markers and not self._train_on_all
        special_tokens: dict[str, Any] = self._named_special_tokens
        rendered: Any
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                tools=None if document.tools is None else list(document.tools),
                chat_template=self.template,
                return_assistant_tokens_mask=use_markers,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template is a program: whatever it raises is its answer to this conversation
            reason = f"{type(error).__name__}: {error}"
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                "the chat template refuses the conversation",
                place=document.place,
                found=f"{reason} (roles: {roles})",
                next_step="correct the row, or use another template (data.chat_template)",
            ) from error
        texts, marked_spans = rendered
        return texts[0], (marked_spans[0] if use_markers else [])


def _up_to_last_answer(document: Conversation) -> Conversation:
    """Leave out what follows the last answer: no target could see it, and templates treat a last turn differently."""
    roles = [message["role"] for message in document.messages]
    if "assistant" not in roles[document.num_prompt_messages :]:
        return document
    return replace(document, messages=document.messages[: len(roles) - roles[::-1].index("assistant")])


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans ascending and apart: templates nest markers, and mark nothing where a turn is empty."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template()


def _read_template(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the chat template cannot be read",
            place=f"data.chat_template: {file}",
            found=str(error),
            wanted="a Jinja file in UTF-8",
        ) from error


def _no_template(place: str) -> DataError:
    return DataError(
        "conversations need a chat template, and the tokenizer has none",
        place=place,
        found="no chat_template in the tokenizer's files",
        wanted="a template that says how turns are written",
        next_step=(
            "name a Jinja file (data.chat_template), take the template from the model's instruct version, "
            "or train on prompt and completion strings or on text, which need none"
        ),
    )
