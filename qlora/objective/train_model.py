"""The one module that is prepared for training: a batch in, the sum of the loss over its target tokens out.

The transformers model inside keeps its own forward for everybody else. Training enters it at its decoder, takes the
hidden states at target positions alone, and applies the output head piece by piece (`qlora.ops.cross_entropy`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batch import IGNORE, Batch
from qlora.lora.layer import LoraLayer
from qlora.ops import attention
from qlora.ops.attention import DocumentLayout, packed_forward
from qlora.ops.cross_entropy import cross_entropy_sum


class LossHead(nn.Module):
    """The output head with the loss behind it. ZeRO-3 gathers it as one module."""

    def __init__(self, head: nn.Module, logit_factor: float, soft_cap: float | None) -> None:
        super().__init__()
        self.head, self.logit_factor, self.soft_cap = head, logit_factor, soft_cap

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Sum of the cross entropy, fp32 scalar, of hidden states (N, D) against token ids (N,)."""
        trainable = [p for p in self.head.parameters() if p.requires_grad]
        return cross_entropy_sum(hidden_ND, targets_N, self._logits, trainable)

    def _logits(self, hidden: Tensor) -> Tensor:
        if not isinstance(self.head, LoraLayer):
            hidden = hidden.to(self.head.weight.dtype)  # type: ignore[arg-type]
        # The head's forward, not its call: this module is the one that hooks belong to.
        logits = self.head.forward(hidden).float() if hidden.dtype != torch.float64 else self.head.forward(hidden)
        if self.logit_factor != 1.0:
            logits = logits * self.logit_factor
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


class TrainModel(nn.Module):
    """forward(batch) -> (loss sum over target tokens, number of target tokens).

    Args:
        model: a transformers causal language model, with LoRA layers injected.
        attention_name: what packed rows are computed with: `documents`, or a name of transformers' interface, which
            then finds the documents by their positions.
    """

    def __init__(self, model: Any, attention_name: str = "auto") -> None:
        super().__init__()
        self.model = model
        if attention_name in ("auto", attention.NAME):
            attention_name = choose_attention(model, required=attention_name == attention.NAME)
        self.attention_name = attention_name
        if model.config._attn_implementation != attention_name:
            model.set_attn_implementation(attention_name)
        self.loss_head = build_loss_head(model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rank-local but for what hooks gather. The loss is fp32; without targets it is zero, with zero gradients."""
        hidden_BTD = self._hidden_states(batch)
        is_target_BT = batch.targets_BT != IGNORE
        num_targets = is_target_BT.sum()
        if self.loss_head is None:
            logits = hidden_BTD.float()
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            return loss, num_targets
        return self.loss_head(hidden_BTD[is_target_BT], batch.targets_BT[is_target_BT]), num_targets

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


def choose_attention(model: Any, *, required: bool) -> str:
    """`documents` where the architecture goes through transformers' attention interface, else what it has."""
    config = model.config.get_text_config()
    computes_more = getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss"
    if required or (getattr(model, "_supports_attention_backend", False) and not computes_more):
        return attention.register_documents_attention()
    return model.config._attn_implementation


def build_loss_head(model: Any) -> LossHead | None:
    """The model's output head with its scale and soft cap, or None where it is not known how logits are made."""
    head = model.get_output_embeddings()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if head is None or decoder is None or decoder is model or not isinstance(head, (nn.Linear, LoraLayer)):
        return None
    config = model.config.get_text_config()
    known = {"logits_scaling": "divide", "logit_scale": "multiply", "output_multiplier_scale": "multiply"}
    factor = 1.0
    for key, how in known.items():
        value = getattr(config, key, None)
        if value is not None:
            factor = float(value) if how == "multiply" else 1.0 / float(value)
    return LossHead(head, factor, getattr(config, "final_logit_softcapping", None))
