"""What bitsandbytes writes beside a weight, in files and in its own layer, against bitsandbytes itself."""

from __future__ import annotations

import json
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

from qlora.errors import BaseModelError
from qlora.ops import nf4, nf4_format
from qlora.ops.nf4 import QuantSpec


def reference(spec: QuantSpec, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, QuantState]:
    """A weight (70, 64), and its packed bytes and state by bitsandbytes."""
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    weight.view(-1)[::97] *= 20  # scales differ widely
    weight = weight.to(dtype)
    packed, state = quantize_4bit(
        weight,
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
        quant_storage=spec.storage,
    )
    return weight, packed, state


def entries_of(state: QuantState) -> dict[str, torch.Tensor]:
    return {f".{name}": value for name, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_entries_go_to_bitsandbytes_and_come_back(
    quant_type: str, double_quant: bool, block_size: int, storage: torch.dtype
) -> None:
    spec = QuantSpec(quant_type, block_size, double_quant, storage)
    weight, want_packed, want_state = reference(spec, torch.bfloat16)
    packed, statistics = nf4.quantize(weight, spec)
    ours = nf4_format.to_bitsandbytes(statistics, spec, (70, 64), torch.bfloat16)

    theirs = entries_of(want_state)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if "quant_state" in name:
            ours_read, theirs_read = (json.loads(bytes(t[name].tolist())) for t in (ours, theirs))
            assert ours_read == theirs_read
        else:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name])

    # bitsandbytes reads what we write.
    read = QuantState.from_dict({name[1:]: value for name, value in ours.items()}, device=torch.device("cpu"))
    assert torch.equal(dequantize_4bit(packed, read), dequantize_4bit(want_packed, want_state))
    # We read what bitsandbytes writes.
    again, again_statistics, again_spec, shape = nf4_format.from_bitsandbytes(want_packed, theirs, "somewhere")
    assert torch.equal(again.view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(again_statistics, statistics)
    assert again_spec == spec
    assert shape == (70, 64)


def remove(name: str) -> Any:
    return lambda entries, state: entries.pop(name)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda entries, state: entries.__setitem__(name, value)


def say(**values: Any) -> Any:
    return lambda entries, state: state.update(values)


def unsay(name: str) -> Any:
    return lambda entries, state: state.pop(name)


DAMAGES = {
    "no state": remove(".quant_state.bitsandbytes__nf4"),
    "no scales": remove(".absmax"),
    "state is not JSON": put(".quant_state.bitsandbytes__nf4", torch.tensor([1, 2, 3], dtype=torch.uint8)),
    "state is not a table": put(".quant_state.bitsandbytes__nf4", torch.tensor(list(b"[1]"), dtype=torch.uint8)),
    "state is not bytes": put(".quant_state.bitsandbytes__nf4", torch.tensor([1.5, -3.0])),
    "no quant_type": unsay("quant_type"),
    "no shape": unsay("shape"),
    "no nested_offset": unsay("nested_offset"),
    "unknown quant_type": say(quant_type="nf3"),
    "block size zero": say(blocksize=0),
    "another block size": say(blocksize=128),
    "another nested block size": say(nested_blocksize=128),
    "another shape": say(shape=[64, 64]),
    "negative shape": say(shape=[-70, -64]),
    "no dimensions": say(shape=[]),
    "shape of words": say(shape=["a", "b"]),
    "shape is a number": say(shape=3),
    "another table": put(".quant_map", torch.linspace(-1, 1, 16)),
    "a short table": put(".quant_map", torch.linspace(-1, 1, 8)),
    "another nested table": put(".nested_quant_map", torch.linspace(-1, 1, 256)),
    "too few scales": put(".absmax", torch.zeros(5, dtype=torch.uint8)),
    "scales of another type": put(".absmax", torch.zeros(70, dtype=torch.float32)),
    "too few nested scales": put(".nested_absmax", torch.zeros(0)),
    "nested scales of another type": put(".nested_absmax", torch.zeros(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_refused_with_their_place(damage: str) -> None:
    _, packed, quant_state = reference(QuantSpec())
    entries = entries_of(quant_state)
    key = ".quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(entries[key].tolist()))
    before = dict(state)
    DAMAGES[damage](entries, state)
    if state != before:
        entries[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(BaseModelError, match=r"file\.safetensors: some\.weight"):
        nf4_format.from_bitsandbytes(packed, entries, "file.safetensors: some.weight")


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: torch.cat([p, p[:1]])])
def test_packed_bytes_that_do_not_fit_are_refused(change: Any) -> None:
    """A kernel would read beyond the end of the weight."""
    _, packed, state = reference(QuantSpec())
    with pytest.raises(BaseModelError, match="does not fit its shape"):
        nf4_format.from_bitsandbytes(change(packed), entries_of(state), "somewhere")


def test_a_layer_that_is_not_quantized_yet_is_refused() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4")
    with pytest.raises(BaseModelError, match="not quantized yet"):
        nf4_format.from_linear4bit(layer, "a.layer")


def test_a_layer_is_read_without_copying_its_packed_bytes() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    weight = layer.weight.data.clone()
    layer = layer.to("cpu")
    packed, statistics, spec, shape = nf4_format.from_linear4bit(layer, "a.layer")
    assert packed.data_ptr() == layer.weight.data_ptr()
    assert shape == (32, 64)
    want_packed, want_statistics = nf4.quantize(weight, spec)
    assert torch.equal(packed, want_packed)
    assert torch.equal(statistics, want_statistics)
