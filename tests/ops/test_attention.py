"""Attention per document against one masked attention over the whole row, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.errors import ConfigError
from qlora.ops import attention, documents
from qlora.ops.attention import document_attention, packed_forward
from qlora.ops.documents import DocumentLayout

HEAD_SIZE = 8


def random_qkv(num_tokens: int, heads: int, kv_heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, n, num_tokens, HEAD_SIZE, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Softmax over all places of the row, with all but the token's own document (and window) masked out."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(document))
    distance = place[:, None] - place[None, :]
    mask = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


def assert_like_the_reference(lengths: list[int], heads: int, kv_heads: int, window: int | None, seed: int = 0) -> None:
    inputs = random_qkv(sum(lengths), heads, kv_heads, seed)
    layout = DocumentLayout.from_lengths(lengths)
    found = document_attention(*inputs, layout, 0.3, window)
    want = reference(*inputs, lengths, 0.3, window)
    torch.testing.assert_close(found, want)
    direction = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(want, inputs, direction))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 2, 5, 16, 100]),
    seed=st.integers(0, 99),
)
def test_any_layout(lengths: list[int], heads: tuple[int, int], window: int | None, seed: int) -> None:
    assert_like_the_reference(lengths, *heads, window, seed)


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [1, 1, 1],
        [64],
        [16, 1, 16, 1],
        [5, 5, 5],
        [3, 33, 4, 34],
        [40, 2, 39, 3],
        [1, 2, 4, 8, 16, 32],
        [70, 71, 88, 90],
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 3])
def test_layouts_with_every_kind_of_group(lengths: list[int], window: int | None) -> None:
    assert_like_the_reference(lengths, 4, 2, window)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_a_layout_holds_each_token_once_and_pads_within_bounds(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    padded = 0
    for group in layout.groups:
        num_rows = 1 if group.rows_nL is None else len(group.rows_nL)
        padded += num_rows * group.length
    order = torch.arange(sum(lengths)) if layout.order_T is None else layout.order_T
    assert len(order) == len(order.unique()) == sum(lengths)
    assert int(order.max()) < padded
    # Each document is padded to at most a quarter more than itself, or to the next multiple of 16.
    assert padded <= sum(max(length * documents.GROUP_RATIO, length + documents.GROUP_STEP - 1) for length in lengths)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [-1]])
def test_an_empty_document_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        DocumentLayout.from_lengths(lengths)


def test_documents_packed_are_documents_alone() -> None:
    lengths = [7, 30, 7, 12]
    query, key, value = random_qkv(sum(lengths), 4, 2)
    together = document_attention(query, key, value, DocumentLayout.from_lengths(lengths), 0.3)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        own = slice(start, start + length)
        alone = document_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], DocumentLayout.from_lengths([length]), 0.3
        )
        torch.testing.assert_close(together[:, :, own], alone)


def test_nothing_of_one_document_reaches_another() -> None:
    """Not even as a rounding error: the gradient is exactly zero."""
    lengths = [9, 11, 10]
    query, key, value = random_qkv(sum(lengths), 4, 2)
    out = document_attention(query, key, value, DocumentLayout.from_lengths(lengths), 0.3)
    for gradient in torch.autograd.grad(out[:, :, 9:20].sum(), (query, key, value)):
        assert not gradient[:, :, :9].any()
        assert not gradient[:, :, 20:].any()


def test_dropout_drops_and_keeps_the_expectation() -> None:
    query, key, _ = random_qkv(64, 2, 2)
    value = torch.ones_like(query)
    layout = DocumentLayout.from_lengths([64])
    torch.manual_seed(0)
    out = torch.stack([document_attention(query, key, value, layout, 0.3, dropout=0.5) for _ in range(200)])
    assert out.std() > 0.1
    assert abs(out.mean().item() - 1.0) < 0.02


# As transformers calls it.


def call(mask: Tensor | None = None, layout: DocumentLayout | None = None, **kwargs: Any) -> Tensor:
    query, key, value = random_qkv(12, 4, 2)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    return attention._attention_forward(module, query, key, value, mask, scaling=0.3, document_layout=layout, **kwargs)[0]


def test_a_layer_that_gets_no_boundaries_is_an_error() -> None:
    with packed_forward(), pytest.raises(ConfigError, match="gets no document boundaries"):
        call()
    call()  # outside of a packed forward pass there are none to get


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_is_not_computed_is_refused_by_name(name: str) -> None:
    layout = DocumentLayout.from_lengths([7, 5])
    with packed_forward(), pytest.raises(ConfigError, match=name):
        call(layout=layout, **{name: 3.0})
    with packed_forward():
        call(layout=layout, **{name: None})


def test_a_mask_of_the_layers_own_is_refused() -> None:
    with packed_forward(), pytest.raises(ConfigError, match="a mask of its own"):
        call(torch.zeros(1, 1, 12, 12), DocumentLayout.from_lengths([7, 5]))


@pytest.mark.parametrize("by_name", [True, False])
def test_a_window_counts_whether_named_or_told_by_the_mask(by_name: bool) -> None:
    layout = DocumentLayout.from_lengths([7, 5])
    want = reference(*random_qkv(12, 4, 2), [7, 5], 0.3, 2).transpose(1, 2)
    with packed_forward():
        if by_name:
            found = call(None, layout, sliding_window=2)
        else:
            found = call(attention._mask(batch_size=1, q_length=12, kv_length=12, local_size=2), layout)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("architecture_name", ["llama", "mistral"])
def test_generation_is_not_affected(make_model: Callable[..., Any], architecture_name: str) -> None:
    """With a cache, without, and for padded prompts: the same tokens as with transformers' own attention."""
    model = make_model(architecture_name, "float32")
    prompts = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0  # padded on the left
    results = []
    for name in (attention.register_documents_attention(), "sdpa"):
        model.set_attn_implementation(name)
        for use_cache in (True, False):
            out = model.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache)
            results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)
    with torch.no_grad():
        sdpa = model(prompts, attention_mask=mask).logits
        model.set_attn_implementation(attention.NAME)
        documents = model(prompts, attention_mask=mask).logits
    assert torch.equal(sdpa, documents)
