"""Saving beside the training: all ranks gather into host memory, and the main rank writes while the next steps run.

Only the gathering holds the training up. One checkpoint is written at a time; the last one is waited for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from json import dumps
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from qlora.adapter.files import adapter_parameters, render_files
from qlora.adapter.tensor_file import TensorFile
from qlora.checkpoint import state
from qlora.checkpoint.save import write_checkpoint
from qlora.checkpoint.state import Identity, TrainerState
from qlora.distributed.collectives import whole_parameters
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.files import Content, chunks_of

GRACE_SECONDS = 30.0  # what `accelerate launch` and SLURM give a job that is told to end
SPARE_SECONDS = 5.0


class Saver:
    """The checkpoints of one run. A context: what is being written is finished before it is left, even by an error.

    Args:
        run_dir: owned by the main rank.
        model: with the adapter in it, as it was before anything was wrapped.
        keep_last: committed checkpoints that stay.
    """

    def __init__(
        self, run_dir: Path, model: nn.Module, engine: Engine, identity: Identity, *, runtime: Runtime, keep_last: int
    ) -> None:
        self.run_dir, self.model, self.engine, self.identity = run_dir, model, engine, identity
        self.runtime, self.keep_last = runtime, keep_last
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._has_saved = False

    def save(self, trainer: TrainerState) -> None:
        """Gather what was trained and its optimizer state, and have it written. Collective.

        Raises:
            CheckpointError: the checkpoint before could not be written. AdapterError: a tensor is empty or not finite. Both
                on every rank; what was committed is untouched.
        """
        self.wait()
        began = time.monotonic()
        parameters = adapter_parameters(self.model)
        values = whole_parameters(parameters, keep=self.runtime.is_main)
        moments = whole_optimizer_state(self.engine, parameters, keep=self.runtime.is_main)

        def begin() -> None:
            # Rendered here, because the model is not to be looked at while the next step changes it.
            files = render_files(self.model, values)
            files[state.OPTIMIZER_NAME] = TensorFile(moments, {})
            files[state.STATE_NAME] = (dumps(asdict(trainer), indent=2) + "\n").encode()
            folder = self.run_dir / state.FOLDER / state.folder_name(trainer.step)
            self._writer = threading.Thread(target=self._write, args=(folder, files, began), name="checkpoint")
            self._writer.start()

        self.runtime.from_main(begin)

    def wait(self) -> None:
        """Wait until nothing is being written. Collective. Raises CheckpointError, on every rank, where writing failed."""
        self.runtime.from_main(self._join)

    def failure(self) -> str | None:
        """Why training should not go on; None where all is well. Main rank only, for any thread."""
        return None if self._error is None else "a checkpoint cannot be written"

    def _write(self, folder: Path, files: Mapping[str, Content], began: float) -> None:
        try:
            told = {name: _Told(content, self.runtime.move) for name, content in files.items()}
            write_checkpoint(folder, told, self.identity, self.keep_last)
            if not self._has_saved:
                warn_if_slow(time.monotonic() - began)
                self._has_saved = True
        except Exception as error:  # raised where the ranks meet next
            self._error = error

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._join()
        except Exception as second:
            print(f"warning: {second}", file=sys.stderr, flush=True)


def warn_if_slow(seconds: float) -> None:
    """Say that a job which is told to end may be killed before it has saved, where a save takes about that long."""
    stated = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    grace = float(stated) if stated.isdecimal() else GRACE_SECONDS
    if seconds > grace - SPARE_SECONDS:
        print(
            f"warning: the first checkpoint took {seconds:.0f} s; a launcher that is told to end kills its ranks after "
            f"{grace:.0f} s\n  next: stop the job with qlora stop, or set TORCH_ELASTIC_SHUTDOWN_TIMEOUT to "
            f"{2 * seconds + grace:.0f} (seconds) before the launch; SLURM's own limit is KillWait",
            file=sys.stderr,
            flush=True,
        )


class _Told:
    """A file's content, of which each piece that is written tells that this rank gets on."""

    def __init__(self, content: Content, move: Callable[[], None]) -> None:
        self.content, self.move = content, move

    def chunks(self) -> Iterator[bytes | memoryview]:
        for chunk in chunks_of(self.content):
            yield chunk
            self.move()


def whole_optimizer_state(engine: Engine, parameters: dict[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
    """`KEY/exp_avg` and the like for each tensor of the adapter, on the CPU. Collective; {} where not kept."""
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    keys = {names[id(parameter)]: key for key, parameter in parameters.items()}
    found: dict[str, Tensor] = {}
    for name, values in engine.optimizer_states(keys):
        if keep:
            own = {f"{keys[name]}/{part}": value for part, value in values.items()}
            found |= {key: value.detach().to("cpu", copy=True).contiguous() for key, value in own.items()}
    return found
