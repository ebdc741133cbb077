"""Bases of random weights for `gpu.py`: made on the device, quantized layer by layer, written as a folder that anyone opens.

Nothing is fetched, and of a quantized base one layer at a time is in 16 bits. The folder is what `qlora prepare` would
write, so that this project, transformers and what is built on it open the same bytes.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.assets import tiny_path
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.plan.shapes import shapes_from_config
from qlora.quant.linear import Linear4bit
from qlora.quant.prepare import plan_quantized
from qlora.quant.write import Planned, write_model

# Llama-3.1-8B's config.json, but for the scaling of its rotary frequencies, and with room for long documents.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128,
    "max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 4352, "head_dim": 32,
}  # fmt: skip
STD = 0.02


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of `8b` or `tiny`, with another number of layers where asked for."""
    config = {"8b": LLAMA_8B, "tiny": TINY}[shape]
    return config if layers is None else config | {"num_hidden_layers": layers}


def make_base(folder: Path, config: dict[str, Any], device: torch.device, *, quantized: bool) -> dict[str, Any]:
    """Write config, tokenizer and weights. Returns bytes and seconds."""
    from transformers import AutoTokenizer

    start = time.perf_counter()
    folder.mkdir(parents=True)
    spec = QuantSpec()
    stated = {"quantization_config": _quantization(spec)} if quantized else {}
    (folder / "config.json").write_text(json.dumps(config | stated, indent=2))
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(STD)

    def quantize(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        packed, statistics = nf4.quantize(draw(shape), spec)
        return packed.cpu(), statistics.cpu()

    planned: list[Planned] = []
    for tensor in shapes_from_config(config).tensors:
        shape = tensor.shape
        if quantized and tensor.kind == "linear":
            layer = Linear4bit(shape[1], shape[0], False, spec, torch.bfloat16, device="meta")
            planned += plan_quantized(layer, tensor.path, torch.bfloat16, partial(quantize, shape))
        else:
            planned.append(Planned(tensor.path, shape, torch.bfloat16, partial(draw, shape)))
    write_model(folder, planned)
    return {"bytes": sum(tensor.num_bytes for tensor in planned), "seconds": time.perf_counter() - start}


def _quantization(spec: QuantSpec) -> dict[str, Any]:
    """What transformers is told."""
    from transformers import BitsAndBytesConfig

    stated: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=spec.storage,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    return stated
