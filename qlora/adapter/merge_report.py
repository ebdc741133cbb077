"""What merging cost: base and adapter as they were trained, beside the merged model, on a text.

Both are loaded as anybody would load them, each in its own dtype, the merged one from its folder. So the numbers hold what
the weights lost and what arithmetic of another order rounds otherwise, which in bfloat16 is no little.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from qlora.adapter.load import load_adapter
from qlora.adapter.new_tokens import recorded_tokens
from qlora.adapter.read import TEMPLATE_NAME, open_adapter
from qlora.config.schema import DataConfig, QuantizationConfig
from qlora.data.prepare import prepare
from qlora.data.tokenizer import load_tokenizer
from qlora.errors import DataError
from qlora.files import write_file
from qlora.quant.load import load_model
from qlora.quant.source import BaseSource, resolve_base

BUILTIN = "builtin"
REPORT_NAME = "merge_report.json"
# Logits of all tokens are kept from one model to the next: of 128,000 words half a gigabyte.
MOST_TOKENS, ROW_TOKENS = 1024, 256
_POSITIONS_AT_ONCE = 64

_BUILTIN_TEXT = (
    "The library opens at nine. Before that the reading rooms are aired, the lamps are checked, and whatever was left on "
    "the tables goes back to its shelf. A visitor who knows the number of a book can fetch it without asking; whoever does "
    "not know it looks the title up in the catalogue, which lists authors, subjects and years.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n",
    "Question: How many minutes are there in a day? Answer: A day has 24 hours of 60 minutes each, which makes 1,440.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface. At 3,000 metres it is "
    "about 90 degrees, so eggs and potatoes take longer to cook there than they do at the sea.",
)


@dataclass(frozen=True)
class Text:
    """What models are compared on.

    Attributes:
        name: as it was given.
        rows: token ids (T,) each, of two tokens or more.
    """

    name: str
    rows: tuple[Tensor, ...] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True)
class Difference:
    """How far a merged model is from base and adapter.

    Attributes:
        dtype: the merged model computes in.
        mean_kl: of the merged model's next-token distribution from the unmerged one's, nats a token.
        largest_logit_difference: over all tokens and words.
        same_token: share of places where both find the same next token most likely.
        loss, loss_unmerged: cross entropy of the text's own next token, nats a token.
    """

    dtype: str
    mean_kl: float
    largest_logit_difference: float
    same_token: float
    loss: float
    loss_unmerged: float


def read_text(name: str, base: Path, adapter: Path) -> Text:
    """Tokenize what models are to be compared on, `MOST_TOKENS` at most. Rank-local.

    Args:
        name: a file as `data.eval` takes them, or BUILTIN.
        base: folder with the tokenizer.
        adapter: folder with the chat template, where it brings one.

    Raises:
        DataError: nothing is there, it cannot be read, or it is too short.
        BaseModelError: the base has no tokenizer.
    """
    tokenizer: Any = load_tokenizer(str(base))
    if name == BUILTIN:
        found = [tokenizer(text)["input_ids"][:ROW_TOKENS] for text in _BUILTIN_TEXT]
    else:
        template = adapter / TEMPLATE_NAME
        with TemporaryDirectory() as cache:
            config = DataConfig(
                train_on="all",
                max_length=ROW_TOKENS,
                over_long="split",
                cache_dir=cache,
                chat_template=str(template) if template.is_file() else None,
            )
            stored = prepare([name], tokenizer, config)
            found = [stored.row(index)[0].tolist() for index in range(min(len(stored), MOST_TOKENS))]
    rows: list[Tensor] = []
    left = MOST_TOKENS
    for ids in found:
        row = torch.tensor(ids[:left])
        if len(row) >= 2:
            rows.append(row)
            left -= len(row)
    if not rows:
        raise DataError("there is nothing to compare models on", place=name, wanted="a text of two tokens or more")
    return Text(name, tuple(rows))


def run_unmerged(
    source: BaseSource, quantization: QuantizationConfig | None, dtype: torch.dtype, adapter: Path, text: Text
) -> list[Tensor]:
    """Logits (T, V) of each row, on the CPU, of base and adapter as they were trained. Raises QloraError."""
    found = open_adapter(adapter)
    recorded = found.initial.read() if found.initial is not None else None
    new = recorded_tokens(found)
    num_rows = new.num_rows if new is not None else None
    model = load_model(source, dtype=dtype, quantization=quantization, initial=recorded, num_rows=num_rows)
    load_adapter(model, adapter)
    return _run(model, text)


def compare(reference: list[Tensor], folder: Path, dtype: torch.dtype, text: Text) -> Difference:
    """How far the merged model in a folder is from the unmerged logits. Raises BaseModelError."""
    merged = _run(load_model(resolve_base(str(folder)), dtype=dtype), text)
    kl = loss = loss_unmerged = torch.zeros((), dtype=torch.float64)
    largest, same, num_places, num_targets = 0.0, 0, 0, 0
    for row, own, theirs in zip(text.rows, merged, reference, strict=True):
        for start in range(0, len(row), _POSITIONS_AT_ONCE):
            places = slice(start, start + _POSITIONS_AT_ONCE)
            # Where base and result have not as many words, those that both have are compared.
            num_words = min(own.shape[1], theirs.shape[1])
            q, p = own[places, :num_words].double(), theirs[places, :num_words].double()
            largest = max(largest, float((q - p).abs().max()))
            same += int((q.argmax(1) == p.argmax(1)).sum())
            q, p = q.log_softmax(1), p.log_softmax(1)
            kl = kl + (p.exp() * (p - q)).sum()
            targets = row[start + 1 : start + 1 + len(q)]
            each = torch.arange(len(targets))
            loss, loss_unmerged = loss - q[each, targets].sum(), loss_unmerged - p[each, targets].sum()
            num_places += len(q)
            num_targets += len(targets)
    return Difference(
        str(dtype).removeprefix("torch."),
        float(kl) / num_places,
        largest,
        same / num_places,
        float(loss) / num_targets,
        float(loss_unmerged) / num_targets,
    )


def write(
    folder: Path, text: Text, found: dict[str, Difference], dtype: torch.dtype, left_out: dict[str, str] | None = None
) -> None:
    """Write what was found, by form, the one that the folder holds first. Raises OSError.

    Args:
        left_out: forms that cannot be made, and why.
    """
    content = {
        "text": text.name,
        "num_tokens": text.num_tokens,
        "unmerged_dtype": str(dtype).removeprefix("torch."),
        "written": next(iter(found)),
        "forms": {form: asdict(difference) for form, difference in found.items()},
        "left_out": left_out or {},
    }
    write_file(folder / REPORT_NAME, (json.dumps(content, indent=2) + "\n").encode())


def _run(model: Any, text: Text) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(row[None].to(device)).logits[0].cpu() for row in text.rows]
