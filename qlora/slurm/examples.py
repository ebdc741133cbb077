"""The scripts in launch/slurm, by file name. `python -m qlora.slurm.examples` writes them anew, from the repository root."""

from __future__ import annotations

from pathlib import Path

from qlora.slurm.job import SlurmJob, Task, render

_CHAT = "configs/llama-3.1-8b_chat.yaml"
_RATES = ("1.0e-4", "2.0e-4", "4.0e-4")
FOLDER = Path("launch/slurm")
EXAMPLES = {
    "single_node": SlurmJob(name="single_node", nodes=1, gpus_per_node=8, launch="launch/accelerate/zero2.yaml"),
    "multi_node": SlurmJob(name="multi_node", nodes=4, gpus_per_node=8, launch="launch/accelerate/zero3.yaml"),
    "array": SlurmJob(
        name="learning_rates",
        nodes=1,
        gpus_per_node=8,
        launch="launch/accelerate/zero2.yaml",
        config=_CHAT,
        tasks=tuple(
            Task(
                (f"train.learning_rate={rate}", f"train.output_dir=runs/learning_rates/{index}"),
                f"runs/learning_rates/{index}",
            )
            for index, rate in enumerate(_RATES)
        ),
    ),
}


def main() -> None:
    """Write the scripts."""
    for name, job in EXAMPLES.items():
        (FOLDER / f"{name}.sbatch").write_text(render(job))


if __name__ == "__main__":
    main()
