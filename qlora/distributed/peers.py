"""Each rank says where it is, and learns of another one that keeps it waiting in vain.

A collective waits for all ranks, and says nothing of whom it waits for. So a thread of each rank writes a beat into the
launcher's store once a second, over a connection of its own: that of the process group is taken while a rank waits.
Rank 0 reads all beats and judges (`judge.py`), the others read rank 0's and the verdict, so that a job of many ranks
costs the store a few small messages a rank and second.

Whoever hears a verdict ends, wherever its main thread waits; `look` is asked by the thread that can do so, which a store
that does not answer keeps from nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import Store

from qlora.distributed import attempt, place
from qlora.distributed.judge import BEAT_SECONDS, BROKEN_BEATS, COME_UP_SECONDS, Beat, Judge, Verdict
from qlora.errors import QloraError
from qlora.secrets import redact

LAST_WORD_SECONDS = 2.5 * BEAT_SECONDS  # in which the others hear rank 0's verdict before it ends
GONE_SECONDS = 600.0  # without a launcher ranks stop at the end of a step and save, which may take as long
_CONNECTION_WORDS = ("gloo", "nccl", "connection", "socket", "broken pipe", "peer", "timed out")


class Peers:
    """The beats of this rank, and what is heard of the others. A job of one rank has none to listen to, and does nothing.

    Args:
        silent_seconds, stalled_seconds: see `Judge`.
        open_store: makes a connection; given the seconds that may take.

    Attributes:
        verdict: why the job ends, once that is known.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        silent_seconds: float,
        stalled_seconds: float,
        open_store: Callable[[timedelta], Store] = lambda timeout: attempt.open_store(timeout, "beats"),
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.silent_seconds, self.stalled_seconds = silent_seconds, stalled_seconds
        self.verdict: Verdict | None = None
        self._verdict_at = 0.0
        self._open_store = open_store
        self._judge = Judge(range(world_size) if rank == 0 else (0,), silent_seconds, stalled_seconds, hears_all=rank == 0)
        self._unheard = set(range(world_size)) if rank == 0 else {0}
        self._ticks = self._moves = self._number = 0
        self._doing, self._state, self._note = "starting", "alive", ""
        self._leaving = False
        self._ready, self._closed, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._answers = self._seen_answers = 0
        self._gone = False
        self._unanswered, self._looked_at, self._seen_ticks = 0.0, time.monotonic(), -1
        self._thread: threading.Thread | None = None

    def start(self) -> Peers:
        """Begin to speak and to listen."""
        if self.world_size > 1:
            self._looked_at = time.monotonic()
            self._thread = threading.Thread(target=self._speak_and_listen, name="beats", daemon=True)
            self._thread.start()
        return self

    # What the main thread says

    def tell(self, doing: str) -> None:
        """Say what this rank is doing."""
        self._doing = doing

    def tick(self, doing: str | None = None) -> None:
        """This rank passes a place that every rank passes, in the same order. Costs nothing.

        Args:
            doing: what it is doing from here on; None where that is as before.
        """
        self._doing = doing or self._doing
        self._ticks += 1

    def move(self) -> None:
        """This rank gets on with work of its own, such as writing a file. For any thread. Costs nothing."""
        self._moves += 1

    def meet(self) -> None:
        """Wait until every rank is ready, however long its data takes; one that is lost ends the wait by `look`."""
        self.tick("waiting for all ranks to come up")
        while self._thread is not None and not self._ready.wait(0.1):
            continue

    def explain(self, error: BaseException) -> BaseException:
        """Say that this rank fails, and find out whether another one is the reason. It takes some seconds at most.

        Returns:
            what to raise: the error itself, or a RankError that names the rank without which this one cannot go on.
        """
        if self._thread is None or self._leaving:
            return error
        self._leaving = True
        broke = _is_broken_connection(error)
        first_line = (str(error).splitlines() or [""])[0]
        self._note = redact(f"{type(error).__name__}: {first_line}")
        self._say("broken" if broke else "failed")
        if broke:
            end = time.monotonic() + (BROKEN_BEATS + 3) * BEAT_SECONDS
            while self.verdict is None and time.monotonic() < end:
                if self._gone and self.rank != 0 and not attempt.is_hosted_by_launcher():
                    # What it has said last is known all the same.
                    self._decide(self._judge.verdict(broken=True) or self._store_verdict())
                time.sleep(0.1)
        if self.rank == 0 and (self.verdict is not None or not attempt.is_hosted_by_launcher()):
            time.sleep(LAST_WORD_SECONDS)
        return self.verdict.error() if broke and self.verdict is not None else error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What is raised inside is explained. Raises RankError where another rank is the reason."""
        try:
            yield
        except Exception as error:
            reason = self.explain(error)
            if reason is error:
                raise
            raise reason from error

    def close(self) -> None:
        """Speak no more; the others do not wait for it. Rank-local."""
        if self._thread is None:
            return
        if not self._leaving:
            self._leaving = True
            self._say("left")
            if self.rank == 0 and not attempt.is_hosted_by_launcher():
                self._outlast_others()
        self._closed.set()
        self._wake.set()
        self._thread = None

    def _outlast_others(self) -> None:
        """The store ends with this process: the others' last words to it would be errors on their terminals."""
        end = time.monotonic() + LAST_WORD_SECONDS
        while not self._judge.all_left() and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.05)
        time.sleep(0.2)

    def _say(self, state: str) -> None:
        """Have a state heard now, and wait for it shortly."""
        self._state = state
        answers, end = self._answers, time.monotonic() + 2 * BEAT_SECONDS
        # The beat that is on its way may still have the former state.
        while self._answers < answers + 2 and not self._gone and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.02)

    # What is heard

    def name_of(self, rank: int) -> str:
        """A rank with its host and process, as far as known. Rank 0 knows all."""
        beat = self._judge.beat_of(rank)
        return f"rank {rank}" if beat is None else beat.name(rank)

    def process_of(self, rank: int) -> dict[str, object] | None:
        """Host and process id of a rank, as far as known."""
        beat = self._judge.beat_of(rank)
        return None if beat is None else {"host": beat.host, "pid": beat.pid}

    def speaks_for_main(self) -> bool:
        """Whether the verdict is about rank 0, and this is the first of those that are left to say so."""
        if self.verdict is None or 0 not in self.verdict.ranks or self.verdict.kind not in ("silent", "store"):
            return False  # it does so itself
        return self.rank == min(set(range(self.world_size)) - set(self.verdict.ranks), default=-1)

    def look(self) -> QloraError | None:
        """Why this rank is to end at once; None where it is not. For a thread that asks about twice a second."""
        now = time.monotonic()
        elapsed, self._looked_at = min(now - self._looked_at, 2 * BEAT_SECONDS), now
        if self._thread is None or self._leaving:
            return None
        if self._answers != self._seen_answers or self._ticks != self._seen_ticks:
            self._unanswered = 0.0
        self._unanswered += elapsed
        self._seen_answers, self._seen_ticks = self._answers, self._ticks
        limit = self.silent_seconds
        if self._gone and attempt.is_hosted_by_launcher():
            limit = max(limit, GONE_SECONDS)
        if self._answers == 0:
            limit = max(limit, self.stalled_seconds, COME_UP_SECONDS)
        if self.verdict is None and self._unanswered > limit:
            self._decide(self._store_verdict())
        if self.verdict is None or (self.rank == 0 and now - self._verdict_at < LAST_WORD_SECONDS):
            return None
        if self.verdict.kind == "stalled" and self.rank in self.verdict.ranks:
            place.show(f"rank {self.rank} is at")
        return self.verdict.error()

    def _decide(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict, self._verdict_at = verdict, time.monotonic()

    def _store_verdict(self) -> Verdict:
        host, port = attempt.address()
        if attempt.is_hosted_by_launcher():
            who = "the launcher of rank 0's node"
        else:
            who = self.name_of(0)
        ranks = () if attempt.is_hosted_by_launcher() else (0,)
        said = "is gone" if self._gone else f"has not answered for {self.silent_seconds:.0f} s"
        return Verdict("store", ranks, f"{who} {said}", f"at {host}:{port}", "see whether that node and its network are up")

    # The thread

    def _speak_and_listen(self) -> None:
        store: Store | None = None
        before = began = time.monotonic()
        while not self._closed.is_set():
            try:
                began = time.monotonic()
                if store is None:
                    # `look` ends this rank before that.
                    store = self._open_store(timedelta(seconds=2 * self.silent_seconds))
                now = time.monotonic()
                self._beat(store, now - before)
                before, self._gone = now, False
                self._answers += 1
            except RuntimeError:  # what torch raises for a store that is gone, and for one that does not answer
                refused = time.monotonic() - began < BEAT_SECONDS
                self._gone, store = self._answers > 0 and (self._gone or refused), None
            except Exception:  # a bug here is no reason to end a job that may be well
                print(f"warning: ranks are not watched any more:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                self._thread = None
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _beat(self, store: Store, elapsed: float) -> None:
        self._number += 1
        where, waits = place.of_main_thread()
        own = Beat(
            number=self._number,
            host=socket.gethostname(),
            pid=os.getpid(),
            ticks=self._ticks,
            moves=self._moves,
            doing=self._doing,
            where=where,
            waits=waits,
            state=self._state,  # type: ignore[arg-type]
            note=self._note,
        )
        store.set(f"beat/{self.rank}", own.to_text())
        self._unheard = {rank for rank in self._unheard if not store.check([f"beat/{rank}"])}
        heard = [rank for rank in self._judge.ranks if rank not in self._unheard]
        beats = dict(zip(heard, map(Beat.from_text, store.multi_get([f"beat/{rank}" for rank in heard])), strict=True))
        verdict = self._judge.hear(beats, elapsed, broken=self._state == "broken")
        if self.rank == 0:
            if verdict is not None and self.verdict is None:
                store.set("verdict", verdict.to_text())
            if not self._ready.is_set() and self._judge.all_ready():
                store.set("ready", "yes")
                self._ready.set()
        else:
            if store.check(["verdict"]):
                verdict = Verdict.from_text(store.get("verdict"))
            if not self._ready.is_set() and store.check(["ready"]):
                self._ready.set()
        if verdict is not None:
            self._decide(verdict)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    if isinstance(error, QloraError) or not isinstance(error, RuntimeError):
        return False
    text = f"{type(error).__name__} {error}".lower()
    return not text.startswith("runtimeerror rank ") and any(word in text for word in _CONNECTION_WORDS)
