"""What is read of a weight after something was taken out of it does not depend on where it is cut.

The oracle of the difference is the same sum, element by element, in numpy; of quantized bytes, `nf4.quantize` of the whole.
Ranks are objects in one process here; real ones load in `tests/e2e/test_sharded_load.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError, ConfigError
from qlora.lora.from_weights import FromWeights
from qlora.lora.starts import needs_weights
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant.fill import quantize_run, read_run
from qlora.quant.load import load_model
from qlora.quant.residual import Factors, InitialFactors, ResidualEntry, subtract_product
from qlora.quant.shards import TensorEntry, read_header
from qlora.quant.source import resolve_base

CPU = torch.device("cpu")
MakeBase = Callable[..., Path]


def one_by_one(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W - left @ right in fp32, one product rounded and taken away after the other."""
    found = weight.float().numpy().copy()
    for k in range(right.shape[0]):
        found = found - np.float32(1) * (left[:, k : k + 1].numpy() * right[k : k + 1].numpy())
    return torch.from_numpy(found)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    r=st.integers(1, 5),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_run_is_the_same_bits_wherever_it_is_cut(rows: int, columns: int, r: int, cuts: list[float], seed: int) -> None:
    weight, left, right = random(rows, columns, seed=seed), random(rows, r, seed=seed + 1), random(r, columns, seed=seed + 2)
    wanted = one_by_one(weight, left, right)
    ends = sorted({0, weight.numel(), *(int(cut * weight.numel()) for cut in cuts)})
    pieces = []
    for start, stop in itertools.pairwise(ends):
        piece = weight.reshape(-1)[start:stop].clone()
        subtract_product(piece, start, left, right)
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), wanted.reshape(-1))
    torch.testing.assert_close(wanted.double(), weight.double() - left.double() @ right.double(), atol=1e-5, rtol=1e-5)


def entry_of(folder: Path, weight: Tensor, left: Tensor, right: Tensor) -> ResidualEntry:
    file = folder / "model.safetensors"
    save_file({"before": torch.ones(3), "weight": weight}, file)
    entry = read_header(file)["weight"]
    return ResidualEntry(entry.name, entry.file, entry.dtype, entry.shape, entry.offset, entry, left, right, CPU)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(7, 9), (64, 64), (33, 127), (130, 130)])
def test_quantized_runs_make_the_quantized_whole(tmp_path: Path, shape: tuple[int, int], world_size: int) -> None:
    weight, left, right = random(*shape).bfloat16(), random(shape[0], 3, seed=1), random(3, shape[1], seed=2)
    entry = entry_of(tmp_path, weight, left, right)
    difference = one_by_one(weight, left, right)
    for dtype in (torch.bfloat16, torch.float32):
        runs, scales, plain = [], [], []
        spec = QuantSpec(storage=torch.uint8)
        packed, _ = nf4.quantize(difference.to(dtype), spec)
        for rank in range(world_size):
            share = Sharding(rank, world_size)
            own, own_scales = quantize_run(entry, spec, share, CPU, dtype)
            start, stop = share.run(packed.numel())
            runs.append(own.reshape(-1)[start:stop])
            scales.append(own_scales)
            start, stop = share.run(weight.numel())
            plain.append(read_run(entry, share, CPU, dtype).reshape(-1)[start:stop])
        assert torch.equal(torch.cat(runs), packed.reshape(-1))
        assert torch.equal(torch.cat(scales), nf4.quantize_blocks(difference.to(dtype), spec)[1])
        assert torch.equal(torch.cat(plain), difference.to(dtype).reshape(-1))


# Loading


