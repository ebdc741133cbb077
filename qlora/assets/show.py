"""What the quickstart's training did, in numbers: the same questions to the base and to the base with its adapter.

The idea: a loss curve convinces nobody. So the two answer greedily, and answers are compared with the right ones letter
by letter. What was trained on shows that training works; what was held out shows how far it carries; a wrong answer is
shown beside the right ones, because a model of this size recalls and does not understand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qlora
from qlora.assets.quickstart import EVAL_FILE, TRAIN_FILE
from qlora.errors import AdapterError, DataError
from qlora.infer.generate import generate_texts

NUM_SAMPLED = 80
NEAR_RATIO = 0.6
MAX_NEW_TOKENS = 44  # longer than any answer `data` writes
BATCH_SIZE = 40
IGNORED = -100
_HONESTY = """\
This is recall, not understanding. The base read these facts while it was made, but never as questions. The adapter
taught it to answer, and the training questions by heart; no held-out question has the answer of a training question.
A wrong answer sounds as sure as a right one.
"""

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Score:
    """How one model did on one set of questions."""

    answers: tuple[str, ...]
    num_exact: int
    num_near: int
    loss: float

    def __post_init__(self) -> None:
        if self.num_exact + self.num_near > len(self.answers):
            raise ValueError(f"{self.num_exact} exact and {self.num_near} near answers of {len(self.answers)}")


def show_run(run_dir: Path, data_dir: Path) -> None:
    """Print what the adapter in RUN_DIR/adapter changed, on questions from DATA_DIR.

    Raises:
        AdapterError: the run has no adapter.
        DataError: metrics or questions are missing or unreadable.
    """
    adapter = run_dir / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise AdapterError("no adapter", place=str(adapter), next_step="let the training run to its end first")
    first_loss, last_loss, num_steps = training_losses(run_dir / "metrics.jsonl")
    train = sampled(read_conversations(data_dir / TRAIN_FILE), NUM_SAMPLED)
    held_out = read_conversations(data_dir / EVAL_FILE)

    with _one_thread():
        model, tokenizer = qlora.load_base("builtin:tiny")
        qlora.load_adapter(model, adapter)
        with qlora.disable_adapter(model):
            before = [score(model, tokenizer, conversations) for conversations in (train, held_out)]
        after = [score(model, tokenizer, conversations) for conversations in (train, held_out)]

    console = Console(highlight=False)
    console.print(f"Training loss: {first_loss:.2f} at the first step, {last_loss:.2f} at the last of {num_steps}.\n")
    console.print(_example("A question from training", train, before[0], after[0], want_exact=True))
    console.print(_table(before, after))
    console.print(f"near: not exact, but difflib's ratio is {NEAR_RATIO} or more; loss: nats per answer token\n")
    console.print(_example("A held-out question answered wrong", held_out, before[1], after[1], want_exact=False))
    console.print(_HONESTY.replace("\n", " "), end="\n\n")
    console.print(f"The adapter: {adapter}", soft_wrap=True)


def training_losses(path: Path) -> tuple[float, float, int]:
    """Return the loss of the first and of the last training step, and the last step's number, from metrics.jsonl.

    After a resume a step may have several rows; the last one counts.
    """
    losses = {row["step"]: row["loss"] for row in _read_rows(path) if "step" in row and "loss" in row}
    if not losses:
        raise DataError("no training rows", place=str(path), wanted="rows with the keys step and loss")
    return losses[min(losses)], losses[max(losses)], max(losses)


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file that `data` wrote."""
    rows = _read_rows(path)
    if not all("messages" in row for row in rows):
        raise DataError("a row has no messages", place=str(path), next_step="write the file again: quickstart data OUT_DIR")
    return [row["messages"] for row in rows]


