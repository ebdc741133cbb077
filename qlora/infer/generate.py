"""Answering prompts with the base, with or without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora.adapter.base import load_base
from qlora.adapter.files import TEMPLATE_NAME, load_adapter, open_adapter
from qlora.config.schema import ModelConfig, QuantizationConfig
from qlora.errors import AdapterError

Conversation = list[dict[str, str]]


def open_for_inference(adapter: Path | None, base: str | None) -> tuple[Any, Any]:
    """The base an adapter was trained on, quantized as it was then, with the adapter in it, and the tokenizer.

    Args:
        base: used in place of the recorded one; needed for an adapter that records none.

    Raises:
        AdapterError: the adapter records no base and none is given, or it does not fit.
    """
    defaults = ModelConfig()
    dtype, quantization, revision = defaults.dtype, defaults.quantization, None
    if adapter is not None:
        found = open_adapter(adapter)
        if "dtype" in found.described:
            dtype, stated = found.described["dtype"], found.described["quantization"]
            quantization = None if stated is None else QuantizationConfig.model_validate(stated)
        if base is None:
            base, revision = found.config.base, found.config.revision
        if base is None:
            raise AdapterError("the adapter does not say which base it is for", place=str(adapter), next_step="give --base")
    model, tokenizer = load_base(base or defaults.base, revision=revision, dtype=dtype, quantization=quantization)
    if adapter is not None:
        load_adapter(model, adapter)
        template = adapter / TEMPLATE_NAME
        if template.is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return model, tokenizer


def run_generate(
    adapter: Path | None,
    prompt: str,
    *,
    base: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> str:
    """What the model answers to one prompt; what `qlora generate` prints."""
    model, tokenizer = open_for_inference(adapter, base)
    conversation = [{"role": "system", "content": system}] if system else []
    conversation.append({"role": "user", "content": prompt})
    return generate_texts(model, tokenizer, [conversation], max_new_tokens, temperature=temperature)[0]


def generate_texts(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
) -> list[str]:
    """Answer conversations in batches, padded on the left; greedy at temperature 0. Rank-local.

    Each conversation ends with the turn to be answered. A tokenizer without a chat template gets the contents as plain
    text. Returns the new text alone, without special tokens, in the order of the conversations.
    """
    texts = [_prompt_text(tokenizer, conversation) for conversation in conversations]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    # Prompts of like length share a batch, so that little is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A template prints its special tokens itself; plain text was trained with those the tokenizer adds.
        plain = not getattr(tokenizer, "chat_template", None)
        rows = [tokenizer(texts[i], add_special_tokens=plain)["input_ids"] for i in chosen]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
                eos_token_id=_stop_tokens(model, tokenizer), **sampling,
            )  # fmt: skip
        for i, new in zip(chosen, output[:, longest:], strict=True):
            answers[i] = tokenizer.decode(new, skip_special_tokens=True).strip()
    model.train(was_training)
    return answers


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
