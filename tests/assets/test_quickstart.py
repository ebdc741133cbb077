"""`data` writes what the training reads; `show` refuses what is missing and counts what is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.assets import quickstart


def test_data_writes_questions_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["data", str(tmp_path / "a")]) == 0
    assert quickstart.main(["data", str(tmp_path / "b")]) == 0
    assert "800 questions" in capsys.readouterr().out
    answers = {}
    for name, count in (("train.jsonl", 800), ("eval.jsonl", 120)):
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
        answers[name] = {row["messages"][1]["content"] for row in rows}
    assert not answers["train.jsonl"] & answers["eval.jsonl"]


def test_writing_data_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from qlora.assets import quickstart, tiny_path; "
        f"quickstart.main(['data', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_show_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, data_dir = tmp_path / "run", tmp_path / "data"
    assert quickstart.main(["show", str(run_dir), str(data_dir)]) == 1
    assert "no adapter" in capsys.readouterr().err
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "adapter" / "adapter_config.json").write_text("{}")
    assert quickstart.main(["show", str(run_dir), str(data_dir)]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err


def test_training_losses_are_the_first_and_the_last_step(tmp_path: Path) -> None:
    from qlora.assets.show import training_losses

    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 3.0},  # written again after a resume
        {"step": 2, "eval_loss": 8.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_losses(path) == (4.0, 3.0, 2)


def test_sampling_is_spread_over_the_whole_list() -> None:
    from qlora.assets.show import sampled

    conversations = [[{"role": "user", "content": str(i)}] for i in range(10)]
    assert [c[0]["content"] for c in sampled(conversations, 5)] == ["0", "2", "4", "6", "8"]
    assert sampled(conversations, 20) == conversations
