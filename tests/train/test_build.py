"""What is computed again in backward. That it changes no gradient, in any mode: tests/e2e/test_stages.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from qlora.errors import ConfigError
from qlora.train.build import recompute_blocks


@pytest.fixture
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Two blocks, whose last linear layers alone are trained."""
    model = make_model("llama").requires_grad_(False).train()
    for block in model.model.layers:
        block.mlp.down_proj.requires_grad_(True)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_both_kinds_compute_each_block_again_and_reach_the_first(model: LlamaForCausalLM, use_reentrant: bool) -> None:
    ids = torch.arange(12).reshape(1, 12)
    weights = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(ids).logits.square().sum(), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_blocks(model, use_reentrant=use_reentrant)
    passes: list[bool] = []  # whether a graph is made
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    model(ids, use_cache=False).logits.square().sum().backward()
    assert passes == [not use_reentrant] * 2 + [True] * 2
    for weight, gradient in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    # The embeddings are frozen, and only the reentrant kind needs a gradient there.
    assert model.get_input_embeddings()(ids).requires_grad == use_reentrant


def test_a_model_that_cannot_is_refused(model: LlamaForCausalLM) -> None:
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: LlamaForCausalLM cannot") as caught:
        recompute_blocks(model, use_reentrant=False)
    assert "set it to false" in str(caught.value)