def config_of(method: str, **keys: Any) -> LoraConfig:
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=method, **keys)
    assert needs_weights(config)
    return config


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_3", "olora"])
def test_an_unquantized_base_keeps_the_rest(make_base: MakeBase, architecture: str, method: str) -> None:
    """W - s B A in the base's dtype; everything that is not targeted stays as it was, also GPT-2's transposed weights."""
    source = resolve_base(str(make_base(architecture, dtype="float32")))
    plain = load_model(source, dtype="float32")
    changed = load_model(source, dtype="float32", initial=FromWeights(config_of(method), seed=3))
    factors = changed.qlora_initial.factors
    assert len(factors) >= 8
    own = dict(plain.named_parameters())
    for name, value in changed.named_parameters():
        path = name.removesuffix(".weight")
        if path not in factors:
            assert torch.equal(value, own[name]), name
            continue
        A, B = (part.double() for part in factors[path].start)
        delta = factors[path].scaling * (B @ A)
        before = own[name].double().T if architecture == "gpt2" else own[name].double()
        after = value.double().T if architecture == "gpt2" else value.double()
        torch.testing.assert_close(after + delta, before, atol=1e-5, rtol=0)
        assert torch.linalg.matrix_norm(delta) > 0.05 * torch.linalg.matrix_norm(before)


@pytest.mark.parametrize("quantization", [{}, {"quant_type": "fp4", "double_quant": False}, {"bits": 8}, None])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_is_rebuilt_from_its_factors(
    make_base: MakeBase, architecture: str, quantization: dict[str, Any] | None
) -> None:
    """Every byte, also on a base that is read again with other pieces."""
    source = resolve_base(str(make_base(architecture)))
    how = QuantizationConfig(**quantization) if quantization is not None else None
    method = "loftq" if quantization is not None else "pissa"
    config = config_of(method, loftq_iterations=2)
    found = load_model(source, quantization=how, initial=FromWeights(config, seed=0))
    former, nf4.CHUNK_ELEMENTS = nf4.CHUNK_ELEMENTS, 4096
    try:
        again = load_model(source, quantization=how, initial=found.qlora_initial)
    finally:
        nf4.CHUNK_ELEMENTS = former
    plain = load_model(source, quantization=how)
    wanted = weights_of(found)
    assert all(
        torch.equal(value.view(torch.uint8), wanted[name].view(torch.uint8)) for name, value in weights_of(again).items()
    )
    assert not all(torch.equal(value, wanted[name]) for name, value in weights_of(plain).items())


def test_errors_are_those_of_the_weights_that_are_held(make_base: MakeBase) -> None:
    source = resolve_base(str(make_base("llama")))
    config = config_of("loftq", loftq_iterations=3)
    quantization = QuantizationConfig()
    plain = load_model(source, quantization=quantization)
    changed = load_model(source, quantization=quantization, initial=FromWeights(config, seed=0))
    initial = changed.qlora_initial
    files = load_file(source.folder / "model.safetensors")
    for path, (before, after) in initial.errors.items():
        weight = files[f"{path}.weight"].double()
        own = initial.factors[path]
        A, B = (part.double() for part in own.start)
        update = own.scaling * (B @ A)
        for found, model, added in ((before, plain, 0.0), (after, changed, update)):
            held = model.get_submodule(path).dequantize(torch.float32).double()
            wanted = torch.linalg.matrix_norm(weight - held - added) / torch.linalg.matrix_norm(weight)
            assert math.isclose(found, float(wanted), rel_tol=1e-3)
        assert after < before


class Worker(Sharding):
    """One of several that work one after another in one process, and are told what others have said so far, or zeros."""

    def __init__(self, worker: int, num_workers: int, said: dict[int, Tensor]) -> None:
        super().__init__(worker=worker, num_workers=num_workers)
        self.said, self.turn = said, -1

    def broadcast(self, value: Tensor, worker: int) -> Tensor:
        self.turn += 1
        if worker == self.worker:
            self.said[self.turn] = value.clone()
        found = self.said.get(self.turn, torch.zeros_like(value))
        assert found.shape == value.shape, "a collective needs equal tensors"
        return found


