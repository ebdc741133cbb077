"""Who is blamed, from what ranks say of themselves; and what passes between two of them over a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, Store, TCPStore

from qlora.distributed import attempt, judge, peers
from qlora.distributed.judge import BEAT_SECONDS, BROKEN_BEATS, COME_UP_SECONDS, FAILED_SECONDS, Beat, Judge, Verdict
from qlora.distributed.peers import Peers
from qlora.errors import EXIT_BUG, RankError


class Ranks:
    """Ranks that speak once a second, before a judge with a clock of its own."""

    def __init__(self, num_ranks: int = 4, silent: float = 60.0, stalled: float = 1800.0, hears_all: bool = True) -> None:
        ranks = range(num_ranks)
        self.judge = Judge(ranks, silent, stalled, hears_all)
        self.said: dict[int, dict[str, Any]] = {r: {"host": f"n{r}", "pid": 100 + r, "ticks": 5} for r in ranks}
        self.silent: set[int] = set()
        self.beats: dict[int, Beat] = {}
        self.number = 0

    def second(self, elapsed: float = 1.0, **how: Any) -> Verdict | None:
        self.number += 1
        for rank, said in self.said.items():
            if rank not in self.silent:
                self.beats[rank] = Beat(number=self.number, **said)
        return self.judge.hear(self.beats, elapsed, **how)

    def seconds_to_a_verdict(self, most: int = 5000, **how: Any) -> tuple[int, Verdict]:
        for second in range(1, most):
            if verdict := self.second(**how):
                return second, verdict
        raise AssertionError("no verdict")

    def work(self, seconds: int) -> None:
        for _ in range(seconds):
            for said in self.said.values():
                said["ticks"] += 1
            assert self.second() is None


def test_nobody_is_accused_while_all_speak_and_one_gets_on() -> None:
    ranks = Ranks(silent=5, stalled=10)
    ranks.work(3)
    for second in range(200):
        if second % 9 == 0:
            ranks.said[2]["ticks"] += 1
        assert ranks.second() is None
    for second in range(200):  # a file that is written is work too
        if second % 9 == 0:
            ranks.said[0]["moves"] = second
        assert ranks.second() is None


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_does_not_speak_is_named_after_its_time(rank: int) -> None:
    ranks = Ranks(silent=60)
    ranks.work(3)
    ranks.said[rank] |= {"doing": "step 5, micro-step 1"}
    assert ranks.second() is None
    ranks.silent = {rank}
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert seconds == 61
    assert (verdict.kind, verdict.ranks) == ("silent", (rank,))
    assert verdict.message == f"rank {rank} (host n{rank}, pid {100 + rank}) has not answered for 60 s"
    assert verdict.found == "last seen at step 5, micro-step 1"
    assert f"n{rank}" in verdict.next_step


def test_a_node_that_is_gone_is_named_as_one() -> None:
    ranks = Ranks(num_ranks=512)
    for rank in range(512):
        ranks.said[rank]["host"] = f"n{rank // 8}"
    ranks.work(2)
    ranks.silent = set(range(8, 16))
    verdict = ranks.seconds_to_a_verdict()[1]
    assert verdict.ranks == tuple(range(8, 16))
    assert verdict.message == "ranks 8, 9, 10, 11 and 4 more (hosts n1) have not answered for 60 s"


def test_time_in_which_the_judge_was_stopped_itself_counts_as_nothing() -> None:
    ranks = Ranks(silent=60, stalled=100)
    ranks.work(2)
    ranks.silent = {1, 2, 3}  # all were stopped, and rank 0 comes first
    assert ranks.second(elapsed=3600.0) is None
    ranks.silent = set()
    assert ranks.second() is None
    ranks.work(3)


def test_where_a_connection_broke_the_silent_rank_is_named_soon() -> None:
    ranks = Ranks()
    ranks.work(3)
    ranks.silent = {2}
    ranks.said[1]["state"] = "broken"
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert seconds <= BROKEN_BEATS * BEAT_SECONDS + 1
    assert (verdict.kind, verdict.ranks) == ("silent", (2,))
    assert verdict.message == "rank 2 (host n2, pid 102) is gone"
    own = Ranks(num_ranks=1, hears_all=False)  # another rank than 0 hears that one alone
    own.work(2)
    own.silent = {0}
    assert own.seconds_to_a_verdict(broken=True)[0] <= BROKEN_BEATS * BEAT_SECONDS + 1


def test_who_only_lost_a_connection_and_left_is_not_the_reason() -> None:
    ranks = Ranks()
    ranks.work(3)
    for rank in (1, 3):
        ranks.said[rank]["state"] = "broken"
    assert ranks.second() is None
    ranks.silent = {1, 3}
    for _ in range(50):
        assert ranks.second() is None


def test_a_rank_that_failed_is_the_reason_and_those_that_fail_alike_are_left_alone() -> None:
    ranks = Ranks()
    ranks.work(3)
    ranks.said[2] |= {"state": "failed", "note": "ValueError: boom", "doing": "loading"}
    assert ranks.second() is None
    ranks.silent = {2}
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert seconds <= FAILED_SECONDS + 1
    assert (verdict.kind, verdict.ranks) == ("failed", (2,))
    assert verdict.message == "rank 2 (host n2, pid 102) failed: ValueError: boom"
    assert verdict.found == "it was at loading"

    at_once = Ranks()
    at_once.work(3)
    at_once.said[2] |= {"state": "failed", "note": "ValueError: boom"}
    at_once.said[0]["state"] = "broken"
    verdict_at_once = at_once.second()
    assert verdict_at_once is not None
    assert verdict_at_once.ranks == (2,)


def test_a_rank_that_left_in_order_is_not_missed_once_all_have_met() -> None:
    ranks = Ranks(silent=5, stalled=10)
    ranks.work(3)
    ranks.said[1]["state"] = "left"
    assert ranks.second() is None
    ranks.silent = {1}
    for _ in range(100):
        ranks.said[0]["ticks"] += 1
        assert ranks.second() is None


def test_a_rank_that_was_stopped_before_all_have_met_ends_the_wait() -> None:
    ranks = Ranks(silent=5, stalled=10)
    ranks.said[3]["ticks"] = 0
    assert ranks.second() is None
    ranks.said[1]["state"] = "left"
    assert ranks.second() is None
    ranks.silent = {1}
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert seconds <= FAILED_SECONDS + 2
    assert (verdict.kind, verdict.ranks) == ("left", (1,))


def test_those_behind_are_named_where_none_gets_on() -> None:
    ranks = Ranks(stalled=1800)
    ranks.work(3)
    for rank in (0, 1, 3):
        ranks.said[rank]["ticks"] += 1
        ranks.said[rank] |= {"waits": True}
    ranks.said[2] |= {"doing": "step 7, micro-step 2", "where": "data/loader.py:12, batch"}
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert 1800 <= seconds <= 1802
    assert (verdict.kind, verdict.ranks) == ("stalled", (2,))
    assert verdict.message == "rank 2 (host n2, pid 102) has not got on for 1800 s, and the others wait"
    assert verdict.found == "at step 7, micro-step 2 (data/loader.py:12, batch)"
    assert "train.stalled_rank_seconds" in verdict.next_step


def test_of_those_at_one_place_the_one_that_does_not_wait_is_named_and_all_where_none_or_all_do() -> None:
    for waiting, named in (({0, 1, 3}, (2,)), (set(), (0, 1, 2, 3)), ({0, 1, 2, 3}, (0, 1, 2, 3))):
        ranks = Ranks(stalled=20)
        for rank, said in ranks.said.items():
            said |= {"waits": rank in waiting, "doing": "step 7"}
        verdict = ranks.seconds_to_a_verdict()[1]
        assert (verdict.kind, verdict.ranks) == ("stalled", named)
        assert ("no rank has got on" in verdict.message) == (len(named) == 4)


def test_what_ranks_do_before_they_meet_takes_as_long_as_it_takes_but_they_have_to_come_up() -> None:
    ranks = Ranks(silent=60, stalled=100)
    ranks.said[1]["ticks"] = 0
    for _ in range(1000):
        assert ranks.second() is None
    ranks.said[1]["ticks"] = 1
    assert 100 <= ranks.seconds_to_a_verdict()[0] <= 102

    ranks = Ranks(silent=60, stalled=100)
    ranks.silent = {2}
    seconds, verdict = ranks.seconds_to_a_verdict()
    assert seconds == COME_UP_SECONDS + 1
    assert (verdict.kind, verdict.ranks) == ("absent", (2,))
    assert verdict.message == "rank 2 did not come up within 300 s"
    assert verdict.found == "3 of 4 ranks answer"


def test_what_is_said_survives_the_way() -> None:
    beat = Beat(7, "n1", 12, ticks=3, doing="loading", state="failed", note="Größe\n\x00")
    assert Beat.from_text(beat.to_text().encode()) == beat
    verdict = Verdict("silent", (1, 2), "message", None, "next")
    assert Verdict.from_text(verdict.to_text()) == verdict
    error = verdict.error()
    assert isinstance(error, RankError)
    assert error.exit_code == EXIT_BUG
    assert str(error).splitlines()[0] == "message"


# Two ranks over a store, each in a thread of its own.


@pytest.fixture
def open_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], Store]:
    """Connections to a server that is not one of the ranks."""
    monkeypatch.setattr(judge, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(peers, "LAST_WORD_SECONDS", 0.2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect(timeout: timedelta) -> Store:
        return PrefixStore("beats", TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout))

    return connect


@pytest.fixture
def two(open_store: Callable[[timedelta], Store]) -> Iterator[list[Peers]]:
    made = [Peers(rank, 2, silent_seconds=1.0, stalled_seconds=3.0, open_store=open_store).start() for rank in range(2)]
    yield made
    for one in made:
        one.close()


def soon(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def together(two: list[Peers], work: Callable[[Peers], Any]) -> list[Any]:
    """What `work` gives for each rank, at the same time."""
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda one=one: results.update({one.rank: work(one)})) for one in two]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[rank] for rank in range(len(two))]


def test_ranks_wait_for_all_to_be_ready(two: list[Peers]) -> None:
    waiting = threading.Thread(target=two[0].meet, daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    two[1].meet()
    waiting.join(10)
    assert not waiting.is_alive()
    assert two[0].name_of(1).startswith("rank 1 (host ")


def test_a_rank_that_fails_is_the_reason_that_the_other_gives(two: list[Peers]) -> None:
    together(two, Peers.meet)
    own = ValueError("boom\nmore")
    broke = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")

    def fail(one: Peers) -> BaseException:
        time.sleep(0.3 * (1 - one.rank))
        return one.explain(own if one.rank == 1 else broke)

    first, second = together(two, fail)
    assert second is own
    assert isinstance(first, RankError)
    assert first.message.startswith("rank 1 (host ")
    assert first.message.endswith(" failed: ValueError: boom")
    assert [one.look() for one in two] == [None, None]  # both are ending by themselves


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_is_gone_is_named_by_the_other(two: list[Peers], gone: int) -> None:
    together(two, Peers.meet)
    left = two[1 - gone]
    two[gone]._closed.set()  # as if killed: no word any more
    error = left.explain(RuntimeError("Connection reset by peer"))
    assert isinstance(error, RankError)
    assert error.message.startswith(f"rank {gone} (host ")
    assert error.message.endswith(" is gone")
    assert left.speaks_for_main() == (gone == 0)


def test_errors_of_its_own_are_not_taken_for_those_of_others(two: list[Peers]) -> None:
    together(two, Peers.meet)
    error = RuntimeError("rank 3 failed: OSError: connection refused")  # told by `together`
    assert two[0].explain(error) is error
    with pytest.raises(KeyError), two[1].explaining():
        raise KeyError("socket")


def test_a_verdict_ends_both_and_the_main_rank_last(two: list[Peers]) -> None:
    together(two, Peers.meet)
    two[1].tick("step 1")
    two[0].tick("step 1")
    two[0].tick()
    assert soon(lambda: two[1].look())
    assert two[0].verdict == two[1].verdict
    assert two[0].verdict is not None
    assert (two[0].verdict.kind, two[0].verdict.ranks) == ("stalled", (1,))
    error = soon(lambda: two[0].look())
    assert isinstance(error, RankError)
    assert error.found is not None
    assert "step 1" in str(error.found)


def test_a_store_that_does_not_answer_ends_a_rank_that_does_not_get_on(open_store: Callable[[timedelta], Store]) -> None:
    hangs = threading.Event()

    class Hanging:
        """Answers until it hangs, as a store whose machine is gone."""

        def __init__(self, store: Store) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            if hangs.is_set():
                time.sleep(60)
            return getattr(self.store, name)

    def connect(timeout: timedelta) -> Any:
        return Hanging(open_store(timeout))

    one = Peers(0, 2, silent_seconds=1.0, stalled_seconds=60.0, open_store=connect).start()
    other = Peers(1, 2, silent_seconds=1.0, stalled_seconds=60.0, open_store=open_store).start()
    together([one, other], Peers.meet)
    hangs.set()
    for _ in range(150):  # it gets on
        one.tick()
        assert one.look() is None
        time.sleep(0.01)
    began = time.monotonic()
    error = soon(lambda: one.look() if not time.sleep(0.02) else None)
    assert isinstance(error, RankError)
    assert error.message == "the launcher of rank 0's node has not answered for 1 s"
    assert error.found == "at n0:1234"
    assert time.monotonic() - began < 5
    other._closed.set()


def test_a_store_that_is_gone_leaves_time_to_save(open_store: Callable[[timedelta], Store]) -> None:
    """A launcher that is gone is a request to stop, which takes the rest of a step and a save."""
    gone = threading.Event()

    class Going:
        def __init__(self, store: Store) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            if gone.is_set():
                raise RuntimeError("Connection reset by peer")
            return getattr(self.store, name)

    def connect(timeout: timedelta) -> Any:
        return Going(open_store(timeout))

    both = [Peers(rank, 2, silent_seconds=0.3, stalled_seconds=60.0, open_store=connect).start() for rank in range(2)]
    together(both, Peers.meet)
    gone.set()
    assert soon(lambda: both[1]._gone)
    for _ in range(50):
        assert both[1].look() is None
        time.sleep(0.02)
    for one in both:
        one.close()


def test_a_bug_here_is_no_reason_to_end_a_job(capfd: pytest.CaptureFixture[str]) -> None:
    def connect(timeout: timedelta) -> Any:
        raise KeyError("MASTER_ADDR")

    one = Peers(1, 2, silent_seconds=0.3, stalled_seconds=1.0, open_store=connect).start()
    one.meet()
    time.sleep(0.5)
    assert one.look() is None
    assert "ranks are not watched any more" in capfd.readouterr().err


def test_a_job_of_one_rank_has_nobody_to_listen_to() -> None:
    before = threading.active_count()
    alone = Peers(0, 1, silent_seconds=5, stalled_seconds=5).start()
    alone.meet()
    alone.tick("step 1")
    error = RuntimeError("Connection closed by peer")
    assert alone.explain(error) is error
    assert alone.look() is None
    assert threading.active_count() == before
    alone.close()


def test_each_start_of_a_launch_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    seconds = timedelta(seconds=5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = attempt.open_store(seconds, "beats")
    first.set("key", "former")
    assert attempt.open_store(seconds, "beats").check(["key"])
    assert not attempt.open_store(seconds, "process group").check(["key"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not attempt.open_store(seconds, "beats").check(["key"])
    assert attempt.init_method() == attempt.init_method() == "qlora://"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert attempt.init_method() is None
