"""What a model's own forward pass shows and its config does not say: how it makes logits, and whether packed documents
stay apart.

Architectures differ in what lies between the last hidden state and the logits, and in what besides attention carries
one token to the next (convolutions, recurrent states, masks of their own). A list of names would be behind the next
release, so a dozen tokens are run through the model itself before its first batch. Where ranks keep shares of the
model, all of them do so together, inside the prepared module, whose hooks gather what is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora.data.batch import Batch, collate_packed
from qlora.distributed.collectives import whole_shape
from qlora.objective.alike import alike_layers_left_out, forward_replaced

DOCUMENT_TOKENS = (6, 5)
# Logits may come in bfloat16, which rounds to 0.4%; a factor that was overlooked or a layer in between makes far more.
LOGIT_TOLERANCE = 0.02


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """What a module's forward passes inside the context give, the last one last."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def run(model: Any) -> None:
    """A plain forward pass of the whole model. Collective where ranks keep shares of it."""
    with _in_eval_mode(model), torch.no_grad():
        model(input_ids=_some_tokens(model).input_ids_BT, use_cache=False)


def logits_of(model: Any, decoder: nn.Module, output: Any) -> Tensor:
    """The logits (B, T, V), fp32, that the model makes of its decoder's output. Collective as `run` is.

    The model's own forward runs, but for the decoder, whose layers are most of it and have run before.
    """
    with forward_replaced(decoder, lambda *_args, **_kwargs: output), _in_eval_mode(model), torch.no_grad():
        return model(input_ids=_some_tokens(model).input_ids_BT, use_cache=False).logits.float()


def makes(logits: Tensor, found: Tensor) -> bool:
    """Whether logits (..., V) of ours are the model's own, to rounding."""
    return found.shape == logits.shape and bool((found.float() - logits).abs().max() <= LOGIT_TOLERANCE * logits.abs().max())


def documents_stay_apart(model: Any, hidden_states: Callable[[Batch], Tensor]) -> bool:
    """Whether no token of a packed row's second document depends on the first.

    It is read off the gradient with respect to the first document's embeddings, which is exactly zero where there is no
    path at all, whatever the arithmetic's precision; a direction of length one keeps it within float16.

    Args:
        hidden_states: batch to (B, T, D) through the model.
    """
    first = DOCUMENT_TOKENS[0]
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with alike_layers_left_out(model), _in_eval_mode(model), _without_backward_hooks(model), torch.enable_grad():
            second = hidden_states(_some_tokens(model))[:, first:].float()
            # Weighted, because the plain sum over a normalised vector does not depend on what is in it.
            weights = torch.randn(second.shape, generator=torch.Generator().manual_seed(0)).to(second.device)
            (gradient,) = torch.autograd.grad((second * (weights / weights.norm())).sum(), embedded[:1])
    finally:
        handle.remove()
    return not gradient[:, :first].any()


def _some_tokens(model: Any) -> Batch:
    """Two packed documents. Their tokens are from the lower middle of the vocabulary, away from special ones."""
    num_ids = whole_shape(model.get_input_embeddings().weight)[0]
    ids = np.random.default_rng(0).integers(num_ids // 4, num_ids // 2 + 1, sum(DOCUMENT_TOKENS))
    rows = np.split(ids, [DOCUMENT_TOKENS[0]])
    return collate_packed([(row, np.ones(len(row), dtype=np.uint8)) for row in rows]).to(model.device)


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Leave out what waits for a module's backward pass to do something with its gradients, as DeepSpeed does."""
    before = {module: module._backward_hooks for module in model.modules() if module._backward_hooks}
    for module in before:
        module._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in before.items():
            module._backward_hooks = hooks


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