@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_each_weight_is_decomposed_by_one_rank(make_base: MakeBase, num_workers: int) -> None:
    """Every rank ends with all factors, those of a rank alone, and has decomposed its part of the weights."""
    source = resolve_base(str(make_base("llama", num_hidden_layers=1)))
    config = config_of("loftq", loftq_iterations=2)
    quantization = QuantizationConfig()
    wanted = load_model(source, quantization=quantization, initial=FromWeights(config, seed=0)).qlora_initial
    said: dict[int, Tensor] = {}
    asked: list[list[str]] = []
    for _ in range(2):  # in the first turn, what later workers say is not known yet
        asked.clear()
        for worker in range(num_workers):
            method = Watched(config)
            sharding = Worker(worker, num_workers, said)
            found = load_model(source, quantization=quantization, initial=method, sharding=sharding).qlora_initial
            asked.append(method.asked)
    assert_same(found, wanted)
    assert sorted(path for own in asked for path in own) == sorted(wanted.factors)
    assert max(map(len, asked)) == -(-len(wanted.factors) // num_workers)


class Watched(FromWeights):
    """Notes which weights it decomposes."""

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config, seed=0)
        self.asked: list[str] = []

    def factors(self, path: str, *args: Any) -> Factors:
        self.asked.append(path)
        return super().factors(path, *args)


def assert_same(found: InitialFactors, wanted: InitialFactors) -> None:
    assert list(found.factors) == list(wanted.factors)
    for path, own in found.factors.items():
        for pair, other in ((own.start, wanted.factors[path].start), (own.subtracted, wanted.factors[path].subtracted)):
            assert pair is not None
            assert other is not None
            assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    assert found.errors == wanted.errors


# Refused


@pytest.mark.parametrize(
    ("architecture", "changes", "lora", "found"),
    [
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}, "lm_head is tied"),
        ("llama", {}, {"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ("mixtral", {}, {"target_modules": [], "target_parameters": ["experts.down_proj"]}, "experts"),
    ],
)
def test_layers_that_hold_no_matrix_of_their_own_are_refused(
    make_base: MakeBase, architecture: str, changes: dict[str, Any], lora: dict[str, Any], found: str
) -> None:
    source = resolve_base(str(make_base(architecture, **changes)))
    with pytest.raises(ConfigError, match=found) as raised:
        load_model(source, initial=FromWeights(config_of("pissa", **lora), seed=0))
    assert raised.value.place == "lora.init_lora_weights"


def test_a_base_that_came_quantized_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    from qlora.quant.prepare import run_prepare

    base = make_base("llama")
    prepared = run_prepare(str(base), tmp_path / "prepared")
    for method in ("pissa", "olora", "loftq"):
        with pytest.raises(ConfigError, match="came quantized"):
            load_model(resolve_base(str(prepared)), initial=FromWeights(config_of(method), seed=0))
    known = load_model(resolve_base(str(base)), initial=FromWeights(config_of("pissa"), seed=0)).qlora_initial
    with pytest.raises(BaseModelError, match="came quantized"):
        load_model(resolve_base(str(prepared)), initial=known)


def test_loftq_without_quantization_is_refused(make_base: MakeBase) -> None:
    with pytest.raises(ConfigError, match="no targeted layer is quantized"):
        load_model(resolve_base(str(make_base("llama"))), initial=FromWeights(config_of("loftq"), seed=0))


def test_factors_of_another_shape_are_refused_before_a_weight_is_read(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_base(str(make_base("llama")))
    known = load_model(base, initial=FromWeights(config_of("pissa"), seed=0)).qlora_initial
    path, own = next(iter(known.factors.items()))
    wide = Factors(own.start, (own.start[0][:, :-1], own.start[1]), own.scaling)
    assert wide.subtracted is not None
    bad = InitialFactors("pissa", 0, {path: Factors(wide.subtracted, wide.subtracted, own.scaling)})
    monkeypatch.setattr(TensorEntry, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(BaseModelError, match="another shape"):
        load_model(base, initial=bad)
