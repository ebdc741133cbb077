"""Errors a user can cause, each saying where, what was found, what was wanted and what to do next.

A `QloraError` is printed in a few lines on standard error and ends the program with code 2. Everything else that
escapes is a bug of ours: it keeps its traceback and ends with code 1.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on request after saving; EX_TEMPFAIL of sysexits.h, so that a scheduler may requeue


class QloraError(Exception):
    """An error with a cure.

    Args:
        message: one sentence, what is wrong.
        place: where: `file:line: key`, a folder, a module path.
        found: what was there.
        wanted: what would have been accepted.
        next_step: what the user can do now.

    Attributes:
        of_one_rank: the other ranks do not say the same, so that the one it comes up on says all of it.
    """

    exit_code = EXIT_USER_ERROR
    of_one_rank = False

    def __init__(
        self,
        message: str,
        *,
        place: str | None = None,
        found: object = None,
        wanted: object = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.found = found
        self.wanted = wanted
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [self.message if self.place is None else f"{self.place}: {self.message}"]
        for label, value in (("found", self.found), ("wanted", self.wanted), ("next", self.next_step)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


class ConfigError(QloraError):
    """The job file, a command-line override or a combination of them cannot be used."""


class DataError(QloraError):
    """Training or evaluation data cannot be read, rendered or used."""


class BaseModelError(QloraError):
    """The base model's files are missing, damaged, unsafe or of a kind that is not supported."""


class AdapterError(QloraError):
    """An adapter does not fit: its files, its shapes, its base or its targets."""


class CheckpointError(QloraError):
    """A checkpoint or run directory cannot be resumed, or belongs to another job."""


class LaunchError(QloraError):
    """The processes were not started the way the job needs them."""


class RankError(QloraError):
    """A rank of the job died, hangs or failed, and the others cannot go on without it. Nothing in the job file is wrong."""

    exit_code = EXIT_BUG


class StopRequested(BaseException):
    """The job was asked to stop, and leaves what it is doing; no error, and nothing that `except Exception` may swallow."""
