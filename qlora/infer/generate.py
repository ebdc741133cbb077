"""Answering prompts with the base, with or without an adapter, on one process or many.

Where ranks keep shares of the base, a forward pass gathers them, so all ranks make the same number of forward passes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora.adapter.base import load_base
from qlora.adapter.files import TEMPLATE_NAME, AdapterFile
from qlora.config.schema import ModelConfig, QuantizationConfig
from qlora.distributed import runtime as processes
from qlora.distributed.runtime import Runtime
from qlora.errors import AdapterError
from qlora.infer.opening import find_adapter, put_in
from qlora.lora.kinds import WRAPPERS
from qlora.quant.source import read_merged, resolve_base

Conversation = list[dict[str, str]]


def run_generate(
    adapter: Path | None,
    prompts: Sequence[str],
    *,
    base: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> list[str]:
    """What the model answers to each prompt; what `qlora generate` prints. Collective.

    Returns the answers in the order of the prompts on the main rank, and nothing elsewhere.
    """
    runtime = processes.start_inference()
    try:
        runtime.refuse_differences(
            {
                "prompts": hashlib.sha256(repr((system, *prompts)).encode()).hexdigest(),
                "options": repr((adapter is None, base, max_new_tokens, temperature)),
            }
        )
        model, tokenizer = open_for_inference(runtime, adapter, base)
        before = [{"role": "system", "content": system}] if system else []
        conversations = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
        if temperature > 0 and runtime.rank > 0:
            # All ranks begin with the same seed.
            torch.manual_seed(torch.initial_seed() + runtime.rank)
        with processes.for_inference(runtime, model, leaves=WRAPPERS):
            answers = generate_texts(
                model, tokenizer, conversations, max_new_tokens, temperature=temperature, runtime=runtime
            )
        return answers if runtime.is_main else []
    finally:
        runtime.end()


def open_for_inference(runtime: Runtime, adapter: Path | None, base: str | None) -> tuple[Any, Any]:
    """The base an adapter was trained on, quantized as it was then, with the adapter in it, and the tokenizer. Collective.

    Without an adapter a merged model is opened as it was written, and every other base by default.

    Args:
        base: used in place of the recorded one; needed for an adapter that records none.

    Raises:
        AdapterError: the adapter records no base and none is given, or it does not fit.
    """
    found = find_adapter(runtime, adapter) if adapter is not None else None
    wanted = _wanted_base(found, base)
    source = runtime.together(lambda: resolve_base(wanted.base, wanted.revision))
    runtime.refuse_differences({"base": str(source.fingerprint)})
    merged = runtime.together(lambda: read_merged(source.folder)) if found is None else None
    if merged is not None:
        wanted = wanted.model_copy(update={"dtype": merged.dtype, "quantization": None})
    model, tokenizer = load_base(
        wanted.base,
        revision=wanted.revision,
        dtype=wanted.dtype,
        quantization=wanted.quantization,
        device=runtime.device,
        sharding=runtime.sharding(),
        adapter=adapter,
    )
    if found is not None:
        put_in(runtime, model, found)
        template = found.folder / TEMPLATE_NAME
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return model, tokenizer


def _wanted_base(found: AdapterFile | None, base: str | None) -> ModelConfig:
    """Which base to load, and how: as recorded with the adapter, and by default where nothing is recorded."""
    wanted = ModelConfig()
    if found is not None:
        if "dtype" in found.described:
            stated = found.described["quantization"]
            quantization = None if stated is None else QuantizationConfig.model_validate(stated)
            wanted = wanted.model_copy(update={"dtype": found.described["dtype"], "quantization": quantization})
        if base is None and found.config.base is None:
            raise AdapterError(
                "the adapter does not say which base it is for", place=str(found.folder), next_step="give --base"
            )
        if base is None:
            return wanted.model_copy(update={"base": found.config.base, "revision": found.config.revision})
    return wanted.model_copy(update={"base": base}) if base is not None else wanted


def generate_texts(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    runtime: Runtime | None = None,
) -> list[str]:
    """Answer conversations in batches, padded on the left; greedy at temperature 0.

    Rank-local; with a runtime a collective: the conversations, the same on every rank, are shared out, and every rank
    gets all answers. Each conversation ends with the turn to be answered. A tokenizer without a chat template gets the
    contents as plain text. Returns the new text alone, without special tokens, in the order of the conversations.
    """
    rank, world_size = (runtime.rank, runtime.world_size) if runtime is not None else (0, 1)
    device = runtime.device if runtime is not None else model.device
    in_step = runtime is not None and runtime.is_sharded

    def render() -> list[str]:
        return [_prompt_text(tokenizer, conversation) for conversation in conversations]

    texts = render() if runtime is None else runtime.from_main(render)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    # A rank that is done goes on with forward passes until all are; hooks that gather shares cannot be compiled.
    stepping = {"synced_gpus": True, "disable_compile": True} if in_step else {}
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers: dict[int, str] = {}
    was_training = model.training
    model.eval()
    for own in share_out(order, batch_size, rank, world_size):
        # In step, a rank that has nothing to answer answers something that another one does.
        chosen = own or (order[:1] if in_step else [])
        if not chosen:
            continue
        # A template prints its special tokens itself; plain text was trained with those the tokenizer adds.
        plain = not getattr(tokenizer, "chat_template", None)
        rows = [tokenizer(texts[i], add_special_tokens=plain)["input_ids"] for i in chosen]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
                eos_token_id=_stop_tokens(model, tokenizer), **sampling, **stepping,
            )  # fmt: skip
        for i, new in zip(own, output[:, longest:], strict=False):
            answers[i] = tokenizer.decode(new, skip_special_tokens=True).strip()
    model.train(was_training)
    if runtime is not None:
        answers = {i: answer for part in runtime.gather_objects(answers) for i, answer in part.items()}
    return [answers[i] for i in range(len(texts))]


def share_out(order: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[Sequence[int]]:
    """The batches of one rank: as many as every other rank's and about as large, some perhaps empty. Rank-local."""
    num_parts = math.ceil(len(order) / (batch_size * world_size)) * world_size
    cuts = [part * len(order) // num_parts for part in range(num_parts)] + [len(order)]
    return [order[cuts[part] : cuts[part + 1]] for part in range(rank, num_parts, world_size)]


def _prompt_text(tokenizer: Any, conversation: Conversation) -> str:
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return "\n".join(turn["content"] for turn in conversation)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The end tokens of the model's generation config and the tokenizer's own, which is what training taught."""
    stated = model.generation_config.eos_token_id
    found = [] if stated is None else ([stated] if isinstance(stated, int) else list(stated))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(tokenizer.eos_token_id)
    return found
