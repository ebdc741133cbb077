"""What a start on one process imports, and that the collector is back when what stays has been imported."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

from qlora.cli.loading import modules_that_stay

# Needed under ZeRO, for Parquet and the hub, by a tracker, by a compiled graph, or never by a training job.
NEEDED_ELSEWHERE = (
    "deepspeed", "datasets", "pyarrow", "pandas", "wandb", "tensorboard", "peft", "trl", "scipy", "sklearn", "torchvision",
    "PIL", "torch._inductor.compile_fx", "transformers.trainer", "qlora.distributed.zero", "qlora.ops.triton.norm",
)  # fmt: skip
JOB = """
import gc, json, sys
from qlora.cli.main import main

code = main(sys.argv[1:])
print(json.dumps({"code": code, "modules": sorted(sys.modules), "frozen": gc.get_freeze_count(), "enabled": gc.isenabled()}))
"""


def test_a_job_on_one_process_imports_what_it_needs(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
    data = tmp_path / "train.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps(
            {
                "model": {"base": "builtin:tiny"},
                "data": {"train": [str(data)], "max_length": 64, "cache_dir": str(tmp_path / "cache")},
                "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", JOB, "train", str(job)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    assert "qlora.train.loop" in found["modules"]
    assert not set(NEEDED_ELSEWHERE) & set(found["modules"])
    assert found["enabled"]
    assert found["frozen"] > 100_000


def test_the_collector_rests_in_a_fresh_process_alone() -> None:
    """This one has torch already."""
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    with modules_that_stay():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_the_collector_is_back_after_an_import_that_fails() -> None:
    code = (
        "import gc\n"
        "from qlora.cli.loading import modules_that_stay\n"
        "try:\n"
        "    with modules_that_stay():\n"
        "        assert not gc.isenabled()\n"
        "        import no_such_module\n"
        "except ModuleNotFoundError:\n"
        "    print(gc.isenabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "True\n", done.stderr
