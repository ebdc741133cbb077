"""A chat template given for training goes wherever the adapter goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora.cli.main import main
from qlora.distributed import runtime as processes
from qlora.infer.generate import generate_texts, open_for_inference

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def run(random_base: Path, tmp_path: Path) -> Path:
    """One step on a base without a template of its own, with one given for training."""
    base = tmp_path / "base"
    shutil.copytree(random_base, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": "an answer"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {{base: '{base}', dtype: float32}}\n"
        f"lora: {{r: 2}}\n"
        f"data: {{train: ['{tmp_path / 'rows.jsonl'}'], chat_template: '{tmp_path / 'template.jinja'}', max_length: 64, "
        f"cache_dir: '{tmp_path / 'cache'}'}}\n"
        f"train: {{output_dir: '{tmp_path / 'run'}', max_steps: 1}}\n"
    )
    assert main(["train", str(job)]) == 0
    return tmp_path / "run"


def test_the_template_of_training_is_that_of_use(run: Path, tmp_path: Path) -> None:
    for folder in (run / "adapter", run / "checkpoints/step-00000001"):
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
        assert main(["inspect", str(folder)]) == 0
    model, tokenizer = open_for_inference(processes.start_inference(), run / "adapter", None)
    assert tokenizer.chat_template == TEMPLATE
    assert len(generate_texts(model, tokenizer, [[{"role": "user", "content": "what"}]], 3)) == 1
    assert main(["merge", str(run / "adapter"), str(tmp_path / "merged")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
