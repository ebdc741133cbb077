"""What can be known of attention kernels without a GPU: what they are told, which one is chosen, and flex attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from qlora.ops import attention, attention_gpu
from qlora.ops.attention_cpu import attention_on_cpu
from qlora.ops.attention_segments import segmented_attention
from qlora.ops.documents import DocumentLayout

# Uncompiled, as it is here, flex attention warns that it makes its scores whole.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LENGTHS = [9, 1, 30, 4]
CPU = torch.device("cpu")


def make_rows(dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(LENGTHS), n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def segments(
    query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
) -> Tensor:
    inputs = [t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)]
    return segmented_attention(*inputs, layout, scaling, window)[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_segments_tiles_and_flex_are_the_same(window: int | None, kv_heads: int) -> None:
    rows, layout = make_rows(kv_heads=kv_heads), DocumentLayout.from_lengths(LENGTHS)
    want = segments(*rows, layout, 0.3, window)
    tiles = attention_on_cpu(*(t.transpose(0, 1).unsqueeze(0) for t in rows), layout, 0.3, window)[0].transpose(0, 1)
    torch.testing.assert_close(tiles, want)
    # On a CPU torch has no backward pass for it.
    found = attention_gpu.flex(*(t.detach() for t in rows), layout, 0.3, window)
    torch.testing.assert_close(found, want.detach())
    direction = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, rows, direction)
    torch.testing.assert_close(torch.autograd.grad(tiles, rows, direction), wanted)


# What torch's kernel is told: its own function, on tensors that have shapes and no device behind them.


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_torchs_function_takes_what_it_is_told(window: int | None, kv_heads: int) -> None:
    arguments = attention_gpu.varlen_arguments(DocumentLayout.from_lengths(LENGTHS), 0.3, window)
    assert arguments["cu_seq_q"].tolist() == [0, 9, 10, 40, 44]
    assert arguments["cu_seq_q"].dtype == torch.int32
    assert arguments["max_q"] == 30
    inspect.signature(varlen_attn).bind(None, None, None, **arguments, enable_gqa=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = [torch.empty(44, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, kv_heads, kv_heads)]
        layout = DocumentLayout.from_lengths(LENGTHS)
        out = attention_gpu.torch_varlen(*rows, layout, 0.3, window)
        assert (out.shape, out.dtype) == ((44, 4, 16), torch.bfloat16)
        gradients = torch.autograd.grad(out.sum(), rows)
        assert [g.shape for g in gradients] == [t.shape for t in rows]


def test_flash_attns_function_is_told_what_its_documentation_names() -> None:
    """As of 2.8; the package builds on GPUs only."""

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    ) -> tuple[bool, tuple[int, int]]:  # fmt: skip
        return causal, window_size

    layout = DocumentLayout.from_lengths(LENGTHS)
    assert flash_attn_varlen_func(None, None, None, **attention_gpu.flash_attn_arguments(layout, 0.3, None)) == (
        True,
        (-1, -1),
    )
    # A window counts the tokens before a token's own.
    assert flash_attn_varlen_func(None, None, None, **attention_gpu.flash_attn_arguments(layout, 0.3, 5)) == (True, (4, 0))


def test_where_documents_begin_is_worked_out_once_a_batch() -> None:
    layout = DocumentLayout.from_lengths(LENGTHS)
    assert layout.cu_seqlens is layout.cu_seqlens
    assert layout.document_T.bincount().tolist() == LENGTHS
    rows = [t.detach() for t in make_rows()]
    for _ in range(2):
        attention_gpu.flex(*rows, layout, 0.3, 5)
    masks = [value for name, value in layout._kept.items() if "block mask" in name]
    assert len(masks) == 1


# Which kernel is chosen.


def choose(**kernels: Callable[..., Tensor]) -> attention_gpu.Choice:
    return attention_gpu.first_that_works(kernels, CPU, torch.bfloat16, (16, 16), True)


def test_the_first_kernel_that_is_right_is_chosen_and_the_others_say_why_not() -> None:
    def missing(*_: Any) -> Tensor:
        raise ImportError("no such package\nand a second line")

    def leaky(query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, *others: Any) -> Tensor:
        return segments(query, key, value, DocumentLayout.from_lengths([sum(layout.lengths)]), *others)

    def windowless(*args: Any) -> Tensor:
        return segments(*args[:-1], None)

    def none(*args: Any) -> Tensor:
        return segments(*args) * torch.nan

    choice = choose(missing=missing, leaky=leaky, windowless=windowless, none=none, right=segments, later=segments)
    assert (choice.name, choice.kernel) == ("right", segments)
    reasons = choice.reason.split("; ")
    assert reasons[0] == "missing: ImportError: no such package"
    assert [reason.split(":")[0] for reason in reasons[1:4]] == ["leaky", "windowless", "none"]
    assert all("off by" in reason for reason in reasons[1:4])
    nothing = choose(missing=missing)
    assert (nothing.name, nothing.kernel) == ("segments", None)


def test_kernels_are_for_half_precision_on_a_gpu() -> None:
    on_cpu = attention_gpu.choose(CPU, torch.bfloat16, (16, 16), True)
    assert on_cpu.kernel is None
    wide = attention_gpu.choose(torch.device("cuda"), torch.float32, (16, 16), True)
    assert (wide.name, wide.kernel) == ("segments", None)
    assert "half precision" in wide.reason
    assert "half precision" in attention.describe(torch.device("cuda"), torch.float32, (16, 16), True)


def test_the_kernels_of_this_machine_are_told_apart() -> None:
    """On a CPU torch's varlen attention has no kernel; flex attention computes, slowly, and is right."""
    choice = attention_gpu.first_that_works(attention_gpu.KERNELS, CPU, torch.bfloat16, (16, 16), True)
    assert choice.name == "flex attention"
    assert choice.reason.startswith("torch's varlen attention: NotImplementedError")
