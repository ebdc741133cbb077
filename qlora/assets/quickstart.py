"""The quickstart's two ends: `data` writes questions and answers, `show` tells what training on them did.

    python -m qlora.assets.quickstart data OUT_DIR
    python -m qlora.assets.quickstart show RUN_DIR DATA_DIR

The questions are about the standard library of the Python that runs this: "What is math.cosh in Python?". The answers
are first sentences of docstrings. Between the two ends stands an ordinary training job.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qlora.assets.docstrings import Pair, make_pairs, split_pairs
from qlora.errors import DataError, QloraError

NUM_TRAIN = 800
NUM_HELD_OUT = 120
TRAIN_FILE, EVAL_FILE = "train.jsonl", "eval.jsonl"


def conversation(pair: Pair) -> dict[str, list[dict[str, str]]]:
    """Return one row of a data file: a question about a name and its answer."""
    return {
        "messages": [
            {"role": "user", "content": f"What is {pair.name} in Python?"},
            {"role": "assistant", "content": pair.summary},
        ]
    }


def write_data(out_dir: Path) -> tuple[Path, Path]:
    """Write the training and the held-out questions, which share no answer. Returns the two files.

    Raises:
        DataError: this Python's documentation is too thin (a build without the library's source files).
    """
    try:
        train, held_out = split_pairs(make_pairs(), NUM_TRAIN, NUM_HELD_OUT)
    except ValueError as error:
        raise DataError(
            f"the standard library documents too little: {error}",
            place=sys.prefix,
            next_step="use a Python that has its library's source files",
        ) from error
    out_dir.mkdir(parents=True, exist_ok=True)
    files = (out_dir / TRAIN_FILE, out_dir / EVAL_FILE)
    for path, pairs in zip(files, (train, held_out), strict=True):
        path.write_text("".join(json.dumps(conversation(pair)) + "\n" for pair in pairs), encoding="utf-8")
    return files


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, or 1 with a message where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m qlora.assets.quickstart", description="The quickstart's two ends.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data", help="write train.jsonl and eval.jsonl")
    data.add_argument("out_dir", type=Path)
    show = verbs.add_parser("show", help="answer questions with the base and with the trained adapter")
    show.add_argument("run_dir", type=Path, help="the training job's output_dir")
    show.add_argument("data_dir", type=Path, help="where `data` wrote")
    args = parser.parse_args(argv)
    try:
        if args.verb == "data":
            for path, count in zip(write_data(args.out_dir), (NUM_TRAIN, NUM_HELD_OUT), strict=True):
                print(f"{path}: {count} questions and answers")
        else:
            from qlora.assets.show import show_run  # torch and transformers: not needed to write data

            show_run(args.run_dir, args.data_dir)
    except QloraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
