"""Making one adapter out of several: a weighted sum of their updates.

linear   A = sum sign(w s) sqrt|w s| A_i,  B = sum sqrt|w s| B_i: keeps the rank; products of one adapter's B with
         another's A come along, so it is close to the sum only where the adapters are alike
cat      A = [w s A_i],  B = [B_i]: exactly the sum; the rank is the sum of the ranks
svd      the sum, cut to a rank: the nearest there is of that rank (Eckart-Young). It is found from the factors, by two
         QR decompositions and the SVD of a matrix as wide as the ranks together; the whole delta is never made
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.inject import AdapterRecord, activate, check_can_add
from qlora.lora.layer import LoraLayer
from qlora.lora.update import Update

Method = Literal["linear", "cat", "svd"]
# The factors of one layer: A (E, r, in) and B (E, out, r), E experts, or 1.
Factors = tuple[Tensor, Tensor]


def mix_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, *, method: Method = "svd", r: int | None = None
) -> AdapterRecord:
    """Add a new adapter that is the weighted sum of others, and make it active. Rank-local; before a model is prepared.

    Args:
        weights: by adapter name; negative ones subtract.
        name: of the new adapter.
        r: rank under `svd`; None is the largest of the mixed ones. Layers that have no room for it get their largest. The
            groups of a convolution are summed each for itself, and share it out.

    Raises:
        AdapterError: an adapter that is not there, weights that are no numbers by name, a name that is taken, ranks that
            differ under `linear`, a rank that a convolution's groups do not divide, a variant whose sum is no low-rank
            update (DoRA), or modules trained as wholes. Nothing is changed then.
    """
    records: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    _check(model, records, weights, name, method, r)
    layers: dict[str, LoraLayer] = {}
    for own in weights:
        layers |= {path: _layer(model, path) for path in records[own].targeted}
    order = [path for path, module in model.named_modules() if isinstance(module, LoraLayer) and path in layers]
    made = {path: _mix_layer(layers[path], weights, method, r) for path in order}
    ranks = {path: A.shape[1] * layers[path].num_factors for path, (A, *_) in made.items()}
    config = _config_of(layers, ranks, records, weights)
    _check_ranks(config, ranks)
    for path, (A, B, bias) in made.items():
        layer = layers[path]
        update = Update.of(config, path)
        shapes = layer.shapes(layer.base_layer, update)
        values = layer.from_factors(A, B, update)
        if update.lora_bias:
            values["lora_B.bias"] = torch.zeros(shapes["lora_B.bias"]) if bias is None else bias
        layer.add_adapter(name, config, path, seed=0, values={part: values[part] for part in shapes})
    activate(model, name, ())
    records[name] = AdapterRecord(config, tuple(order))
    return records[name]


def _layer(model: nn.Module, path: str) -> LoraLayer:
    layer: Any = model.get_submodule(path)
    return layer


def _check(
    model: nn.Module,
    records: Mapping[str, AdapterRecord],
    weights: Mapping[str, float],
    name: str,
    method: str,
    r: int | None,
) -> None:
    if not isinstance(weights, Mapping):
        raise AdapterError(
            "weights are given by adapter name", found=repr(weights), wanted='for example {"a": 0.7, "b": 0.3}'
        )
    if not weights:
        raise AdapterError("no adapter to mix was named", wanted="weights by adapter name")
    absent = [own for own in weights if own not in records]
    if absent:
        raise AdapterError(f"the model has no adapter {absent[0]!r}", found=sorted(records) or "none at all")
    if name in records:
        raise AdapterError(f"the model has an adapter {name!r} already", next_step="choose another name, or delete it first")
    if method not in ("linear", "cat", "svd"):
        raise AdapterError("no such way of mixing", found=method, wanted="linear, cat or svd")
    if any(isinstance(weight, bool) or not isinstance(weight, (int, float)) for weight in weights.values()):
        raise AdapterError("a weight is not a number", found=dict(weights))
    if any(not math.isfinite(weight) for weight in weights.values()):
        raise AdapterError("a weight is not a finite number", found=dict(weights))
    if r is not None and (method != "svd" or r < 1):
        raise AdapterError("a rank is chosen for svd alone, and is at least 1", found=f"{method}, r = {r}")
    check_can_add(model, name, ())
    for own in weights:
        if records[own].trained:
            raise AdapterError(f"the adapter {own!r} trained modules as wholes, which have no low-rank sum")
        if records[own].token_rows:
            raise AdapterError(f"the adapter {own!r} trained rows of tokens, which have no low-rank sum")
        for path in records[own].targeted:
            layer = _layer(model, path)
            if layer.updates[own].use_dora:
                raise AdapterError(
                    f"the adapter {own!r} is DoRA: its magnitudes do not add up", place=path, next_step="merge it instead"
                )
            if r is not None and r % layer.num_factors:
                raise AdapterError(
                    "each group of a convolution has its own part of the rank, and the groups do not divide it",
                    place=path,
                    found=r,
                    wanted=f"a multiple of {layer.num_factors}",
                )
            ranks = {update.r for other, update in layer.updates.items() if other in weights}
            if method == "linear" and len(ranks) > 1:
                raise AdapterError(
                    "adapters of different ranks cannot be mixed linearly", place=path, next_step="method='svd' or 'cat'"
                )


def _mix_layer(
    layer: LoraLayer, weights: Mapping[str, float], method: Method, r: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of the mixed update, with s = 1, and the bias of its B."""
    terms: list[tuple[float, Factors]] = []
    bias: Tensor | None = None
    for own, weight in weights.items():
        if own not in layer.updates:
            continue
        update = layer.updates[own]
        scale = weight * update.scaling
        terms.append((scale, layer.to_factors(own)))
        if update.lora_bias:
            term = layer.table("lora_B.bias")[own].detach().float() * scale
            bias = term if bias is None else bias + term
    if method == "linear":
        return *_linear(terms), bias
    A, B = torch.cat([scale * A for scale, (A, _) in terms], dim=1), torch.cat([B for _, (_, B) in terms], dim=2)
    if method == "svd":
        A, B = _cut(A, B, r // layer.num_factors if r else max(own_A.shape[1] for _, (own_A, _) in terms))
    return A, B, bias


def _linear(terms: list[tuple[float, Factors]]) -> Factors:
    A, B = (torch.zeros_like(factor) for factor in terms[0][1])
    for scale, (own_A, own_B) in terms:
        root = math.sqrt(abs(scale))
        A += math.copysign(root, scale) * own_A
        B += root * own_B
    return A, B


def _cut(A: Tensor, B: Tensor, r: int) -> Factors:
    """The best factors of rank r (or less, where a side is shorter) of B A, singular values shared out evenly."""
    basis_B, rest_B = torch.linalg.qr(B)
    basis_A, rest_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(rest_B @ rest_A.mT, full_matrices=False)
    r = min(r, S.shape[-1])
    root = S[:, :r].sqrt()
    return root.unsqueeze(2) * (Vh[:, :r] @ basis_A.mT), (basis_B @ U[:, :, :r]) * root.unsqueeze(1)


def _config_of(
    layers: Mapping[str, LoraLayer],
    ranks: Mapping[str, int],
    records: Mapping[str, AdapterRecord],
    weights: Mapping[str, float],
) -> LoraConfig:
    """The injection that the mixed adapter would be the result of: s = 1 everywhere, other ranks by path."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    # A pattern may match the end of a path (PEFT's rule); one with ^ before it matches none but the whole.
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    configs = [records[own].config for own in weights]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern={path: float(rank) for path, rank in others.items()},
        target_modules=list(layers),
        lora_bias=any(config.lora_bias for config in configs),
        dtype="bfloat16" if all(config.dtype == "bfloat16" for config in configs) else "float32",
    )


def _check_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Whether the config gives each layer the rank that was computed for it."""
    for path, rank in ranks.items():
        found = Update.of(config, path)
        if (found.r, found.scaling) != (rank, 1.0):
            raise AdapterError(
                "the ranks of the mixed layers cannot be told by their paths", place=path, found=found.r, wanted=rank
            )
