"""What the tensors of an adapter file are for, and whether they are all there, by their names and shapes. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qlora.cli.tensor_header import TensorInfo
from qlora.lora.update import by_pattern

_PREFIX = "base_model.model."
_PARTS = {
    "A": r"lora_A\.weight|lora_A|lora_embedding_A",
    "B": r"lora_B\.weight|lora_B|lora_embedding_B",
    "bias": r"lora_B\.bias",
    "magnitude": r"lora_magnitude_vector(?:\.weight)?",
    "rows": r"token_adapter\.trainable_tokens_delta",
    "base": r"base_layer\.weight",
}
_KEY = re.compile(rf"(?P<module>.+?)\.(?:{'|'.join(f'(?P<{name}>{pattern})' for name, pattern in _PARTS.items())})")
_FLOAT = re.compile(r"B?F\d")


@dataclass
class AdapterTensors:
    """The tensors of one file.

    Attributes:
        updates: module path -> its tensors by what they are: A, B, bias, magnitude.
        kinds: module path -> linear, embedding, convolution or experts.
        token_rows: module path -> number of rows that are trained.
        whole: paths of modules that were trained as wholes.
        problems: what is missing, empty or contradicts the config.
    """

    updates: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    token_rows: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_empty: bool = False

    def ranks(self, config: dict[str, Any]) -> dict[int, int]:
        """Rank -> number of layers that have it."""
        found = Counter(_rank_of(path, parts["A"], config) for path, parts in self.updates.items() if parts["A"].shape)
        return dict(sorted(found.items()))


def sort_tensors(tensors: Iterable[TensorInfo], config: dict[str, Any]) -> AdapterTensors:
    """Say what each tensor is for, and what is wrong with all of them together."""
    found = AdapterTensors()
    tensors = list(tensors)
    for tensor in tensors:
        if tensor.num_parameters == 0:
            found.problems.append(f"{tensor.name} is empty, shape {list(tensor.shape)}")
            found.is_empty = True
        if not _FLOAT.match(tensor.dtype):
            found.problems.append(f"{tensor.name} is of dtype {tensor.dtype}, which no adapter is")
        match = _KEY.fullmatch(tensor.name)
        if match is None:
            path = tensor.name.removeprefix(_PREFIX).rpartition(".")[0]
            if path not in found.whole:
                found.whole.append(path)
            continue
        path, part = match["module"].removeprefix(_PREFIX), match.lastgroup
        if part == "rows":
            found.token_rows[path] = tensor.shape[0] if tensor.shape else 0
        elif part is not None and part != "base":
            own = found.updates.setdefault(path, {})
            if part in own:
                found.problems.append(f"{tensor.name} is the same tensor as {own[part].name}")
            own[part] = tensor
    for path, parts in found.updates.items():
        found.problems += _wrong_in(path, parts, config)
        found.kinds[path] = _kind(path, parts, config)
    if not tensors:
        found.problems.append("it holds no tensors")
    return found


def _wrong_in(path: str, parts: dict[str, TensorInfo], config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one layer's tensors."""
    name = next(iter(parts.values())).name
    path = name[: name.index(path) + len(path)]
    for one, other in (("A", "B"), ("B", "A")):
        if one in parts and other not in parts:
            yield f"{path} has {_called(parts[one])} and no {_called(parts[one]).replace(f'_{one}', f'_{other}')}"
    if not parts.keys() & {"A", "B"}:
        yield f"{path} has {' and '.join(_called(tensor) for tensor in parts.values())} and neither lora_A nor lora_B"
        return
    for key, part in (("use_dora", "magnitude"), ("lora_bias", "bias")):
        if bool(config.get(key)) != (part in parts):
            word = "has no" if part not in parts else "has a"
            yield f"{path} {word} {part}, and the config says {key} {str(bool(config.get(key))).lower()}"
    if not {"A", "B"} <= parts.keys() or not parts["A"].shape or len(parts["B"].shape) < 2:
        return
    A, B = parts["A"], parts["B"]
    if A.shape[0] != B.shape[1] and A.num_parameters and B.num_parameters:
        yield f"{path}: lora_A {list(A.shape)} and lora_B {list(B.shape)} differ in r"
    wanted = _wanted_rank(path.removeprefix(_PREFIX), config)
    rank = _rank_of(path.removeprefix(_PREFIX), A, config)
    if A.num_parameters and wanted is not None and rank != wanted:
        yield f"{path}: lora_A has {A.shape[0]} rows, and the config says r {wanted}"


def _called(tensor: TensorInfo) -> str:
    return tensor.name[tensor.name.rindex(".lora_") + 1 :].removesuffix(".weight")


def _wanted_rank(path: str, config: dict[str, Any]) -> int | None:
    """r by the config, as far as it makes sense."""
    r, pattern = config.get("r"), config.get("rank_pattern") or {}
    if config.get("peft_type") != "LORA" or not isinstance(pattern, dict):
        return None
    try:
        r = by_pattern(pattern, path, r)
    except re.error:
        return None
    return r if isinstance(r, int) and r > 0 else None


def _rank_of(path: str, A: TensorInfo, config: dict[str, Any]) -> int:
    """r by the tensor; fused experts have a factor each, one below the other."""
    rows, wanted = A.shape[0], _wanted_rank(path, config)
    if wanted is not None and _is_experts(path, config) and rows % wanted == 0:
        return wanted
    return rows


def _is_experts(path: str, config: dict[str, Any]) -> bool:
    entries = config.get("target_parameters") or []
    owners = {str(entry).rpartition(".")[0] for entry in entries} if isinstance(entries, list) else set()
    own = re.sub(r"(\.base_layer)+$", "", path)
    return any(own == owner or own.endswith(f".{owner}") for owner in owners)


def _kind(path: str, parts: dict[str, TensorInfo], config: dict[str, Any]) -> str:
    A = parts.get("A", next(iter(parts.values())))
    if "lora_embedding_" in A.name:
        return "embedding"
    if _is_experts(path, config):
        return "experts"
    return "convolution" if len(A.shape) > 2 else "linear"
