"""What comes from a hub, and what must not go there: commits, bases that a config names, tokens. The hub is a stub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora.cli.main import main
from tests.faults.children import Ended, Jobs, in_child

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORT = ("train.max_steps=2", "checkpoint.every_steps=1")


def stub_hub(base: Path, cache: Path, asked: Path) -> None:
    """Let the hub have one model, owner/name, whose main branch is at COMMIT; what it is asked for is written down."""
    import huggingface_hub

    folder = cache / "models--owner--name/snapshots" / COMMIT
    if not folder.exists():
        shutil.copytree(base, folder)

    def snapshot_download(name: str, *, revision: str | None = None, **_: Any) -> str:
        with asked.open("a") as file:
            file.write(json.dumps([name, revision]) + "\n")
        assert name == "owner/name"
        assert revision in (None, "main", COMMIT)
        return str(folder)

    huggingface_hub.snapshot_download = snapshot_download  # type: ignore[assignment]


@pytest.fixture(scope="module")
def of_the_hub(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A run on a base of the hub, of which no revision was named; and the folder of the stub."""
    folder = tmp_path_factory.mktemp("hub")

    def fault() -> None:
        stub_hub(jobs.project.base, folder, folder / "asked")

    ended = jobs.train(folder / "run", *SHORT, "model.base=owner/name", fault=fault)
    assert ended.code == 0, ended.log
    return ended, folder


def test_a_revision_that_is_not_named_is_resolved_to_a_commit_and_kept(of_the_hub: tuple[Ended, Path]) -> None:
    run_dir = of_the_hub[0].run_dir
    for folder in sorted((run_dir / "checkpoints").iterdir()):
        recorded = json.loads((folder / "manifest.json").read_text())["identity"]["base"]
        assert (recorded["name"], recorded["revision"]) == ("owner/name", COMMIT)
    for folder in (run_dir / "adapter", run_dir / "checkpoints/step-00000002"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", COMMIT)


def test_an_adapter_asks_for_the_commit_that_it_was_trained_on(
    jobs: Jobs, of_the_hub: tuple[Ended, Path], tmp_path: Path
) -> None:
    ended, folder = of_the_hub
    asked = tmp_path / "asked"

    def work() -> int:
        stub_hub(jobs.project.base, folder, asked)
        return main(["generate", "--adapter", str(ended.run_dir / "adapter"), "--prompt", "hello", "--max-new-tokens", "2"])

    log = tmp_path / "log"
    assert in_child(work, log) == 0, log.read_text()
    assert {tuple(json.loads(line)) for line in asked.read_text().splitlines()} == {("owner/name", COMMIT)}


def test_where_the_user_names_a_base_the_one_in_the_config_is_not_asked_for(
    jobs: Jobs, of_the_hub: tuple[Ended, Path], tmp_path: Path
) -> None:
    adapter, asked = tmp_path / "adapter", tmp_path / "asked"
    shutil.copytree(of_the_hub[0].run_dir / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/hostile"}))

    def work() -> int:
        stub_hub(jobs.project.base, tmp_path, asked)
        words = ["generate", "--adapter", str(adapter), "--base", str(jobs.project.base), "--prompt", "hello"]
        return main([*words, "--max-new-tokens", "2"]) or main(["inspect", str(adapter)])

    log = tmp_path / "log"
    assert in_child(work, log) == 0, log.read_text()
    assert not asked.exists()


def test_no_token_of_the_environment_is_in_what_a_run_leaves_or_says(jobs: Jobs, tmp_path: Path) -> None:
    """A run that ends well, and one that ends with an error that holds one."""
    canaries = {
        "HF_TOKEN": "hf_" + "canaryOne" * 4,
        "WANDB_API_KEY": "canaryTwo" * 5,
        "MLFLOW_TRACKING_TOKEN": "canaryThree" * 3,
    }

    def fault() -> None:
        os.environ |= canaries

    def spoil() -> None:
        fault()
        from qlora.train import loop

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError(f"https://hub/?token={canaries['HF_TOKEN']}&key={canaries['WANDB_API_KEY']}")

        loop.run_step = fail  # type: ignore[assignment]

    good = jobs.train(tmp_path / "good", *SHORT, fault=fault)
    bad = jobs.train(tmp_path / "bad", *SHORT, fault=spoil)
    assert (good.code, bad.code) == (0, 1), good.log + bad.log
    assert "token=***" in bad.log
    assert bad.status["state"] == "failed"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for canary in canaries.values():
        assert not [content for content in written if canary.encode() in content]
        assert canary not in good.log + bad.log
