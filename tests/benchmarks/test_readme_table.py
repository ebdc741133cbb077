"""The table in README is what the results make, and every benchmark says how it is called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import readme_table

FOLDER = Path(readme_table.__file__).parent
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "ArgumentParser(" in path.read_text())


def test_readme_has_the_table_that_the_results_make() -> None:
    text = (readme_table.ROOT / "README.md").read_text()
    assert text == readme_table.replaced(text, readme_table.made()), "run python benchmarks/readme_table.py"


def test_rows_that_were_not_measured_are_not_in_the_table(record: Callable[..., dict[str, Any]]) -> None:
    assert readme_table.table([]) == []
    lines = readme_table.table([record(ratio) for ratio in (1.9, 2.5, 2.0, 2.1, 1.0)])
    (line,) = [line for line in lines if "**" in line]
    assert "questions" in line
    assert "| **2** | 1.9 to 2.1 | 5 | 2026-01-01 |" in line
    assert record()["machine"] in lines[-1]


def test_checkpoints_are_read_from_their_latest_result(tmp_path: Path) -> None:
    assert readme_table.checkpoint_line(tmp_path) is None
    head = "| | of 500 steps: held up | held up, and standing still while it is written |\n|---|---|---|\n"
    (tmp_path / "checkpoints_x_2026-01-01.md").write_text(head + "| one process | 0.500% | 0.900% | +1% |\n")
    (tmp_path / "checkpoints_x_2026-01-02.md").write_text(head + "| one process | 0.053% | 0.235% | +1% |\n")
    line = readme_table.checkpoint_line(tmp_path)
    assert line is not None
    assert "one process: 0.053%, at most 0.235% (2026-01-02" in line


def test_content_goes_between_the_marks() -> None:
    text = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    assert readme_table.replaced(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="not there"):
        readme_table.replaced("no marks", "new")


@pytest.mark.parametrize(("value", "unit", "text"), [(3 * 2**20, "MiB", "3.0 MiB"), (1234.5, "tokens/s", "1,234 tokens/s")])
def test_figures_have_units(value: float, unit: str, text: str) -> None:
    assert readme_table.figure(value, unit) == text


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_says_how_it_is_called(script: str) -> None:
    done = subprocess.run([sys.executable, FOLDER / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert script in done.stdout
