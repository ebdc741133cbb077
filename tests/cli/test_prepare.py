"""`qlora prepare` on the command line: what it hands over, what it refuses before torch is loaded, what it prints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from qlora.cli.main import main
from qlora.config.schema import ModelConfig, QuantizationConfig

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the verb hands over to the function that does the work."""
    seen: Calls = []

    def run_prepare(*args: Any, **kwargs: Any) -> Path:
        seen.append((args, kwargs))
        return Path(args[1])

    fake = ModuleType("qlora.quant.prepare")
    fake.run_prepare = run_prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qlora.quant.prepare", fake)
    return seen


def test_the_defaults_are_those_of_the_job_file(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", "some/base", str(out)]) == 0
    assert calls == [
        (("some/base", out), {"revision": None, "dtype": ModelConfig().dtype, "quantization": QuantizationConfig()})
    ]
    assert capsys.readouterr().out == f"{out}\n"


def test_every_option_is_handed_over(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    options = ["--quant-type", "fp4", "--block-size", "128", "--no-double-quant", "--dtype", "float32", "--revision", "v1"]
    skipped = ["--skip-module", "o_proj", "--skip-module", "layers.0.mlp"]
    assert main(["prepare", "some/base", str(tmp_path / "out"), *options, *skipped]) == 0
    quantization = QuantizationConfig(
        quant_type="fp4", block_size=128, double_quant=False, skip_modules=["o_proj", "layers.0.mlp"]
    )
    assert calls[0][1] == {"revision": "v1", "dtype": "float32", "quantization": quantization}


@pytest.mark.parametrize(
    ("field", "option"),
    [("bits", "--bits"), ("quant_type", "--quant-type"), ("block_size", "--block-size"), ("dtype", "--dtype")],
)
def test_choices_are_those_of_the_job_file(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, option: str
) -> None:
    section = ModelConfig if field in ModelConfig.model_fields else QuantizationConfig
    choices = [str(choice) for choice in get_args(section.model_fields[field].annotation)]
    for choice in choices:
        assert main(["prepare", "some/base", str(tmp_path / "out"), option, choice]) == 0
    assert len(calls) == len(choices)
    capsys.readouterr()
    wrong = "7" if field in ("bits", "block_size") else "int8"
    assert main(["prepare", "some/base", str(tmp_path / "out"), option, wrong]) == 2
    assert capsys.readouterr().err == f"error: {option}: cannot be used\n  found: {wrong}\n  wanted: {', '.join(choices)}\n"
    assert main(["prepare", "-h"]) == 0
    assert "|".join(choices) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere", "out"], "error: ./nowhere: no such folder"),
        (["/nowhere/at/all", "out"], "error: /nowhere/at/all: no such folder"),
        (["base", "base"], "error: base: would overwrite what is there\n  found: a folder with files"),
        (["base", "base/file"], "error: base/file: would overwrite what is there\n  found: a file"),
        (["./base", "out", "--revision", "v1"], "error: --revision: only hub ids have revisions\n  found: v1 of ./base"),
        (["builtin:tiny", "out", "--revision", "v1"], "error: --revision: only hub ids have revisions"),
        (["base", "out", "--bits", "8", "--quant-type", "fp4"], "error: --quant-type: in 8 bits a row has one scale"),
        (["base", "out", "--bits", "8", "--no-double-quant"], "error: --double-quant: in 8 bits a row has one scale"),
    ],
)
def test_what_is_refused_before_any_work(
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/file").touch()
    assert main(["prepare", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert calls == []


def test_help_and_mistakes_are_answered_without_torch() -> None:
    code = (
        "import sys\n"
        "from qlora.cli.main import main\n"
        "codes = [main(['prepare', '-h']), main(['prepare', 'a/b', 'out', '--block-size', '3'])]\n"
        "assert codes == [0, 2], codes\n"
        "assert not {'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_it_prepares(make_base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a base to a folder, and an error of the work itself."""
    base, out = make_base("llama"), tmp_path / "out"
    capsys.readouterr()
    assert main(["prepare", str(base), str(out), "--quant-type", "fp4"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "qlora_base.json"}
    assert main(["prepare", str(out), str(tmp_path / "again")]) == 2
    assert "in 4 bits already, prepared from" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
