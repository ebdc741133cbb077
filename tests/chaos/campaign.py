"""Runs a job again and again and kills it, at random, until it was killed as often as asked for; every run is finished.

    campaign.py --base FOLDER --folder EMPTY_FOLDER [--kills 12] [--control 2] [--seed 0] [--lap 0]

A lap is one run: started, killed, started in another world, killed, ..., and in the end left alone, whereupon it must be
the run that nobody killed. What a lap does is drawn from the seed and its number, so `--seed S --lap L` repeats it (what
is done at a time, and not at a place, only nearly). Control laps do the same with the commit protocol switched off; so
many of them have to be found wanting. The last line is JSON: counts of everything.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from checks import Broken, check_disk, check_epochs, check_whole, committed_steps, piece_of, rows_by_step
from faults import Fault
from job import KEEP_LAST, NUM_ROWS, NUM_STEPS, SPLITS, WORLDS, write_job
from launches import Launches, World
from ranks import Outcome, Start, import_everything, run, tails

KILLS_A_LAP = 25
EXIT_STOPPED = 75
KINDS = {"file": 8, "commit": 2, "torn": 3, "any file": 3, "step": 5, "time": 4, "stop": 2, "loading": 2}


class Campaign:
    """Laps, and what they have in common.

    Attributes:
        counts: kills by kind and by what was being done, worlds that were killed and that went on.
    """

    def __init__(self, base: Path, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.launches = Launches(folder)
        self.counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("kinds", "worlds", "ended before it was killed")
        }
        self.kills = self.starts = 0
        self.job = write_job(base, folder)
        self.reference = folder / "reference"
        self.documents: dict[int, Counter[str]] = {}
        self.operations_a_save: dict[str, int] = {}

    def run_reference(self) -> None:
        """The run that nobody kills."""
        files = self.folder / "reference.files"
        files.mkdir()
        start = Start(0, World("single", 1), self._argv(self.reference, SPLITS[1][0], 1), self.reference, files)
        outcome = run(start, self.launches)
        if not outcome.is_done:
            raise Broken(f"the reference ends with {outcome.codes}\n{tails(start)}")
        self.documents = piece_of(start, 0).documents
        rows = rows_by_step(self.reference)
        check_epochs(self.documents, {step: row["epoch"] for step, row in rows.items()}, NUM_ROWS)
        lines = start.note.with_suffix(".operations").read_text().splitlines()
        names = [line.split()[0] for line in lines if line.split()[1:] and line.split()[1].startswith("checkpoints")]
        self.operations_a_save = {name: max(1, round(count / NUM_STEPS)) for name, count in Counter(names).items()}
        # Else the faults below would hit nothing.
        if set(self.operations_a_save) != {"open", "write", "fsync", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}:
            raise Broken(f"of what a save does this is seen: {self.operations_a_save}")

    def _argv(self, run_dir: Path, split: tuple[int, int], every_steps: int) -> list[str]:
        return [
            "train",
            str(self.job),
            f"train.output_dir={run_dir}",
            f"train.per_device_train_batch_size={split[0]}",
            f"train.gradient_accumulation_steps={split[1]}",
            f"checkpoint.every_steps={every_steps}",
        ]

    def lap(self, number: int, most_kills: int, *, is_broken: bool = False) -> None:
        """One run. Raises Broken, with all that is known, where something does not hold."""
        draw = random.Random(f"{self.seed}/{number}")
        name = f"control{number}" if is_broken else f"lap{number}"
        files, run_dir = self.folder / f"{name}.files", self.folder / name
        files.mkdir()
        every_steps = draw.choice([1, 1, 2])
        # In most laps nothing of the job changes, and the run keeps the batch that its first ranks made; in others the
        # micro-batches change from start to start, and their product stays.
        first_ranks = draw.choice(list(SPLITS))
        kept = draw.choice(SPLITS[first_ranks]) if draw.random() < 0.6 else None
        pieces, newest, killed, before = [], 0, 0, ""
        for start_number in range(1, 1000):
            # Until there is a checkpoint nothing can be kept.
            fitting = [first_ranks] if kept and not newest else range(1, 5) if kept else list(SPLITS)
            worlds = {world: weight for world, weight in WORLDS.items() if world.num_ranks in fitting}
            world = draw.choices(list(worlds), list(worlds.values()))[0]
            argv = self._argv(run_dir, kept or draw.choice(SPLITS[world.num_ranks]), every_steps)
            fault = self._fault(draw, world) if killed < most_kills else None
            start = Start(start_number, world, argv, run_dir, files, fault, is_broken)
            committed = [step for step in committed_steps(run_dir) if step <= newest]  # what is past it is damaged
            outcome = run(start, self.launches)
            try:
                end = how_it_ended(start, outcome)
                pieces.append(piece_of(start, newest))
                newest = check_disk(start, committed, KEEP_LAST, trust=is_broken)
                if end == "stopped" and newest != max(pieces[-1].documents):
                    raise Broken(f"stopped after step {max(pieces[-1].documents)}, and saved step {newest}")
                if end == "done":
                    check_whole(run_dir, pieces, self.reference, self.documents, KEEP_LAST)
            except Broken as error:
                raise Broken(self._told(number, start, outcome, error, before)) from None
            if not is_broken:
                self._count(start, outcome, end)
            killed += end == "killed"
            what = outcome.killed or end
            print(f"  {start_number} {world}: step {newest}, {outcome.seconds:.1f} s, {what}; {fault}", flush=True)
            before = f"start {start_number}, {world}, {fault}: killed {outcome.killed}"
            if end == "done":
                return

    def _fault(self, draw: random.Random, world: World) -> Fault:
        """A kill. What writes is rank 0; anything else happens to any rank."""
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        rank, everyone, no_launcher = draw.randrange(world.num_ranks), draw.random() < 0.5, draw.random() < 0.3
        seconds = draw.random()
        operation = "write" if kind == "torn" else draw.choice(list(self.operations_a_save))
        number = 1 + int(draw.random() * 2.2 * self.operations_a_save[operation])
        if kind in ("file", "torn"):
            return Fault(kind, 0, number, operation, "checkpoints", everyone=everyone, no_launcher=no_launcher)
        if kind == "commit":  # the marker is opened, written and flushed
            kind = draw.choice(["file", "file", "torn"])
            number = 1 + int(draw.random() * (6 if kind == "file" else 2))
            return Fault(kind, 0, number, "", "checkpoints/step-", ".tmp", everyone=everyone, no_launcher=no_launcher)
        if kind == "any file":
            kind = draw.choice(["file", "torn"])
            # The lock and what is written beside it at the start; status.json and config.yaml under their first names; ...
            under, most = draw.choice(
                [("", 15), (".", 12), (".", 12), ("metrics.jsonl", 6), ("metrics.jsonl", 6), ("adapter", 15)]
            )
            return Fault(kind, 0, 1 + int(draw.random() * most), "", under, everyone=everyone, no_launcher=no_launcher)
        if kind == "step":
            return Fault(kind, rank, 1 + int(draw.random() * 20), everyone=everyone, no_launcher=no_launcher)
        if kind == "time":
            return Fault("time", rank, seconds=0.8 * seconds, since="first step", everyone=everyone, no_launcher=no_launcher)
        if kind == "stop":
            grace = 0.6 * draw.random()
            return Fault("stop", rank, seconds=0.5 * seconds, since="first step", grace=grace, everyone=everyone)
        # A rank that has not met the others is told by its launcher alone.
        return Fault("time", rank, seconds=2.0 * seconds, since="start", everyone=everyone)

    def _count(self, start: Start, outcome: Outcome, end: str) -> None:
        self.starts += 1
        self.counts["worlds"][str(start.world)] += 1
        if start.fault is None:
            return
        if end == "killed":
            self.kills += 1
            what = "everyone" if start.fault.everyone else f"rank {min(start.fault.rank, 1)}"
            self.counts["kinds"][f"{group_of(start.fault, outcome.killed or '')}, {what}"] += 1
        else:
            self.counts["ended before it was killed"][f"{end}, {start.fault.kind}"] += 1

    def _told(self, lap: int, start: Start, outcome: Outcome, error: Broken, before: str) -> str:
        folder = start.run_dir / "checkpoints"
        inside = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []
        return (
            f"{error}\n"
            f"--seed {self.seed} --lap {lap}, start {start.number} of the lap, after {self.kills} kills in all\n"
            f"world {start.world}: qlora {' '.join(start.argv)}\n"
            f"fault {start.fault}: killed {outcome.killed}\n"
            f"codes {outcome.codes} after {outcome.seconds:.1f} s; did not end by themselves: {outcome.stuck}\n"
            f"before: {before}\n"
            f"checkpoints: {inside}\n{tails(start)}"
        )


def control(campaign: Campaign, first: int, wanted: int) -> dict[str, Any]:
    """Laps with the protocol off, until so many were found wanting, or three times as many laps are done.

    A run that nobody kills has to come to its end even so: else something else than the protocol is found.
    """
    found: list[str] = []
    laps = 0
    if wanted:
        campaign.lap(-1, 0, is_broken=True)
    while len(found) < wanted and laps < 3 * wanted:
        try:
            campaign.lap(first + laps, KILLS_A_LAP, is_broken=True)
        except Broken as error:
            found.append(str(error).splitlines()[0])
            print(f"control {first + laps}: {found[-1]}", flush=True)
        laps += 1
    return {"laps": laps, "found": found}


def how_it_ended(start: Start, outcome: Outcome) -> str:
    """Done, killed, or stopped before it could be killed. Raises Broken for any other end."""
    if outcome.stuck:
        raise Broken(f"ranks {outcome.stuck} did not end by themselves")
    if outcome.is_done:  # what is killed after that was not killed
        return "done"
    if outcome.killed is not None:
        return "killed"
    # Where one has stopped, the launcher's signal may end another that is on its way out.
    if start.fault is not None and start.fault.kind == "stop" and EXIT_STOPPED in outcome.codes and all(outcome.codes):
        return "stopped"
    raise Broken(f"the start ends with {outcome.codes}, and nobody killed it: {last_error(start)}")


def last_error(start: Start) -> str:
    """What rank 0, or the first that says anything, ended with, in a line."""
    for rank in range(start.world.num_ranks):
        lines = start.log(rank).read_text(errors="replace").splitlines()
        errors = [line.strip() for line in lines if "rror" in line.split(":")[0]]
        if errors:
            return errors[-1]
    return "no word of an error"


def group_of(fault: Fault, killed: str) -> str:
    """What was being done, in a word."""
    if fault.kind == "time":
        return "loading" if fault.since == "start" else "at a time after the first step"
    if fault.kind in ("step", "stop"):
        return "in a step" if fault.kind == "step" else "on its way to a stop"
    operation, path = killed.split()[-2:]
    if "COMMITTED" in path:
        place = "committing"
    elif operation in ("os.remove", "os.rmdir") or (path.startswith("checkpoints/step-") and operation == "os.rename"):
        place = "removing"
    elif operation == "os.rename":
        place = "committing"
    elif path.startswith("checkpoints"):
        place = "saving"
    else:
        place = "files of the run"
    return f"{place}, {'half a write' if fault.kind == 'torn' else 'operation'}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--control", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lap", type=int, default=0)
    options = parser.parse_args()
    # What is told to end takes its ranks along.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    import_everything()
    options.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options.base, options.folder, options.seed)
    began = time.monotonic()
    lap = options.lap
    try:
        campaign.run_reference()
        while campaign.kills < options.kills:
            campaign.lap(lap, min(KILLS_A_LAP, options.kills - campaign.kills))
            print(f"lap {lap}: {campaign.kills} kills, {time.monotonic() - began:.0f} s", flush=True)
            lap += 1
    except Broken as error:
        print(error, flush=True)
        return 1
    seconds = time.monotonic() - began
    controlled = control(campaign, options.lap, options.control)
    report = {
        "kills": campaign.kills,
        "starts": campaign.starts,
        "laps": lap - options.lap,
        "seconds": round(seconds, 1),
        **{name: dict(counts.most_common()) for name, counts in campaign.counts.items()},
        "control": controlled | {"seconds": round(time.monotonic() - began - seconds, 1)},
    }
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
