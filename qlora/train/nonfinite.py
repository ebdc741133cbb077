"""Steps whose loss or gradient is not finite.

A loss that is not finite is given a gradient that is none either (`train.step`), so that every rank finds out by the
gradient's norm, which is the same on all of them, and skips the update: parameters and optimizer stay as they are. One
such step may be a bad row, whose text is saved aside; several in a row are a run that has gone wrong, and end it before
anything is saved after them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora.data.loader import TrainLoader
from qlora.data.sampler import Position
from qlora.distributed.runtime import Runtime
from qlora.errors import QloraError
from qlora.files import write_file
from qlora.train.hooks import SilentHook
from qlora.train.step import StepResult

FOLDER = "nonfinite"
MOST_FILES = 20


class NonFiniteHook(SilentHook):
    """Saves the rows of a skipped step aside, and ends the run after several in a row. Collective where a step is skipped.

    It comes before the hook that saves.

    Args:
        most_in_a_row: the run ends with as many.
        position: where the data stands before the first step.
        num_micro_steps: of a step.
        skips_overflow: a gradient that overflows is nothing unusual (fp16 with a loss scale); a loss is.
        decode: token ids to text.
    """

    def __init__(
        self,
        run_dir: Path,
        runtime: Runtime,
        loader: TrainLoader,
        *,
        most_in_a_row: int,
        position: Position,
        num_micro_steps: int,
        skips_overflow: bool,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.run_dir, self.runtime, self.loader, self.decode = run_dir, runtime, loader, decode
        self.most_in_a_row, self.num_micro_steps, self.skips_overflow = most_in_a_row, num_micro_steps, skips_overflow
        self.position = position
        self.in_a_row = 0

    def after_step(self, result: StepResult, *, is_last: bool) -> None:
        """Raises QloraError on every rank where it is the last that is borne."""
        before, self.position = self.position, result.position
        if not result.skipped:
            self.in_a_row = 0
            return
        if math.isfinite(result.loss) and self.skips_overflow:
            return
        self.in_a_row += 1
        own = self.runtime.gather_objects(result.nonfinite_micro_steps)
        places = [(rank, micro_step) for rank, micro_steps in enumerate(own) for micro_step in micro_steps]
        ranks = sorted({rank for rank, _ in places})
        where = f"ranks {', '.join(map(str, ranks))}" if ranks else "the gradient alone, whose rank cannot be told"
        # Which rank's share of a summed gradient it was is not known: all of the step's rows are suspects then.
        every = [(rank, micro) for rank in range(self.runtime.world_size) for micro in range(self.num_micro_steps)]
        saved = self.runtime.from_main(lambda: self._save(result.step, before, places or every))
        rows = f"the rows are in {saved}" if saved else "the rows are not saved"
        what = f"loss {result.loss}, gradient norm {result.grad_norm} ({where})"
        if self.in_a_row >= self.most_in_a_row:
            first = result.step - self.in_a_row + 1
            raise QloraError(
                f"the loss or its gradient is not finite at step {result.step}"
                + (f", as at every step since {first}" if first < result.step else ""),
                place=str(self.run_dir),
                found=what,
                next_step=f"{rows}; take them out, or lower train.learning_rate; every step of this kind was skipped, so "
                "that the last checkpoint is good (train.max_nonfinite_steps: how many in a row are borne)",
            )
        if self.runtime.is_main:
            print(f"warning: step {result.step} skipped, nothing was learned: {what}; {rows}", file=sys.stderr, flush=True)

    def _save(self, step: int, position: Position, places: Sequence[tuple[int, int]]) -> str | None:
        """Write the rows of some micro-steps, one a line. Main rank only. Returns the file, None where there is none."""
        folder = self.run_dir / FOLDER
        lines = []
        for rank, micro_step in places:
            for number, input_ids in self.loader.rows_at(position, micro_step, rank):
                row = {"step": step, "rank": rank, "micro_step": micro_step, "row": number, "input_ids": input_ids}
                lines.append(json.dumps(row | {"text": self.decode(input_ids)}, ensure_ascii=False) + "\n")
        try:
            folder.mkdir(exist_ok=True)
            path = folder / f"step-{step}.jsonl"
            if len(list(folder.iterdir())) >= MOST_FILES and not path.exists():
                return None
            write_file(path, "".join(lines).encode(errors="replace"))
        except OSError as error:
            print(f"warning: {folder} cannot be written ({error.strerror})", file=sys.stderr, flush=True)
            return None
        return str(path)
