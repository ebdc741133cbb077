"""Answers in batches against a plain greedy loop, one prompt at a time."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora
from qlora.distributed import runtime as processes
from qlora.distributed.runtime import Runtime
from qlora.errors import AdapterError
from qlora.infer.generate import generate_texts, open_for_inference, run_generate, share_out

PROMPTS = ["what", "hello world, what is this? " * 3, "an answer to the question", "x"]


@pytest.fixture(scope="module")
def opened(random_base: Path) -> tuple[Any, Any]:
    return qlora.load_base(str(random_base), dtype="float32")


@pytest.fixture(scope="module")
def alone() -> Runtime:
    return processes.start_inference()


def talks(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def greedy(model: Any, tokenizer: Any, prompt: str, num_new: int, stop: set[int]) -> str:
    text = tokenizer.apply_chat_template(talks([prompt])[0], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < num_new and not (new and new[-1] in stop):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_answers_like_one_prompt_at_a_time(opened: tuple[Any, Any], batch_size: int) -> None:
    model, tokenizer = opened
    wanted = [greedy(model, tokenizer, prompt, 8, {tokenizer.eos_token_id}) for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, talks(PROMPTS), 8, batch_size) == wanted
    assert len(set(wanted)) == len(PROMPTS)


def test_it_stops_at_the_tokenizers_end_of_turn_and_at_the_models(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training taught the former; a model's generation config may know another."""
    model, tokenizer = opened
    text = tokenizer.apply_chat_template(talks(["what"])[0], tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        first = int(model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1].argmax())
    assert first != tokenizer.eos_token_id
    whole = generate_texts(model, tokenizer, talks(["what"]), 8)[0]
    alone = generate_texts(model, tokenizer, talks(["what"]), 1)[0]
    assert len(alone) < len(whole)
    with monkeypatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [first, tokenizer.eos_token_id])
        assert generate_texts(model, tokenizer, talks(["what"]), 8)[0] == alone
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(first)
    assert generate_texts(model, other, talks(["what"]), 8)[0] in (alone, "")  # a special token now


@pytest.mark.parametrize("num_prompts", [0, 1, 2, 7, 32, 33, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_prompts_are_shared_out_evenly(num_prompts: int, world_size: int, batch_size: int) -> None:
    order = list(range(num_prompts))[::-1]
    parts = [share_out(order, batch_size, rank, world_size) for rank in range(world_size)]
    num_batches = -(-num_prompts // (batch_size * world_size))
    assert [len(own) for own in parts] == [num_batches] * world_size
    batches = [list(parts[rank][number]) for number in range(num_batches) for rank in range(world_size)]
    assert [i for batch in batches for i in batch] == order
    sizes = [len(batch) for batch in batches] or [0]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_training_mode_is_given_back(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    model.train()
    generate_texts(model, tokenizer, talks(["x"]), 1)
    assert model.training
    model.eval()
    generate_texts(model, tokenizer, talks(["x"]), 1)
    assert not model.training


def test_a_tokenizer_without_a_template_gets_the_text_alone(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    ids = plain("hello world", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert generate_texts(model, plain, talks(["hello world"]), 1) == [plain.decode([first]).strip()]


def test_the_system_message_and_the_temperature_count(random_base: Path) -> None:
    base = str(random_base)
    plain = run_generate(None, ["what"], base=base, max_new_tokens=8)
    assert run_generate(None, ["what"], base=base, max_new_tokens=8) == plain
    assert run_generate(None, ["what"], base=base, max_new_tokens=8, system="an answer") != plain
    torch.manual_seed(0)
    assert run_generate(None, ["what"], base=base, max_new_tokens=8, temperature=5.0) != plain


@pytest.fixture
def adapter(random_base: Path, tmp_path: Path) -> Path:
    model, _ = qlora.load_base(str(random_base), dtype="float32", quantization=qlora.QuantizationConfig(block_size=128))
    qlora.inject_lora(model, qlora.LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return qlora.save_adapter(model, tmp_path / "adapter")


def test_the_base_is_opened_as_it_was_trained_on(adapter: Path, alone: Runtime) -> None:
    model, _ = open_for_inference(alone, adapter, None)
    assert model.qlora_base.quantization.block_size == 128
    assert model.dtype == torch.float32


def test_another_base_and_no_base_are_refused(adapter: Path, alone: Runtime, random_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="trained on another base"):
        open_for_inference(alone, adapter, str(other))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="does not say which base"):
        open_for_inference(alone, adapter, None)
    open_for_inference(alone, adapter, str(random_base))
