"""The one module that is prepared for training: a batch in, the sum of the loss over its target tokens out.

The transformers model inside keeps its own forward for everybody else. Training enters it at its decoder, takes the
hidden states at target positions alone, and applies the output head piece by piece (`qlora.ops.cross_entropy`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batch import IGNORE, Batch
from qlora.errors import ConfigError, QloraError
from qlora.lora.layer import LoraLayer, refuse_merged
from qlora.lora.token_rows import borrowed_parameters
from qlora.objective import probe
from qlora.objective.fused import fuse
from qlora.ops import attention
from qlora.ops.attention import packed_forward
from qlora.ops.cross_entropy import (
    cross_entropy_gradients,
    cross_entropy_sum,
    linear_cross_entropy_gradients,
    with_gradients,
)
from qlora.ops.documents import DocumentLayout
from qlora.ops.softmax_loss import LogitForm
from qlora.quant.linear import QuantizedLinear


class LossHead(nn.Module):
    """The output head with the loss behind it. ZeRO-3 gathers it as one module."""

    def __init__(self, head: nn.Module, logit_factor: float, soft_cap: float | None, z_loss: float = 0.0) -> None:
        super().__init__()
        self.head, self.logit_factor, self.soft_cap, self.z_loss = head, logit_factor, soft_cap, z_loss

    @property
    def form(self) -> LogitForm:
        """What is made of the head's product before the loss."""
        return LogitForm(self.logit_factor, self.soft_cap, self.z_loss)

    def agrees_with(self, model: Any, output: Any) -> bool:
        """Whether this head gives the model's own logits of its decoder's output; inverts the factor where that does it.

        Some architectures multiply by what others of the same name divide by.
        """
        hidden = getattr(output, "last_hidden_state", None)
        logits = probe.logits_of(model, model.get_decoder(), output)
        if hidden is None:
            return False
        for _ in range(2):
            with torch.no_grad():
                if probe.makes(logits, self(hidden, None)):
                    return True
            self.logit_factor = 1.0 / self.logit_factor
        return False

    def forward(self, hidden_ND: Tensor, targets_N: Tensor | None) -> Any:
        """Loss of hidden states (N, D) against token ids (N,); without these, logits.

        Returns:
            The sum of the cross entropy, fp32 scalar, and its gradient (N, D) with respect to the hidden states, z-loss
            included. With a frozen head the loss is cut off from the graph, for `with_gradients` to put back: so nothing
            asks ZeRO-3 to gather the head again for a backward pass that does not read it. A head that trains, or that is
            in no graph, has None for a gradient.
        """
        if targets_N is None:
            return self.logits(hidden_ND)
        head, form = self.head, self.form
        if type(head) is not nn.Linear and not isinstance(head, QuantizedLinear):
            trainable = [p for p in (*head.parameters(), *borrowed_parameters(head)) if p.requires_grad]
            if trainable:
                return cross_entropy_sum(hidden_ND, targets_N, self._product, trainable, form=form), None
            loss, gradient, _ = cross_entropy_gradients(hidden_ND, targets_N, self._product, form=form)
            return loss, gradient
        inputs = [hidden_ND, head.weight, head.bias]
        hidden, weight, bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
        loss, gradient, of_head = linear_cross_entropy_gradients(
            hidden_ND,
            targets_N,
            head.borrow() if isinstance(head, QuantizedLinear) else head.weight,
            head.bias,
            form=form,
            needs=(hidden, weight, bias),
        )
        if not weight and not bias:
            return loss, gradient
        known = [(t, g) for t, g in zip(inputs, (gradient, *of_head), strict=True) if g is not None]
        return with_gradients(loss, *zip(*known, strict=True)), None

    def _product(self, hidden: Tensor) -> Tensor:
        """What the head makes (..., V) of hidden states (..., D), in the dtype it computes in."""
        if not isinstance(self.head, (LoraLayer, QuantizedLinear)):
            hidden = hidden.to(self.head.weight.dtype)  # type: ignore[arg-type]
        # The head's forward, not its call: this module is the one that hooks belong to.
        return self.head.forward(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (..., V), fp32 or wider, of hidden states (..., D)."""
        product = self._product(hidden)
        return self.form.apply(product.to(torch.promote_types(product.dtype, torch.float32)))


class TrainModel(nn.Module):
    """forward(batch) -> (loss sum over target tokens, number of target tokens).

    Args:
        model: a transformers causal language model, with LoRA layers injected.
        attention_name: what packed rows are computed with: `documents`, or a name of transformers' interface, which
            then finds the documents by their positions.
        z_loss: coefficient of logsumexp^2, whose gradient is added for every target token. The loss that is returned stays
            the cross entropy.
    """

    def __init__(self, model: Any, attention_name: str = "auto", *, z_loss: float = 0.0) -> None:
        super().__init__()
        refuse_merged(model)
        fuse(model)
        self.model = model
        self._z_loss = z_loss
        self.loss_head = build_loss_head(model, z_loss)
        self.packing_refused: ConfigError | None = None
        self._attentions = attentions_to_try(model, attention_name)
        self._set_attention(self._attentions[0])
        self._is_settled = False

    def settle(self) -> None:
        """Find out, by running a dozen tokens, how this model makes logits and whether packed documents stay apart.

        The first forward pass does so by itself. Collective where ranks keep shares of the model.
        """
        if self._is_settled or any(p.is_meta for p in self.model.parameters()):
            return
        self._is_settled = True
        if self.loss_head is None:
            self._choose_attention()
            return
        with probe.outputs_of(self.model.get_decoder()) as outputs:
            self._choose_attention()
            if not outputs:  # packed rows cannot be computed at all
                probe.run(self.model)
        if not outputs or not self.loss_head.agrees_with(self.model, outputs[-1]):
            self.loss_head = None
            self._choose_attention()  # documents are to stay apart on the whole way to the logits then

    def _choose_attention(self) -> None:
        for name in self._attentions:
            self._set_attention(name)
            self.packing_refused = self._why_not_packed()
            if self.packing_refused is None:
                break

    def _set_attention(self, name: str) -> None:
        self.attention_name = name
        _set_attention(self.model, name)

    def _why_not_packed(self) -> ConfigError | None:
        """The reason why this model, with the attention it has now, may not be given packed rows, or None."""
        try:
            if probe.documents_stay_apart(self.model, self._hidden_states):
                return None
            why = "lets packed documents see each other"
        except (QloraError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = f"cannot compute packed rows ({error})"
        return ConfigError(
            f"{type(self.model).__name__} with attention {self.attention_name!r} {why}",
            place="data.packing",
            next_step="set data.packing to false",
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rank-local but for what hooks gather. The loss is fp32; without targets it is zero, with zero gradients.

        Raises:
            ConfigError: the batch is packed, and this model would let its documents see each other.
        """
        self.settle()
        if self.packing_refused is not None and batch.document_lengths is not None:
            raise self.packing_refused
        hidden_BTD = self._hidden_states(batch)
        # Their number is known on the host, so no device is asked for it.
        places_N = (batch.targets_BT.flatten() != IGNORE).nonzero_static(size=batch.num_target_tokens).squeeze(1)
        num_targets = torch.full((), batch.num_target_tokens, device=places_N.device)
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, places_N)
        targets_N = batch.targets_BT.flatten().index_select(0, places_N)
        if self.loss_head is None:
            logits_NV = hidden_ND.float()
            loss = nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
            if self._z_loss:
                z_loss = self._z_loss * logits_NV.logsumexp(-1).square().sum()
                loss = loss + (z_loss - z_loss.detach())
            return loss, num_targets
        loss, gradient = self.loss_head(hidden_ND, targets_N)
        return loss if gradient is None else with_gradients(loss, [hidden_ND], [gradient]), num_targets

    def _hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states (B, T, D), or logits (B, T, V) of a model whose head is not known."""
        inside = self.model.get_decoder() if self.loss_head is not None else self.model
        arguments: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
        if batch.attention_mask_BT is not None:
            output = inside(**arguments, attention_mask=batch.attention_mask_BT, position_ids=batch.position_ids_BT)
        elif self.attention_name == attention.NAME and batch.document_lengths is not None:
            layout = DocumentLayout.from_lengths(batch.document_lengths, batch.input_ids_BT.device)
            with packed_forward():
                output = inside(**arguments, position_ids=batch.position_ids_BT, document_layout=layout)
        else:
            output = inside(**arguments, position_ids=batch.position_ids_BT)
        return output.last_hidden_state if self.loss_head is not None else output.logits


def attentions_to_try(model: Any, name: str) -> list[str]:
    """Attention implementations in the order of preference, of which the first that keeps documents apart is used."""
    if name not in ("auto", attention.NAME):
        return [name]
    own = model.config._attn_implementation
    config = model.config.get_text_config()
    # What attention per document does not compute: soft-capped scores, and layers that see chunks of fixed places.
    computes_more = getattr(config, "attn_logit_softcapping", None) is not None or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    if name == attention.NAME:
        if computes_more:
            raise ConfigError(
                f"attention per document does not compute all that {type(model).__name__} needs",
                place="model.attention",
                found=name,
                next_step="set it to auto",
            )
        return [attention.register_documents_attention()]
    if own == attention.NAME or computes_more or not getattr(model, "_supports_attention_backend", False):
        return [own]
    return [attention.register_documents_attention(), own]


def _set_attention(model: Any, name: str) -> None:
    if model.config._attn_implementation == name:
        return
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot compute attention with {name!r}: {str(error).splitlines()[0]}",
            place="model.attention",
            next_step="set it to auto",
        ) from error


def build_loss_head(model: Any, z_loss: float = 0.0) -> LossHead | None:
    """The model's output head with the scale and soft cap its config states, or None where it has no such head."""
    head = model.get_output_embeddings()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if head is None or decoder is None or decoder is model or not isinstance(head, (nn.Linear, LoraLayer)):
        return None
    config = model.config.get_text_config()
    factor = 1.0
    for key in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor *= float(getattr(config, key, None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)
    return LossHead(head, factor, getattr(config, "final_logit_softcapping", None), z_loss)
