"""The tensors of a base by name and shape, from the headers of its files or, where there are none, from its config.json.

A plan needs no weight, only sizes. A safetensors header gives them exactly; for models built like Llama they follow from a
few numbers of the config, so that a base can be planned before it is fetched.
What kind a tensor is follows from its name and number of dimensions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora.errors import BaseModelError
from qlora.model_files import ITEMSIZES, find_weight_files, read_config, read_header

Kind = Literal["linear", "embedding", "head", "norm", "bias", "expert", "other"]
Shape = tuple[int, ...]

CONV1D = ("gpt2", "openai-gpt")  # transformers' Conv1D: their files hold linear weights as (in, out)
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
CONFIG_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_HEADS = ("lm_head", "embed_out")
_ROUTERS = ("gate", "router")  # beside experts; a model with experts computes them outside its linear layers
_NORM = re.compile(r"norm|^ln_|^ln\d?$")


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a base.

    Attributes:
        path: name in the model, such as `model.layers.0.mlp.up_proj.weight`.
        shape: as in the files.
        kind: linear is what quantization and LoRA look at; a head, embedding, norm, bias or expert stays in 16 bits.
        itemsize: bytes an element in the files.
        transposed: a linear weight that lies in the files as (in, out).
    """

    path: str
    shape: Shape
    kind: Kind
    itemsize: int
    transposed: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_outputs(self) -> int:
        """Rows of a linear weight (out, in)."""
        return self.shape[1 if self.transposed else 0]

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor; all experts of a layer are one module."""
        return re.sub(r"(\.experts)\..*", r"\1", self.path.rpartition(".")[0])

    @property
    def in_layer(self) -> bool:
        """Whether it belongs to one of the repeated layers."""
        return re.search(r"\.\d+\.", self.path) is not None


@dataclass(frozen=True)
class BaseShapes:
    """All tensors of a base in the order of a forward pass.

    Attributes:
        tied: the head is the embedding; it is then in `tensors` once, as the embedding.
        source: where the shapes come from, in words.
        config: what config.json says of the text model.
    """

    tensors: tuple[TensorShape, ...]
    tied: bool
    source: str
    config: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        return len({match[0] for t in self.tensors if (match := re.match(r".*?\.\d+\.", t.path))})

    @property
    def hidden_size(self) -> int:
        return next((t.shape[-1] for t in self.tensors if t.kind == "embedding"), 0)


def read_shapes(folder: Path) -> BaseShapes:
    """Return the shapes of a model folder: exact where it holds safetensors, else computed from config.json.

    Raises:
        BaseModelError: no config.json, damaged files, a base that comes quantized, or a config alone of an architecture
            whose shapes are not known here.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise BaseModelError("no config.json", place=str(folder), wanted="a Hugging Face model folder")
    config = read_config(folder)
    if "quantization_config" in config:
        raise BaseModelError(
            "a base that comes quantized cannot be planned",
            place=str(path),
            next_step="plan with the original model, or with a folder that holds its config.json alone",
        )
    files = find_weight_files(folder, next_step="fetch them, or give a folder that holds config.json alone")
    if not files:
        return shapes_from_config(config, str(path))
    stated = (entry for file in files for entry in read_header(file)[0])
    found = {entry.name: (entry.shape, ITEMSIZES[entry.dtype]) for entry in stated}
    tied = bool(config.get("tie_word_embeddings")) or not any(_is_head(name) for name in found)
    return _classified(found, config, tied, "the headers of its safetensors files")


def shapes_from_config(config: dict[str, Any], place: str = "config.json") -> BaseShapes:
    """Return the shapes that a config of a Llama-like model stands for. Raises BaseModelError for any other, or a gap."""
    if config.get("model_type") not in LLAMA_LIKE:
        raise BaseModelError(
            "the shapes of this architecture are not known from its config alone",
            place=f"{place}: model_type",
            found=config.get("model_type"),
            wanted=f"safetensors files beside it, or one of {', '.join(LLAMA_LIKE)}",
            next_step="give a folder that holds the model's *.safetensors files as well; only their headers are read",
        )
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    wrong = [key for key in needed if type(config.get(key)) is not int or config[key] < 1]
    if wrong:
        raise BaseModelError("the config lacks what shapes follow from", place=place, wanted=", ".join(wrong))
    itemsize = CONFIG_DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    found = {path: (shape, itemsize) for path, shape in _llama_like(config)}
    return _classified(found, config, bool(config.get("tie_word_embeddings", False)), "config.json, computed")


def _llama_like(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    kind, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    q, kv = heads * head, (config.get("num_key_value_heads") or heads) * head
    linear: dict[str, Shape] = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden)}
    linear |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q)}
    linear |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    if kind == "phi3":
        linear = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "self_attn.o_proj": (hidden, q)}
        linear |= {"mlp.gate_up_proj": (2 * ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    biased = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"} if kind == "qwen2" else set()
    if kind in ("llama", "qwen3"):
        biased |= {name for name in linear if config.get("attention_bias") and name.startswith("self_attn")}
        biased |= {name for name in linear if kind == "llama" and config.get("mlp_bias") and name.startswith("mlp")}
    norms: dict[str, Shape] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        for name, shape in (linear | norms).items():
            yield f"model.layers.{number}.{name}.weight", shape
            if name in biased:
                yield f"model.layers.{number}.{name}.bias", shape[:1]
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _classified(found: dict[str, tuple[Shape, int]], config: dict[str, Any], tied: bool, source: str) -> BaseShapes:
    matrices = {path for path, (shape, _) in found.items() if len(shape) == 2}
    has_experts = any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    transposed = config.get("model_type") in CONV1D
    kinds = {path: _kind(path, shape, matrices, has_experts) for path, (shape, _) in found.items()}
    tensors = [
        TensorShape(path, shape, kinds[path], itemsize, transposed and kinds[path] == "linear")
        for path, (shape, itemsize) in found.items()
        if not (tied and _is_head(path)) and not path.endswith("rotary_emb.inv_freq")
    ]
    text = config.get("text_config") or config
    return BaseShapes(tuple(sorted(tensors, key=_forward_order)), tied, source, text)


def _kind(path: str, shape: Shape, matrices: set[str], has_experts: bool) -> Kind:
    module, _, own = path.rpartition(".")
    last = module.rpartition(".")[2]
    if ".experts." in path or len(shape) == 3:
        return "expert"
    if last in _EMBEDDINGS:
        return "embedding"
    if _is_head(path):
        return "head"
    if len(shape) == 1 and f"{module}.weight" in matrices:
        return "bias"
    if len(shape) == 1 and _NORM.search(last):
        return "norm"
    is_table = "embed" in last or last == "wpe" or (has_experts and last in _ROUTERS)
    return "linear" if len(shape) == 2 and own == "weight" and not is_table else "other"


def _is_head(path: str) -> bool:
    return path.rpartition(".")[0] in _HEADS


def _forward_order(tensor: TensorShape) -> tuple[int, list[tuple[int, str]]]:
    """Embedding, layers by number, what follows them, head."""
    place = {"embedding": 0, "head": 3}.get(tensor.kind, 1 if tensor.in_layer else 2)
    return place, [(int(part), "") if part.isdigit() else (-1, part) for part in tensor.path.split(".")]
