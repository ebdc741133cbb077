"""Adapters written by hand, and what merging them has to give, computed in float64 from the definitions."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapter.config_file import CONFIG_NAME
from qlora.adapter.read import WEIGHTS_NAME
from qlora.quant.source import resolve_base

PREFIX = "base_model.model."
ALPHA = 6


@dataclass(frozen=True)
class Kind:
    """A kind of layer: the base it is in, and the layers to adapt, by their paths.

    Attributes:
        quantized: ends of the names of weights that are quantized where the base is.
        transposed: the files hold these as (in, out).
    """

    architecture: str
    paths: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    quantized: tuple[str, ...] = ("_proj.weight",)
    transposed: bool = False
    embedding: bool = False


@dataclass(frozen=True)
class Variant:
    """How the layers of an adapter compute."""

    fields: dict[str, Any] = field(default_factory=dict)

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """r and s of the layer at a path."""
        last = path.rpartition(".")[2]
        r = self.fields.get("rank_pattern", {}).get(last, 4)
        alpha = self.fields.get("alpha_pattern", {}).get(last, ALPHA)
        return r, alpha / (math.sqrt(r) if self.fields.get("use_rslora") else r)


def read_base(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def random(shape: tuple[int, ...], seed: int, scale: float = 0.2) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_tensors(kind: Kind, variant: Variant, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, random."""
    tensors = {}
    for seed, path in enumerate(kind.paths):
        key = f"{PREFIX}{path}"
        r, _ = variant.rank_and_scaling(path)
        name = f"{path}.weight" if f"{path}.weight" in base else "model.embed_tokens.weight"
        rows, columns = base[name].shape[:: -1 if kind.transposed else 1]
        if kind.embedding:
            tensors[f"{key}.lora_embedding_A"] = random((r, rows), 10 * seed)
            tensors[f"{key}.lora_embedding_B"] = random((columns, r), 10 * seed + 1)
        else:
            tensors[f"{key}.lora_A.weight"] = random((r, columns), 10 * seed)
            tensors[f"{key}.lora_B.weight"] = random((rows, r), 10 * seed + 1)
        if variant.fields.get("lora_bias"):
            tensors[f"{key}.lora_B.bias"] = random((rows,), 10 * seed + 2)
        if variant.fields.get("use_dora"):
            size = columns if kind.embedding else rows
            tensors[f"{key}.lora_magnitude_vector"] = 1.0 + random((size,), 10 * seed + 3).abs()
    return tensors


def write_adapter(
    folder: Path,
    base: Path,
    tensors: dict[str, Tensor],
    *,
    dtype: str = "float32",
    quantization: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """An adapter's two files, as this project writes them."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": ALPHA, "target_modules": "all-linear"} | fields
    config["base_model_name_or_path"] = str(base)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    described = {"base": resolve_base(str(base)).record(), "dtype": dtype, "quantization": quantization}
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt", "qlora": json.dumps(described)})
    return folder


def through_4_bits(weight: Tensor, quantization: dict[str, Any]) -> Tensor:
    """A weight (out, in) as bitsandbytes gives it back.

    As one row: on CPUs it takes wrong scales where rows are no whole blocks.
    """
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous().reshape(1, -1),
        blocksize=quantization.get("block_size", 64),
        compress_statistics=quantization["double_quant"],
        quant_type=quantization["quant_type"],
    )
    return bitsandbytes.functional.dequantize_4bit(packed, state).reshape(weight.shape)


def expect(
    kind: Kind,
    variant: Variant,
    base: dict[str, Tensor],
    tensors: dict[str, Tensor],
    quantization: dict[str, Any] | None,
    onto: str,
) -> dict[str, Tensor]:
    """Every tensor of the merged model by its name in the base's files, float64."""
    merged = {}
    for name, value in base.items():
        is_quantized = quantization is not None and name.endswith(kind.quantized)
        weight = value.float()
        if is_quantized and onto == "dequantized":
            own = weight.T if kind.transposed else weight
            own = through_4_bits(own, quantization)
            weight = own.T if kind.transposed else own
        merged[name] = weight.double()
    for path in kind.paths:
        _, s = variant.rank_and_scaling(path)
        own = {key.removeprefix(f"{PREFIX}{path}."): v.double() for key, v in tensors.items() if f".{path}." in f".{key}"}
        name = f"{path}.weight"
        weight = merged[name] if name in merged else merged["model.embed_tokens.weight"].clone()
        if kind.embedding:
            weight = weight + s * (own["lora_embedding_B"] @ own["lora_embedding_A"]).T
        else:
            delta = s * own["lora_B.weight"] @ own["lora_A.weight"]
            weight = weight + (delta.T if kind.transposed else delta)
        if "lora_magnitude_vector" in own:
            of_columns = kind.embedding or kind.transposed
            norms = weight.norm(dim=0 if of_columns else 1, keepdim=True)
            m = own["lora_magnitude_vector"]
            weight = weight / norms * (m if of_columns else m[:, None])
        merged[name] = weight
        if "lora_B.bias" in own:
            merged[f"{path}.bias"] = merged[f"{path}.bias"] + s * own["lora_B.bias"]
    if quantization is not None and onto == "quantized":
        for name in merged:
            if name.endswith(kind.quantized):
                own = merged[name].float()
                merged[name] = through_4_bits(own.T if kind.transposed else own, quantization).double()
    return merged
