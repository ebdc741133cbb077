"""LoRA over an embedding: torch's, and transformers' that multiply what was looked up by a factor."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qlora.distributed.collectives import gathered
from qlora.errors import ConfigError
from qlora.lora.layer import LoraLayer, generator_of, refuse_variants
from qlora.lora.update import Update
from qlora.ops.lora_embedding import column_norms, lora_embedding


class LoraEmbedding(LoraLayer):
    """y = e (W[x] + s A^T[x] B^T); with DoRA y = e m / |W^T + s B A| (W[x] + s A^T[x] B^T), norms over the vocabulary.

    Shapes: W (vocabulary, hidden), A (r, vocabulary), B (hidden, r), m (hidden,). A starts at zero and B normal, as in PEFT:
    a token that training has not met keeps its embedding. e is the architecture's factor, 1 for most.

    A head that is tied to the embedding goes on with the frozen weight alone (as in PEFT): the update belongs to this
    layer and not to the weight. lora_dropout has no effect here (as in PEFT): a token id has nothing to be dropped of.
    """

    TABLES: ClassVar[dict[str, str]] = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    asks_for_anchor = True  # its input has no gradient

    base_layer: nn.Embedding
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    _merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.register_buffer("_merged_weight", None, persistent=False)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether it is torch's Embedding, or one of transformers' that multiplies by `embed_scale` and does no more.

        Other subclasses look up something else, such as positions with an offset.
        """
        return is_embedding(module)

    @classmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        embedding: Any = module
        if embedding.max_norm is not None:
            raise ConfigError(
                "an embedding with max_norm writes to its weight in every forward pass, so it cannot be frozen",
                place="lora.target_modules",
                found=f"Embedding({embedding.num_embeddings}, {embedding.embedding_dim}), max_norm {embedding.max_norm}",
                next_step="leave it out (lora.exclude_modules)",
            )
        refuse_variants(update, "an embedding", lora_bias="its B has no bias in an adapter's files")
        vocabulary, hidden = embedding.num_embeddings, embedding.embedding_dim
        shapes: dict[str, tuple[int, ...]] = {
            "lora_embedding_A": (update.r, vocabulary),
            "lora_embedding_B": (hidden, update.r),
        }
        if update.use_dora:
            shapes["lora_magnitude_vector"] = (hidden,)
        return shapes

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as other code looks for it."""
        return self.base_layer.weight

    def _initial_values(
        self,
        update: Update,
        shapes: dict[str, tuple[int, ...]],
        path: str,
        seed: int,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if start is None:
            B = torch.empty(shapes["lora_embedding_B"]).normal_(generator=generator_of(path, seed))
            start = torch.zeros(shapes["lora_embedding_A"]), B
        return super()._initial_values(update, shapes, path, seed, start)

    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        with gathered(self.base_layer.parameters()):
            return column_norms(self.base_layer.weight.data, lora_A, lora_B, scaling)

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(s B A)^T (vocabulary, hidden), multiplied in fp32 or wider; without DoRA's magnitude."""
        A, B = self.lora_embedding_A[name].detach(), self.lora_embedding_B[name].detach()
        wide = torch.promote_types(torch.promote_types(A.dtype, torch.float32), dtype)
        return (A.to(wide).T @ B.to(wide).T * self.updates[name].scaling).to(dtype)

    def merge(self) -> None:
        """Add the active update to a copy of W and look up in that from now on.

        Raises:
            AdapterError: there is no active update, one is merged already, or ZeRO-3 has partitioned the weight.
        """
        name = self._check_can_merge()
        weight = self.base_layer.weight.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(wide) + self.delta(name, wide)
        if name in self.lora_magnitude_vector:
            A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
            norms = column_norms(weight, A, B, self.updates[name].scaling)
            merged *= self.lora_magnitude_vector[name].detach().to(wide) / norms
        self._merged_weight = merged.to(weight.dtype)
        self.merged_adapter = name

    def unmerge(self) -> None:
        """Go back to W and the update beside it. Raises AdapterError where nothing is merged."""
        self._check_can_unmerge()
        self._merged_weight = self.merged_adapter = None

    def forward(self, ids: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Embeddings (..., hidden) of token ids (...). The anchor is what ZeRO-3 tells the end of a backward pass by."""
        if self.computes_merged:
            return functional_call(self.base_layer, {"weight": self._merged_weight}, (ids,))  # type: ignore[dict-item]
        name = self.applied
        if name is None:
            return self.base_layer(ids)
        update, base = self.updates[name], self.base_layer
        return lora_embedding(
            ids,
            base,
            self.lora_embedding_A[name],
            self.lora_embedding_B[name],
            update.scaling,
            embed_scale(base),
            magnitude_H=self.lora_magnitude_vector[name] if update.use_dora else None,
            read_weight=lambda: base.weight.data,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            anchor=anchor,
        )


def is_embedding(module: nn.Module) -> bool:
    """Whether it is torch's Embedding, or one of transformers' `...ScaledWordEmbedding`."""
    if type(module) is nn.Embedding:
        return True
    known = isinstance(module, nn.Embedding) and type(module).__module__.startswith("transformers.")
    return known and type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")


def embed_scale(module: nn.Module) -> Tensor | float:
    """What an embedding multiplies by, in the dtype it does so."""
    scale: Any = getattr(module, "embed_scale", 1.0)
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else float(scale)  # type: ignore[arg-type]
