"""Which rank holds up all others, told from what each says of itself about once a second.

A rank says how often it has spoken (`number`), how many places that all ranks pass in one order it has passed (`ticks`),
and where it is. From this follows:

- who does not speak any more is dead, stopped, or cut off;
- where all speak and none gets on, those that have passed the fewest places keep the others waiting;
- who says that it failed is the reason for what happens to the others, and not the other way round.

Pure: no clock, no network, no thread. Time that the judge itself was stopped for counts as nothing (`elapsed` is cut), so
that a job that is put to sleep as a whole and woken up again accuses nobody.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from qlora.errors import RankError

BEAT_SECONDS = 1.0
COME_UP_SECONDS = 300.0  # importing from a slow file system takes minutes
BROKEN_BEATS = 4  # where a connection broke, a rank that misses as many is the one that is gone
FAILED_SECONDS = 5.0  # ranks that all fail alike say so themselves within this time
_SHOWN_RANKS = 4

State = Literal["alive", "failed", "broken", "left"]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: of the beat, from 1.
        host, pid: of its process.
        ticks: places it has passed that all ranks pass in the same order; 0 before it is ready to meet the others.
        moves: of its own work between them, which show that it gets on.
        doing: the name of what it is doing.
        where: file, line and function its main thread is in.
        waits: whether that is a place where ranks wait for one another.
        state: alive; failed: it raised an error of its own; broken: its connection to another rank broke; left: it ended
            in order.
        note: the error's type and first line, where it failed.
    """

    number: int
    host: str
    pid: int
    ticks: int = 0
    moves: int = 0
    doing: str = "starting"
    where: str = ""
    waits: bool = False
    state: State = "alive"
    note: str = ""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(content: str | bytes) -> Beat:
        return Beat(**json.loads(content))

    def name(self, rank: int) -> str:
        """The rank as a person looks for it."""
        return f"rank {rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """Why the job ends, and because of whom.

    Attributes:
        kind: silent, absent, left, stalled, failed, or store.
        ranks: those that are the reason; none where that is not known.
        message, found, next_step: as in a QloraError.
    """

    kind: str
    ranks: tuple[int, ...]
    message: str
    found: str | None
    next_step: str

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(content: str | bytes) -> Verdict:
        values = json.loads(content)
        return Verdict(**(values | {"ranks": tuple(values["ranks"])}))

    def error(self) -> RankError:
        """What ends the ranks that are not the reason."""
        goes_on = "the same command goes on from the last checkpoint"
        return RankError(self.message, found=self.found, next_step=f"{self.next_step}; {goes_on}")


@dataclass
class _Ear:
    """What was heard of one rank, and for how long nothing new."""

    beat: Beat | None = None
    silent: float = 0.0
    failed: float = 0.0


@dataclass
class Judge:
    """Hears the beats of some ranks again and again.

    Args:
        ranks: whom to listen to.
        silent_seconds: a rank that has spoken before may be silent for as long.
        stalled_seconds: no rank need get on for as long; a rank that has never spoken may take it to come up, and
            COME_UP_SECONDS at least.
        hears_all: whether these are all ranks; what only some have passed says nothing about who waits for whom.
    """

    ranks: Collection[int]
    silent_seconds: float
    stalled_seconds: float
    hears_all: bool = True
    _ears: dict[int, _Ear] = field(init=False)
    _still: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._ears = {rank: _Ear() for rank in self.ranks}

    def beat_of(self, rank: int) -> Beat | None:
        """The last that was heard of a rank."""
        ear = self._ears.get(rank)
        return ear.beat if ear is not None else None

    def all_ready(self) -> bool:
        """Whether every rank has come as far as meeting the others."""
        return all(ear.beat is not None and ear.beat.ticks > 0 for ear in self._ears.values())

    def all_left(self) -> bool:
        """Whether no rank goes on."""
        return all(ear.beat is not None and ear.beat.state != "alive" for ear in self._ears.values())

    def hear(self, beats: Mapping[int, Beat], elapsed: float, *, broken: bool = False) -> Verdict | None:
        """Take in the newest beats and judge.

        Args:
            beats: by rank; those of ranks that have not spoken yet are missing.
            elapsed: seconds since the last call.
            broken: this rank's own connection to another one broke.
        """
        elapsed = min(elapsed, 2 * BEAT_SECONDS)
        moved = False
        for rank, ear in self._ears.items():
            beat = beats.get(rank)
            if beat is None or (ear.beat is not None and beat.number == ear.beat.number):
                ear.silent += elapsed
            else:
                before = ear.beat
                moved = moved or before is None or (before.ticks, before.moves) != (beat.ticks, beat.moves)
                ear.beat, ear.silent = beat, 0.0
            if ear.beat is not None and ear.beat.state == "failed":
                ear.failed += elapsed
        # What ranks do before they meet takes as long as it takes.
        self._still = 0.0 if moved or not self.all_ready() else self._still + elapsed
        return self.verdict(broken=broken)

    def verdict(self, *, broken: bool = False) -> Verdict | None:
        """What follows from what was heard so far."""
        broken = broken or any(ear.beat is not None and ear.beat.state == "broken" for ear in self._ears.values())
        return self._failed(broken) or self._silent(broken) or self._absent() or self._left() or self._stalled()

    def _failed(self, broken: bool) -> Verdict | None:
        failed = {rank: ear for rank, ear in self._ears.items() if ear.beat is not None and ear.beat.state == "failed"}
        if not failed or not (broken or max(ear.failed for ear in failed.values()) > FAILED_SECONDS):
            return None
        rank = max(failed, key=lambda rank: (failed[rank].failed, -rank))
        beat = failed[rank].beat
        assert beat is not None
        return Verdict(
            "failed",
            (rank,),
            f"{beat.name(rank)} failed: {beat.note}",
            f"it was at {beat.doing}",
            "see what it has written itself, above or in its own log; the other ranks had nothing to do with it",
        )

    def _silent(self, broken: bool) -> Verdict | None:
        limit = min(self.silent_seconds, BROKEN_BEATS * BEAT_SECONDS) if broken else self.silent_seconds
        silent = {
            rank: ear.beat
            for rank, ear in self._ears.items()
            if ear.beat is not None and ear.silent > limit and ear.beat.state == "alive"
        }
        if not silent:
            return None
        are = "is" if len(silent) == 1 else "are"
        have = "has" if len(silent) == 1 else "have"
        hosts = ", ".join(sorted({beat.host for beat in silent.values()})[:_SHOWN_RANKS])
        return Verdict(
            "silent",
            tuple(sorted(silent)),
            f"{_named(silent)} {f'{are} gone' if broken else f'{have} not answered for {limit:.0f} s'}",
            f"last seen at {_doings(silent)}",
            f"the process was killed (out of memory?), or it or its machine is stopped: see the system's log of {hosts}",
        )

    def _absent(self) -> Verdict | None:
        limit = max(self.stalled_seconds, COME_UP_SECONDS)
        absent = [rank for rank, ear in self._ears.items() if ear.beat is None and ear.silent > limit]
        if not absent:
            return None
        return Verdict(
            "absent",
            tuple(absent),
            f"{_numbers(absent)} did not come up within {limit:.0f} s",
            f"{len(self._ears) - len(absent)} of {len(self._ears)} ranks answer",
            "see the logs of the launchers on the other nodes",
        )

    def _left(self) -> Verdict | None:
        """A rank that was asked to stop, alone, before there was anybody to agree with."""
        left = [rank for rank, ear in self._ears.items() if ear.beat is not None and ear.beat.state == "left"]
        if self.all_ready() or not left or max(self._ears[rank].silent for rank in left) <= FAILED_SECONDS:
            return None
        beat = self._ears[left[0]].beat
        assert beat is not None
        return Verdict(
            "left",
            tuple(left),
            f"{beat.name(left[0])} was stopped before all ranks had come up",
            f"it was at {beat.doing}",
            "see why it was asked to",
        )

    def _stalled(self) -> Verdict | None:
        if not self.hears_all or self._still <= self.stalled_seconds:
            return None
        beats = {rank: ear.beat for rank, ear in self._ears.items() if ear.beat is not None and ear.beat.state == "alive"}
        if not beats:
            return None
        fewest = min(beat.ticks for beat in beats.values())
        behind = {rank: beat for rank, beat in beats.items() if beat.ticks == fewest}
        # Several may have passed the last place, of which some wait and one does not.
        behind = {rank: beat for rank, beat in behind.items() if not beat.waits} or behind
        where = ", ".join(dict.fromkeys(beat.where for beat in behind.values() if beat.where))
        for_how_long = f"for {self.stalled_seconds:.0f} s"
        if len(behind) == len(beats):
            message = f"no rank has got on {for_how_long}: all are at {_doings(behind)}"
        else:
            verb = "has" if len(behind) == 1 else "have"
            message = f"{_named(behind)} {verb} not got on {for_how_long}, and the others wait"
        return Verdict(
            "stalled",
            tuple(sorted(behind)),
            message,
            f"at {_doings(behind)}" + (f" ({where})" if where else ""),
            "find out what hangs there (a file system, a device, a data loader); where the work is that slow, raise "
            "train.stalled_rank_seconds",
        )


def _named(beats: Mapping[int, Beat]) -> str:
    if len(beats) == 1:
        ((rank, beat),) = beats.items()
        return beat.name(rank)
    return f"{_numbers(sorted(beats))} (hosts {', '.join(sorted({beat.host for beat in beats.values()})[:_SHOWN_RANKS])})"


def _numbers(ranks: Collection[int]) -> str:
    shown = ", ".join(map(str, list(ranks)[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _doings(beats: Mapping[int, Beat]) -> str:
    return "; ".join(list(dict.fromkeys(beat.doing for beat in beats.values()))[:_SHOWN_RANKS])
