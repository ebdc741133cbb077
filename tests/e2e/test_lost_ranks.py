"""Jobs of which a rank dies, hangs, fails or is slow: they end in bounded time and name it, or go on and say so.

Signals go to the real command lines; what has to happen at one place is brought about by `jobs_with_lost_ranks.py`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.cli.status import lock_is_held, read_status
from tests.e2e.places import End, run_places

pytestmark = [pytest.mark.e2e, pytest.mark.long]
LIMITS = ["train.silent_rank_seconds=5", "train.stalled_rank_seconds=5"]
SAVES = "checkpoint.every_steps=2"
SCRIPT = "jobs_with_lost_ranks.py"


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def rank_of(pid: int) -> int | None:
    """Which rank of `-m qlora` a process is; None where it is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if b"qlora" not in words or b"accelerate.commands.launch" in words:
        return None
    return next((int(entry.partition(b"=")[2]) for entry in environment if entry.startswith(b"RANK=")), None)


def ranks_below(pid: int, descendants: Callable[[int], list[int]]) -> dict[int, int]:
    """The process of each rank that a launcher has started."""
    return {rank: child for child in descendants(pid) if (rank := rank_of(child)) is not None}


@pytest.mark.parametrize(
    ("config", "number", "rank"),
    [
        ("zero2", signal.SIGKILL, 1),
        ("ddp", signal.SIGKILL, 0),
        ("zero3", signal.SIGSTOP, 1),
        ("ddp", signal.SIGSTOP, 0),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_job_and_is_named(
    project: Any,
    patiently: Callable[..., Any],
    descendants: Callable[[int], list[int]],
    tmp_path: Path,
    config: str,
    number: signal.Signals,
    rank: int,
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = [project.fill("train.per_device_train_batch_size={rows}", 2), "train.max_steps=100000", SAVES, *LIMITS]
    launcher = project.launch(config, 2, "train", str(project.job), f"train.output_dir={run_dir}", *job, log=log)
    patiently(lambda: len(rows_of(run_dir)) >= 4)
    pids = ranks_below(launcher.pid, descendants)
    assert sorted(pids) == [0, 1]
    time.sleep(3)  # what is known of a rank's place is about a second old
    os.kill(pids[rank], number)
    # 5 s, and 30 s in which the launcher waits for a process that is stopped.
    assert project.wait(launcher, log, timeout=60) == 1

    text = log.read_text()
    what = "is gone" if number == signal.SIGKILL else "has not answered for 5 s"
    named = f"rank {rank} (host {socket.gethostname()}, pid {pids[rank]}) {what}"
    assert text.count(named) == 1
    assert re.search(rf"error{'' if rank else ' .rank 1.'}: {re.escape(named)}", text)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 1, True)
    assert named in status["reason"]
    assert re.search(r"last seen at (the end of |saving )?step \d+", status["reason"])
    assert (run_dir / f"checkpoints/step-{status['step']:08d}/COMMITTED").is_file()
    assert not lock_is_held(run_dir / "LOCK")
    facts = read_status(run_dir)
    assert (facts["state"], facts["resumable"], facts["num_steps"]) == ("failed", True, 100000)
    assert named in facts["reason"]


def test_a_launcher_that_may_restart_its_ranks_goes_on_to_the_same_adapter(
    project: Any, patiently: Callable[..., Any], descendants: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """Rank 1 is killed, then the new rank 0."""
    whole = project.result("zero1.long")
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = [project.fill("train.per_device_train_batch_size={rows}", 2), "train.max_steps=160", "checkpoint.every_steps=3"]
    arguments = [*project.launch_arguments("zero1", 2), "--max_restarts", "2", "-m", "qlora", "train", str(project.job)]
    launcher = project.start([*arguments, f"train.output_dir={run_dir}", *job], log)
    seen: list[dict[int, int]] = []
    for rank in (1, 0):
        num_rows = len(rows_of(run_dir))
        patiently(lambda wanted=num_rows + 8: len(rows_of(run_dir)) >= wanted)
        assert lock_is_held(run_dir / "LOCK")
        assert json.loads((run_dir / "status.json").read_text())["state"] == "running"
        seen.append(ranks_below(launcher.pid, descendants))
        assert sorted(seen[-1]) == [0, 1]
        os.kill(seen[-1][rank], signal.SIGKILL)
    assert project.wait(launcher, log) == 0, log.read_text()[-3000:]

    assert not set(seen[0].values()) & set(seen[1].values())
    text = log.read_text()
    assert f"rank 1 (host {socket.gethostname()}, pid {seen[0][1]}) is gone" in text
    assert f"rank 0 (host {socket.gethostname()}, pid {seen[1][0]}) is gone" in text
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("done", 0, None)
    assert not lock_is_held(run_dir / "LOCK")
    last = {row["step"]: row["loss"] for row in rows_of(run_dir)}
    assert [last[step] for step in sorted(last)] == whole.values("loss")
    name = "adapter/adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


STEPS = ["train.max_steps=12"]
PLACES = {
    "hangs": STEPS,
    "main hangs": STEPS,
    "hangs after a step": STEPS,
    "hangs while loading": STEPS,
    "fails": STEPS,
    "main fails": STEPS,
    "fails while tokenizing": [*STEPS, "data.cache_dir={folder}/fresh"],
    "main killed": STEPS,
    "slow": ["train.max_steps=26"],
    "pauses": STEPS,
}


@pytest.fixture(scope="module")
def ends(project: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    return run_places(project, tmp_path_factory.mktemp("lost"), "ddp", SCRIPT, PLACES, [SAVES, *LIMITS])


def assert_hung(end: End, rank: int, where: str, *, step: int) -> None:
    """The job ended because a rank hung at a place, and says so; its last checkpoint is of a step."""
    assert end.codes == [1, 1], end.logs
    assert end.seconds < 30
    reason = end.status["reason"]
    assert re.match(rf"RankError: rank {rank} \(host \S+, pid \d+\) has not got on for 5 s, and the others wait", reason)
    assert where in reason
    assert SCRIPT in reason  # file and line
    assert "time.sleep(600)" in end.logs[rank]  # and how it came there
    assert "time.sleep(600)" not in end.logs[1 - rank]
    assert (end.status["state"], end.status["exit_code"], end.status["resumable"]) == ("failed", 1, step > 0)
    assert end.status["step"] == step
    assert "error: rank" in end.logs[0]
    assert "train.stalled_rank_seconds" in end.logs[0]
    assert "error (rank 1): rank" in end.logs[1]
    assert not lock_is_held(end.run_dir / "LOCK")


@pytest.mark.parametrize(
    ("place", "rank", "where"),
    [
        ("hangs", 1, "step 8, micro-step 1"),
        ("main hangs", 0, "step 8, micro-step 1"),
        ("hangs after a step", 1, "the end of step 3"),
        ("hangs while loading", 1, "loading"),
    ],
)
def test_a_rank_that_hangs_is_named_with_the_place(ends: dict[str, End], place: str, rank: int, where: str) -> None:
    step = {"hangs after a step": 2, "hangs while loading": 0}.get(place, 6)
    assert_hung(ends[place], rank, where, step=step)


def test_where_the_base_is_shared_a_rank_that_hangs_is_told_from_those_that_wait(project: Any, tmp_path: Path) -> None:
    """Forward passes gather there: ranks wait at the place at which one hangs, and their own work cannot be told by it."""
    places = {"hangs": STEPS, "main hangs": STEPS, "slow": PLACES["slow"]}
    ends = run_places(project, tmp_path, "zero3", SCRIPT, places, [SAVES, *LIMITS])
    assert_hung(ends["hangs"], 1, "step 8, micro-step 1", step=6)
    assert_hung(ends["main hangs"], 0, "step 8, micro-step 1", step=6)
    assert ends["slow"].codes == [0, 0], ends["slow"].logs
    assert "warning: rank" not in "".join(ends["slow"].logs)


def test_an_error_on_one_rank_is_the_reason_on_all(ends: dict[str, End]) -> None:
    for rank, place in ((1, "fails"), (0, "main fails")):
        end = ends[place]
        assert end.codes == [1, 1], end.logs
        assert end.seconds < 20
        assert "Traceback" in end.logs[rank]
        assert "ValueError: a bug of ours\nin two lines" in end.logs[rank]
        assert (end.status["state"], end.status["exit_code"], end.status["resumable"]) == ("failed", 1, True)
        assert end.status["step"] == 6
        assert "ValueError: a bug of ours" in end.status["reason"]
        other = end.logs[1 - rank]
        assert re.search(rf"error.*: rank {rank} \(host \S+, pid \d+\) failed: ValueError: a bug of ours\n", other)
        assert "Traceback" not in other
    assert re.match(r"RankError: rank 1 \(.*\) failed: ValueError: a bug of ours", ends["fails"].status["reason"])


def test_an_error_before_the_ranks_have_met_keeps_none_waiting(ends: dict[str, End]) -> None:
    end = ends["fails while tokenizing"]
    assert end.codes == [1, 1], end.logs
    assert end.seconds < 20
    assert re.match(r"RankError: rank 1 \(.*\) failed: ValueError: a bug of ours", end.status["reason"])
    assert (end.status["state"], end.status["step"], end.status["resumable"]) == ("failed", 0, False)


def test_a_main_rank_that_takes_the_store_along_is_named(ends: dict[str, End]) -> None:
    end = ends["main killed"]
    assert end.codes == [128 + signal.SIGKILL, 1], end.logs
    assert end.seconds < 20
    assert re.search(r"error \(rank 1\): rank 0 \(host \S+, pid \d+\) is gone", end.logs[1])
    assert (end.status["state"], end.status["resumable"], end.status["step"]) == ("failed", True, 6)


def test_a_slow_rank_is_warned_of_once_and_a_pause_accuses_nobody(ends: dict[str, End]) -> None:
    slow, paused = ends["slow"], ends["pauses"]
    assert slow.codes == paused.codes == [0, 0], slow.logs + paused.logs
    assert slow.status["state"] == paused.status["state"] == "done"
    assert "warning: rank" not in "".join(paused.logs + slow.logs[1:])
    warned = r"warning: rank 1 \(host \S+, pid \d+\) is slow, .*: (\S+) s of its own .* take (\S+) s"
    found = re.findall(warned, slow.logs[0])
    assert len(found) == 1
    own, others = map(float, found[0])
    assert own >= 0.15
    assert own > 1.5 * others
    assert "error" not in "".join(paused.logs + slow.logs).lower()
