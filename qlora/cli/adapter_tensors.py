"""What the tensors of an adapter file are for, and whether they are all there, by their names and shapes. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
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
MOST_IN_A_BLOCK = 6  # adapted weights of one module, whose orders are tried


@dataclass
class AdapterTensors:
    """The tensors of one file.

    Attributes:
        updates: module path -> its tensors by what they are: A, B, bias, magnitude.
        kinds: module path -> linear, embedding, convolution or experts.
        expert_ranks: module path -> r of the updates of fused experts, None where config and shapes do not tell it.
        token_rows: module path -> number of rows that are trained.
        whole: paths of modules that were trained as wholes.
        problems: what is missing, empty or contradicts the config.
    """

    updates: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    expert_ranks: dict[str, int | None] = field(default_factory=dict)
    token_rows: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_empty: bool = False

    def ranks(self) -> dict[int | str, int]:
        """Rank, or the word unknown, -> number of layers that have it."""
        own = {path: parts["A"].shape[0] for path, parts in self.updates.items() if parts["A"].shape}
        found = Counter(self.expert_ranks.get(path, r) for path, r in own.items())
        unknown: dict[int | str, int] = {"unknown": found.pop(None)} if None in found else {}
        return {r: count for r, count in sorted(found.items()) if r is not None} | unknown


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
    for owner, paths in _expert_blocks(found.updates, config).items():
        ranks, problem = _ranks_of_block(owner, paths, found.updates, config)
        found.expert_ranks |= dict(zip(paths, ranks, strict=True))
        found.problems += problem
    for path, parts in found.updates.items():
        found.problems += _wrong_in(path, parts, config, path in found.expert_ranks)
        found.kinds[path] = "experts" if path in found.expert_ranks else _kind(parts)
    if not tensors:
        found.problems.append("it holds no tensors")
    return found


def _wrong_in(path: str, parts: dict[str, TensorInfo], config: dict[str, Any], is_experts: bool) -> Iterator[str]:
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
    if A.num_parameters and not is_experts and wanted is not None and A.shape[0] != wanted:
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


def _expert_blocks(updates: dict[str, dict[str, TensorInfo]], config: dict[str, Any]) -> dict[str, list[str]]:
    """Path of each module with fused experts -> the paths of their updates in the file, in the order of its weights.

    Of a block's n adapted weights the i-th is n - i times `base_layer` below the module (`adapter.expert_keys`). An entry of
    one name alone does not say in which modules it is; what has other rows than r is taken for experts then.
    """
    blocks: dict[str, list[str]] = {}
    for path, parts in updates.items():
        owner, A = re.sub(r"(\.base_layer)+$", "", path), parts.get("A")
        entries = _parameters_of(owner, config)
        rows = A.shape[0] if A is not None and A.shape else None
        nested = owner != path or f"{owner}.base_layer" in updates
        if any(inner for _, inner in entries) or (entries and (nested or rows != _wanted_rank(path, config))):
            blocks.setdefault(owner, []).append(path)
    return {owner: sorted(paths, key=len, reverse=True) for owner, paths in blocks.items()}


def _parameters_of(owner: str, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What `target_parameters` may mean of a module: the parameters' names, and the module as the entries say it."""
    entries = config.get("target_parameters") or []
    found: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        inner, _, name = str(entry).rpartition(".")
        if not inner or owner == inner or owner.endswith(f".{inner}"):
            found[name] = found.get(name) or inner
    return list(found.items())


def _ranks_of_block(
    owner: str, paths: list[str], updates: dict[str, dict[str, TensorInfo]], config: dict[str, Any]
) -> tuple[list[int | None], list[str]]:
    """r of each update of a block, and what is wrong. A has E r rows, with one E for the block: so it is told."""
    unknown: list[int | None] = [None] * len(paths)
    shapes = [tensor.shape for path in paths if (tensor := updates[path].get("A")) is not None]
    rows = [shape[0] for shape in shapes if shape and all(shape)]
    wanted = [_wanted_rank(f"{owner}.{name}", config) for name, _ in _parameters_of(owner, config)]
    known = [r for r in wanted if r is not None]
    if not len(rows) == len(paths) == len(wanted) == len(known) <= MOST_IN_A_BLOCK:
        return unknown, []
    fitting = {
        ranks
        for ranks in permutations(known)
        if len({row / r for row, r in zip(rows, ranks, strict=True)}) == 1 and rows[0] % ranks[0] == 0
    }
    if len(fitting) == 1:
        return [*fitting.pop()], []
    shown = f"{_PREFIX}{owner}: lora_A of its experts has {', '.join(map(str, rows))} rows"
    says = f"and the config says r {', '.join(map(str, known))}"
    return unknown, [] if fitting else [f"{shown}, {says}"]


def _kind(parts: dict[str, TensorInfo]) -> str:
    A = parts.get("A", next(iter(parts.values())))
    if "lora_embedding_" in A.name:
        return "embedding"
    return "convolution" if len(A.shape) > 2 else "linear"
