"""Handing a batch script to SLURM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from qlora.errors import LaunchError

SECONDS = 120  # a busy controller lets sbatch wait, and try again


def submit(script: str, *, logs: Path) -> str:
    """Submit a batch script and return the job's id.

    Args:
        logs: folder of the log files, which is made: SLURM ends a job without a word whose log it cannot open.

    Raises:
        LaunchError: there is no sbatch here, or it refuses, with its words.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LaunchError(
            "there is no sbatch on this machine",
            place="--submit",
            next_step="leave --submit out, and submit the script where SLURM is: sbatch FILE",
        )
    try:
        logs.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sbatch, "--parsable"], input=script, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except OSError as error:
        raise LaunchError(f"cannot be submitted ({error.strerror})", place=str(error.filename or sbatch)) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"sbatch did not answer in {SECONDS} s",
            place="sbatch",
            next_step="squeue --me shows whether the job was taken; sinfo, whether SLURM answers",
        ) from error
    if done.returncode:
        raise LaunchError("sbatch refused the job", place="sbatch", found=done.stderr.strip() or f"code {done.returncode}")
    return done.stdout.strip().partition(";")[0]  # ID, or ID;CLUSTER
