"""What both sides compute, how many operations that is, and what an arm measures of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import measure, workload
from peers.rows import QUESTIONS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_operations_of_a_step_are_those_that_are_computed() -> None:
    """Against torch's own count of real PEFT's step, whose attention is whole where causal is counted here."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    model = LlamaForCausalLM._from_config(LlamaConfig(**TINY), attn_implementation="eager")
    lora = LoraConfig(r=workload.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.enable_input_require_grads()  # the first block's input has a gradient, as every other's
    ids = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        logits[0, -3:].sum().backward()
    step = {"input_ids": ids[0].tolist(), "labels": [-100] * 5 + [1] * 3, "seq_lengths": [8]}
    attention = 3 * 2 * 32 * 2 * 8 * 8
    head_of_others = 4 * 32 * 64 * 5  # PEFT's forward makes the logits of all places
    assert counter.get_total_flops() == workload.step_flop(step, TINY) + attention + head_of_others


@pytest.mark.long
def test_steps_are_those_of_this_projects_loader(tmp_path: Path) -> None:
    """Packs that end where documents end, labels where answers are, and documents that make up the packs again."""
    data = workload.make_data(tmp_path)
    settings = QUESTIONS | {"data": str(data["questions"]), "length": 128, "steps": 3}
    path = tmp_path / "steps.jsonl"
    from qlora.assets import tiny_path

    workload.write_steps(tiny_path(), settings, tmp_path, path)
    steps = workload.read_steps(path)
    assert len(steps) == 3
    for step in steps:
        assert sum(step["seq_lengths"]) == len(step["input_ids"]) == len(step["labels"]) <= 128
        told = [(i, label) for i, label in enumerate(step["labels"]) if label != workload.IGNORE]
        assert told
        assert all(step["input_ids"][i] == label for i, label in told)
    documents = workload.documents(steps)
    assert [n for d in documents for n in d["input_ids"]] == [n for step in steps for n in step["input_ids"]]
    assert [len(d["input_ids"]) for d in documents] == [n for step in steps for n in step["seq_lengths"]]


class _Keeps(torch.autograd.Function):
    """Keeps its input and 100 floats as autograd knows it, and 50 floats behind its back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, torch.ones(100))
        ctx.hidden = torch.ones(50)
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(**TINY)
        self.layers = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Keeps.apply(x * self.weight.sum())


def test_what_is_kept_for_backward_is_counted_once_whatever_keeps_it() -> None:
    model = _Model()
    saved = measure.SavedForBackward(model)
    x = torch.ones(10, requires_grad=True)
    out = model(x)
    # A block: what the product keeps (x and the sum's result), the product itself, 100 and 50 floats.
    block = 10 + 1 + 10 + 100 + 50
    assert saved.bytes_per_token_and_layer(tokens=1) == pytest.approx(4 * block)
    out.sum().backward()


def test_peak_memory_is_above_the_level_and_forgets_what_was_before() -> None:
    before = torch.ones(2**26 // 4)  # 64 MiB, gone again
    del before
    memory = measure.PeakMemory()
    there = torch.ones(2**25 // 4)
    del there
    # The system counts a thread's last pages late.
    assert abs(memory.above_bytes() / 2**25 - 1) < 0.2
