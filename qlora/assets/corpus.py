"""What the tiny base reads before it is shipped: documents made of `docstrings`, in a fixed order.

The idea: a language model of six million parameters cannot understand, but it can remember. So most documents state one
fact, `name -> summary`, in one of many phrasings, again and again; whole docstrings, comments, help topics and source
give it the language around them. No document is a question or a conversation: answering is what fine-tuning adds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from qlora.assets.docstrings import Pair, comment_blocks, documented_names, help_topics, read_source, source_files

MAX_DOCUMENT_CHARS = 700
FACT_SHARE = 0.85  # of all documents; facts are short, so about six tokens in ten

# {n} is the name, {s} the summary. A name stands at the start of a line and inside one; a summary likewise, because the
# same letters are other tokens there.
PHRASINGS = (
    "{n}\n{s}",
    "{n}\n\n{s}",
    "# {n}\n{s}",
    "help({n})\n{s}",
    "Here is {n}:\n{s}",
    "The entry {n} reads\n{s}",
    "Python has {n} for this.\n{s}",
    "Help on {n} in the standard library:\n{s}",
    "You can look up {n} in the manual.\n{s}",
    "What follows describes {n}.\n\n{s}",
    "{n}: {s}",
    "`{n}`: {s}",
    "{n} - {s}",
    "About {n}: {s}",
    "Summary of {n}: {s}",
    "In Python, {n} is documented as: {s}",
    "{s}\n{n}",
    "{s} See {n}.",
)


def fact(pair: Pair, rng: random.Random) -> str:
    """Return one statement of a pair."""
    return rng.choice(PHRASINGS).format(n=pair.name, s=pair.summary)


def prose() -> list[str]:
    """Return the documents that are not facts: docstrings, comments, help topics and source, cut to a readable length."""
    documents = [f"{name}\n{docstring}" for name, docstring in documented_names(None).items()]
    sources = [text for _, path in source_files() if (text := read_source(path)) is not None]
    for text in sources:
        documents.extend(comment_blocks(text))
    for topic in help_topics():
        documents.extend(_pieces(topic))
    for text in sources:
        documents.extend(_pieces(text)[:2])
    return [document[:MAX_DOCUMENT_CHARS].strip() for document in documents]


def documents(pairs: list[Pair], texts: list[str], seed: int) -> Iterator[str]:
    """Yield documents for ever: every pair once a round, in a new order and phrasing, with prose in between."""
    rng = random.Random(seed)
    pending: list[str] = []
    while True:
        order = list(pairs)
        rng.shuffle(order)
        for pair in order:
            while rng.random() > FACT_SHARE:
                if not pending:
                    pending = list(texts)
                    rng.shuffle(pending)
                yield pending.pop()
            yield fact(pair, rng)


def vocabulary_texts(pairs: list[Pair], texts: list[str]) -> list[str]:
    """Return what the tokenizer is trained on: the facts often enough that names and their words become tokens."""
    rng = random.Random(0)
    return [fact(pair, rng) for _ in range(4) for pair in pairs] + texts[:12000]


def _pieces(text: str) -> list[str]:
    """Cut at blank lines into pieces of at most about `MAX_DOCUMENT_CHARS`."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if pieces[-1] and len(pieces[-1]) + len(paragraph) > MAX_DOCUMENT_CHARS:
            pieces.append("")
        pieces[-1] += f"{paragraph}\n\n"
    return [piece for piece in pieces if len(piece) > 60]
