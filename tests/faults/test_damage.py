"""Checkpoints of a real run, of which something was cut off, flipped, deleted or added: never taken, always named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora.checkpoint.resume import find_checkpoint
from tests.faults.children import EVERY_TWO, Ended, Jobs

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def run_dir(whole: Ended, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with two checkpoints, of which tests damage the newest and mend it again."""
    target = tmp_path_factory.mktemp("damage") / "run"
    shutil.copytree(whole.run_dir, target, ignore=shutil.ignore_patterns("adapter", "step-00000002", "step-00000007"))
    return target


@pytest.fixture
def newest(run_dir: Path) -> Iterator[Path]:
    """The newest checkpoint, put back as it was afterwards."""
    folder = run_dir / "checkpoints/step-00000006"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


NAMES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json")


def falls_back(run_dir: Path, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The checkpoint before it is taken, and the damage is named."""
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    err = capsys.readouterr().err
    assert found.trainer.step == 4, err
    for part in ("warning:", "step-00000006", "trying the checkpoint before it", *parts):
        assert part in err


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_every_64_bytes(run_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The name and both sizes are said."""
    content = (newest / name).read_bytes()
    places = [*range(0, len(content), 64), len(content) - 1]
    for size in places[:: max(1, len(places) // 150)] + places[-2:]:
        (newest / name).write_bytes(content[:size])
        sizes = () if name == "manifest.json" else (f"found: {size} bytes", f"wanted: {len(content)} bytes")
        falls_back(run_dir, capsys, name, *sizes)


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit(run_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content, draw = (newest / name).read_bytes(), random.Random(name)
    for _ in range(30):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(bytes(flipped))
        falls_back(run_dir, capsys, "checksum", name)


@pytest.mark.parametrize("name", [*NAMES, "COMMITTED"])
def test_a_deleted_file(run_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (newest / name).unlink()
    if name == "COMMITTED":  # it was never finished, or is about to be removed
        found = find_checkpoint(run_dir, "auto")
        assert found is not None
        assert found.trainer.step == 4
    else:
        falls_back(run_dir, capsys, name, "No such file or directory")


def test_a_file_too_many_is_no_damage(run_dir: Path, newest: Path) -> None:
    (newest / "notes.txt").write_text("of mine")
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.trainer.step == 6


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "optimizer.safetensors").write_bytes(b""), "optimizer.safetensors is cut short"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors cannot be read"),
    ],
)
def test_a_run_goes_on_from_the_one_before_and_sets_the_damaged_one_aside(
    jobs: Jobs, whole: Ended, run_dir: Path, tmp_path: Path, damage: Damage, says: str
) -> None:
    """What comes out is the run that met no fault."""
    own = tmp_path / "run"
    shutil.copytree(run_dir, own)
    damage(own / "checkpoints/step-00000006")
    ended = jobs.train(own, *EVERY_TWO)
    assert ended.code == 0, ended.log
    for part in (says, "after step 4", "aside-1-step-00000006"):
        assert part in ended.log
    assert ended.adapter == whole.adapter
    assert ended.losses == whole.losses


def test_where_all_are_damaged_nothing_is_started_over(jobs: Jobs, run_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run_dir, own)
    for folder in (own / "checkpoints").iterdir():
        (folder / "trainer_state.json").write_text("{}")
    before = sorted((path, path.stat().st_mtime_ns) for path in (own / "checkpoints").rglob("*"))
    jobs.train(own, *EVERY_TWO).is_one_error("every checkpoint of this run is damaged", "checkpoint.resume to none")
    assert sorted((path, path.stat().st_mtime_ns) for path in (own / "checkpoints").rglob("*")) == before
    status = json.loads((own / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


@pytest.mark.parametrize(
    ("change", "number", "says"),
    [
        ("lora.r=4", 2 * 2 * 7, "has shape (3, 64), this job trains (4, 64)"),  # A and B of seven layers in two blocks
        ("lora.target_modules=[q_proj, up_proj]", 2 * 2 * 5, "is not trained here"),
    ],
)
def test_tensors_of_other_names_and_shapes_are_counted_and_five_are_shown(
    jobs: Jobs, run_dir: Path, tmp_path: Path, change: str, number: int, says: str
) -> None:
    """Whatever is forced: a tensor that does not fit is never left out."""
    own = tmp_path / "run"
    shutil.copytree(run_dir, own)
    ended = jobs.train(own, *EVERY_TWO, change, "--force")
    ended.is_one_error(f"{number} tensors of the adapter do not fit this job", says, "another train.output_dir")
    assert ended.log[ended.log.index("do not fit this job") :].count("base_model.") == 5
