"""Which modules ZeRO-3 gathers by one hook. That training comes out the same is in `tests/e2e`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qlora.config.schema import LoraConfig
from qlora.distributed.gathers import gathered_as_one, gathers, hand_over_hidden_states, num_bytes
from qlora.lora.inject import inject_lora
from qlora.lora.kinds import WRAPPERS


def llama(vocab_size: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), seed=0)
    return model


def test_layers_are_gathered_as_one_where_the_head_is_larger_anyway() -> None:
    model = llama(1000)
    assert gathered_as_one(model, WRAPPERS) == list(model.model.layers)
    sizes = [num_bytes(together) for together in gathers(model, WRAPPERS)]
    assert max(sizes) == num_bytes([model.lm_head.weight])
    assert sum(sizes) == num_bytes(model.parameters())


def test_layers_that_are_larger_than_all_else_are_gathered_by_module() -> None:
    model = llama(50)
    found = gathered_as_one(model, WRAPPERS)
    assert len(found) == 6
    assert all(isinstance(module, WRAPPERS) for module in found)
    assert sum(num_bytes(together) for together in gathers(model, WRAPPERS)) == num_bytes(model.parameters())


def test_what_may_get_other_states_with_a_gradient_is_gathered_by_module() -> None:
    """GPT-2's layer can be given an encoder's states, whose gradient may come after that of its own."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    inject_lora(model, LoraConfig(r=2, target_modules=["c_attn"]), seed=0)
    found = gathered_as_one(model, WRAPPERS)
    assert len(found) == 2
    assert all(isinstance(module, WRAPPERS) for module in found)


def test_layers_that_share_weights_are_gathered_by_module() -> None:
    model = llama(1000)
    model.model.layers[2].mlp.down_proj = model.model.layers[0].mlp.down_proj
    assert not any(isinstance(module, LlamaDecoderLayer) for module in gathered_as_one(model, WRAPPERS))


def test_hidden_states_become_the_first_argument() -> None:
    states, mask = torch.zeros(2, requires_grad=True), torch.zeros(2)
    assert hand_over_hidden_states(nn.Identity(), (), {"hidden_states": states, "m": mask}) == ((states,), {"m": mask})
    assert hand_over_hidden_states(nn.Identity(), (states,), {"m": mask}) == ((states,), {"m": mask})


def test_a_second_input_with_a_gradient_is_an_error() -> None:
    """Its gradient would be reduced before it is there, and nobody would know."""
    states = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="Identity"):
        hand_over_hidden_states(nn.Identity(), (states,), {"others": states * 2})
    with torch.no_grad():
        hand_over_hidden_states(nn.Identity(), (states,), {"others": states})