def sampled(conversations: list[Conversation], count: int) -> list[Conversation]:
    """Return `count` conversations spread evenly over the list, or all where there are fewer."""
    if len(conversations) <= count:
        return conversations
    return [conversations[i * len(conversations) // count] for i in range(count)]


def score(model: Any, tokenizer: Any, conversations: list[Conversation]) -> Score:
    """Answer every conversation's question greedily and compare with its answer; also the answers' mean loss."""
    questions = [conversation[:-1] for conversation in conversations]
    answers = [text.strip() for text in generate_texts(model, tokenizer, questions, MAX_NEW_TOKENS, batch_size=BATCH_SIZE)]
    right = [conversation[-1]["content"] for conversation in conversations]
    exact = [answer == wanted for answer, wanted in zip(answers, right, strict=True)]
    near = [not same and likeness(*texts) >= NEAR_RATIO for same, *texts in zip(exact, answers, right, strict=True)]
    return Score(tuple(answers), sum(exact), sum(near), answer_loss(model, tokenizer, conversations))


def likeness(answer: str, wanted: str) -> float:
    """Return difflib's ratio of two texts: 1 for the same, 0 for nothing in common."""
    return SequenceMatcher(None, answer, wanted, autojunk=False).ratio()


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, conversations: list[Conversation]) -> float:
    """Return the mean cross-entropy, in nats, of the assistants' tokens, the end of the turn included."""
    loss_sum, num_targets = 0.0, 0
    for start in range(0, len(conversations), BATCH_SIZE):
        rendered = tokenizer.apply_chat_template(
            conversations[start : start + BATCH_SIZE], return_dict=True, return_assistant_tokens_mask=True
        )
        longest = max(map(len, rendered["input_ids"]))
        ids_BT = torch.full((len(rendered["input_ids"]), longest), tokenizer.pad_token_id)
        targets_BT = torch.full_like(ids_BT, IGNORED)
        for row, (ids, marks) in enumerate(zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)):
            ids_T = torch.tensor(ids)
            ids_BT[row, : len(ids)] = ids_T
            targets_BT[row, : len(ids)] = ids_T.masked_fill(torch.tensor(marks) == 0, IGNORED)
        # Padding stands to the right of every target, so causal attention needs no mask.
        ids_BT, targets_BT = ids_BT.to(model.device), targets_BT.to(model.device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss_sum += loss.item()
        num_targets += int((targets_BT[:, 1:] != IGNORED).sum())
    return loss_sum / num_targets


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: layers this small gain nothing from more, and on a machine that is busy with
    other work the threads' waiting for each other was seen to cost twenty times the work itself."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError("file not found", place=str(path), next_step="run the quickstart's earlier steps first") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", place=f"{path}:{number}", found=line[:60]) from error
    return rows


def _table(before: list[Score], after: list[Score]) -> Table:
    table = Table()
    table.add_column("questions")
    for column in ("", "exact", "near", "loss"):
        table.add_column(column, justify="right" if column else "left")
    for label, untrained, trained in zip(("from training", "held out"), before, after, strict=True):
        total = len(trained.answers)
        for name, result in (("before", untrained), ("after", trained)):
            table.add_row(
                label if name == "before" else "",
                name,
                f"{result.num_exact} of {total}",
                f"{result.num_near} of {total}",
                f"{result.loss:.2f}",
                end_section=name == "after",
            )
    return table


def _example(title: str, conversations: list[Conversation], before: Score, after: Score, *, want_exact: bool) -> Text:
    """Return the first question whose trained answer is exact, or the first whose answer is not."""
    for conversation, untrained, trained in zip(conversations, before.answers, after.answers, strict=True):
        wanted = conversation[-1]["content"]
        if (trained == wanted) == want_exact:
            return Text.assemble(
                (f"{title}: ", "bold"),
                f"{conversation[0]['content']}\n",
                *(f"  before: {_one_line(untrained)}\n", f"  after:  {_one_line(trained)}\n"),
                "" if want_exact else f"  right:  {wanted}\n",
            )
    return Text(f"{title}: none.\n")


def _one_line(text: str, max_chars: int = 66) -> str:
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."
