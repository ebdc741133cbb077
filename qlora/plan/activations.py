"""What a micro-step keeps for its backward pass, in bytes, and how many layers have to be computed again for it to fit.

What one layer saves is a short table of terms, each a width that follows from the config: the residual stream before each
norm, queries, keys and values, the attention's output, both halves of the MLP. A layer that is computed again keeps its
input alone. All else is arithmetic over the two numbers.

**The first layers are the ones computed again, never the last.** Backward goes from the last layer to the first. A layer
that is computed again needs, for a moment, all that it did not keep. Were it one of the last, everything that the layers
before it have kept would be there beside that; when a first layer's turn comes, it is gone. So with the first n of L layers
computed again the peak is

    max((L - n) S + n R + max(loss, W),   (n - 1) R + S + W)

with S what a layer saves, its input R among it, and W what its backward pass works with; with the last n it is
(L - n + 1) S + (n - 1) R + W.
The very last layer, whose backward pass comes at once, gains nothing by it, unless the loss needs the room meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.config.schema import JobConfig
from qlora.plan.shapes import BaseShapes

FLOAT32 = 4
# Of the free memory, what may be filled: the allocator leaves holes, and libraries have buffers of their own.
USABLE = 0.9
# What NCCL takes for its channels where there are several ranks.
NCCL_BYTES = 1 << 30
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Of `qlora.ops.cross_entropy` and `softmax_loss`: target tokens whose logits exist at once, and logits widened at once.
LOSS_CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
LOSS_BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}
# Architectures that the table was compared with (`tests/plan/test_activations.py`), and what is built like them.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "gemma2", "gemma3_text")
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Norm:
    """One norm of a layer: numbers of a token that it sees, and in how many pieces it looks at them."""

    width: int
    pieces: int = 1


@dataclass(frozen=True)
class LayerShapes:
    """Widths of one decoder layer, in numbers a token.

    Attributes:
        queries, keys: of all heads together; values are as wide as keys.
        joined: queries, keys and values are cut from the output of one linear layer.
        whole_scores: attention's scores exist as a whole, of all pairs of tokens of a row.
        ffn: of one half of the MLP, or of one expert.
        experts, experts_per_token: 0 where the MLP is none of experts.
        shared_ffn: of an expert that every token goes through.
    """

    num_layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    ffn: int
    norms: tuple[Norm, ...]
    vocabulary: int
    joined: bool = False
    whole_scores: bool = False
    experts: int = 0
    experts_per_token: int = 0
    shared_ffn: int = 0


def layer_shapes(
    config: Mapping[str, Any], norms: Iterable[tuple[str, int]], *, whole_scores: bool = False
) -> LayerShapes | None:
    """Return the widths of a model's layers, or None for an architecture whose layers the table does not describe.

    Args:
        config: of the text model, as config.json has it.
        norms: path and number of weights of each norm in one layer.
        whole_scores: attention makes its scores whole, whatever the config says.
    """

    def first(*keys: str) -> int | None:
        return next((config[key] for key in keys if type(config.get(key)) is int), None)

    hidden, layers = first("hidden_size"), first("num_hidden_layers")
    heads, vocabulary = first("num_attention_heads"), first("vocab_size")
    kind = config.get("model_type")
    if kind not in (*LIKE_LLAMA, *WITH_EXPERTS) or not (hidden and layers and heads and vocabulary):
        return None
    size = first("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    key_heads = first("num_key_value_heads") or heads
    experts = first("num_local_experts", "num_experts") if kind in WITH_EXPERTS else None
    ffn = (first("moe_intermediate_size") if experts else None) or first("intermediate_size") or 4 * hidden
    of_heads = {"q": Norm(heads * size, heads), "k": Norm(key_heads * size, key_heads)}
    found = []
    for path, width in norms:
        name = re.search(r"(?:^|\.)([qk])[^.]*norm", path)
        whole = name is None or width not in (size, heads * size, key_heads * size)
        found.append(Norm(hidden) if whole or name is None else of_heads[name[1]])
    return LayerShapes(
        num_layers=layers,
        hidden=hidden,
        heads=heads,
        queries=heads * size,
        keys=key_heads * size,
        ffn=ffn,
        norms=tuple(found),
        vocabulary=vocabulary,
        joined=kind == "phi3",
        whole_scores=whole_scores or config.get("attn_logit_softcapping") is not None,
        experts=experts or 0,
        experts_per_token=(first("num_experts_per_tok") or 1) if experts else 0,
        shared_ffn=(first("shared_expert_intermediate_size") or 0) if experts else 0,
    )


@dataclass(frozen=True)
class Remade:
    """Which modules are the project's own, which save their inputs and whose outputs are made again (`qlora.ops.remake`).

    Those of transformers save in fp32 what they normalise and what their activations give, and the linear layers behind
    them save their outputs.
    """

    norms: bool = True
    mlps: bool = True


def saved_terms(shapes: LayerShapes, itemsize: int, row_length: int, remade: Remade) -> dict[str, int]:
    """Return what one layer saves for backward, by what it is, in bytes a token.

    Args:
        itemsize: bytes of a number in the dtype to compute in.
        row_length: tokens of a row; counts where attention makes its scores whole.
    """
    queries, keys = shapes.queries * itemsize, shapes.keys * itemsize
    terms = {
        "inputs of norms": sum(n.width for n in shapes.norms) * (itemsize if remade.norms else max(itemsize, FLOAT32)),
        "statistics of norms": FLOAT32 * sum(n.pieces for n in shapes.norms),
        # Those of one layer are kept beside their rotated copies, for the sake of the values.
        "queries, keys and values": queries + 2 * keys + (queries + keys if shapes.joined else 0),
        "output of attention": queries,
    }
    if shapes.whole_scores:  # before softmax and after, which is in fp32, and rounded; keys and values for every head
        terms["scores of attention"] = shapes.heads * row_length * 2 * FLOAT32 + 2 * (queries - keys)
    else:
        terms["statistics of attention"] = FLOAT32 * shapes.heads
    if not remade.norms:
        # One feeds attention and one the MLP; experts do not save it.
        terms["outputs of norms"] = shapes.hidden * itemsize * (1 if shapes.experts else 2)
    return terms | _of_mlp(shapes, itemsize, remade)


def _of_mlp(shapes: LayerShapes, itemsize: int, remade: Remade) -> dict[str, int]:
    # Otherwise what the activation gives as well, and its product with the other half.
    dense = (2 if remade.mlps else 4) * itemsize
    if not shapes.experts:
        return {"halves of the MLP": dense * shapes.ffn}
    # Frozen experts save no input; each token's output is kept for the gradient of its weight.
    chosen = shapes.experts_per_token
    terms = {"experts": chosen * (3 * shapes.ffn + shapes.hidden) * itemsize}
    # Scores and their sum, and of each chosen expert number and weight, and its place in three orders.
    terms["routing"] = FLOAT32 * (shapes.experts + 1) + chosen * 40
    if shapes.shared_ffn:
        terms["shared expert"] = dense * shapes.shared_ffn + shapes.hidden * itemsize
    return terms


@dataclass(frozen=True)
class Activations:
    """What a micro-step needs on one rank beside weights and optimizer, in bytes.

    Attributes:
        num_layers, num_tokens: of the model, of the micro-step.
        saved: of one layer that is not computed again.
        kept_input: of one that is; 0 where inputs are offloaded.
        around: of what is outside the layers: last hidden states, and their gradient.
        working: of one layer's backward pass, for its time.
        loss: of the logits that exist at once.
    """

    num_layers: int
    num_tokens: int
    saved: int
    kept_input: int
    around: int
    working: int
    loss: int

    def peak(self, num_recomputed: int) -> int:
        """Bytes at the fullest moment of a micro-step whose first `num_recomputed` layers are computed again."""
        kept = (self.num_layers - num_recomputed) * self.saved + num_recomputed * self.kept_input
        # The last of them is computed again when all kept layers behind it are gone.
        again = (num_recomputed - 1) * self.kept_input + self.saved + self.working if num_recomputed else 0
        begins = kept + (self.loss if num_recomputed == self.num_layers else max(self.loss, self.working))
        return self.around + max(begins, again)

    def peak_of_last(self, num_recomputed: int) -> int:
        """The same where it is the last layers that are computed again: never less."""
        kept = (self.num_layers - num_recomputed) * self.saved + num_recomputed * self.kept_input
        again = self.working + (self.saved - self.kept_input if num_recomputed else 0)
        return self.around + kept + max(self.loss, again)

    def fewest(self, room: int) -> int:
        """Fewest layers to compute again for a peak within `room` bytes; what makes the least peak where nothing fits."""
        counts = range(self.num_layers + 1)
        return next((n for n in counts if self.peak(n) <= room), min(counts, key=lambda n: (self.peak(n), n)))


def activations(
    shapes: LayerShapes,
    itemsize: int,
    rows: int,
    row_length: int,
    *,
    remade: Remade,
    offloaded: bool = False,
    head_trains: bool = False,
    device: str = "cuda",
) -> Activations:
    """Return what a micro-step of full rows, all of whose tokens are targets, needs on one rank.

    Args:
        rows, row_length: of the micro-step, in tokens.
        itemsize, remade: see `saved_terms`.
        offloaded: inputs of layers that are computed again are in the host's memory; two are on their way at a time.
        head_trains: its loss is differentiated by autograd, piece by piece.
        device: cuda or cpu.
    """
    num_tokens, hidden = rows * row_length, shapes.hidden * itemsize
    ffn = max(shapes.ffn * max(1, shapes.experts_per_token), shapes.shared_ffn)
    return Activations(
        num_layers=shapes.num_layers,
        num_tokens=num_tokens,
        saved=num_tokens * sum(saved_terms(shapes, itemsize, row_length, remade).values()),
        kept_input=0 if offloaded else num_tokens * hidden,
        # The input and the output of the last norm, the hidden states at targets, their gradient.
        around=num_tokens * hidden * (4 + 2 * offloaded),
        # The MLP's: its product made again, gradients of the product and of each half, of its input and of its output.
        working=num_tokens * itemsize * (4 * ffn + 3 * shapes.hidden),
        loss=_loss_bytes(shapes.vocabulary, itemsize, num_tokens, device, head_trains),
    )


def plan_activations(base: BaseShapes, job: JobConfig, device: str = "cuda") -> Activations | None:
    """Return what a micro-step of full rows of a job needs on one rank; None for an architecture that is not known.

    Norms and MLPs are taken to be the project's own.
    """
    layer = next((match[0] for t in base.tensors if (match := re.match(r".*?\.\d+\.", t.path))), None)
    norms = [] if layer is None else [t for t in base.tensors if t.kind == "norm" and t.path.startswith(layer)]
    paths = [(t.module.removeprefix(str(layer)), t.num_elements) for t in norms if t.path.endswith(".weight")]
    shapes = layer_shapes(base.config, paths, whole_scores=job.model.attention == "eager")
    if shapes is None:
        return None
    return activations(
        shapes,
        ITEMSIZE[job.model.dtype],
        job.train.per_device_train_batch_size,
        job.data.max_length,
        remade=Remade(),
        offloaded=job.train.offload_activations,
        head_trains=job.lora.train_head or (base.tied and job.lora.train_embeddings),
        device=device,
    )


def _loss_bytes(vocabulary: int, itemsize: int, num_tokens: int, device: str, head_trains: bool) -> int:
    logits = min(num_tokens, LOSS_CHUNK_TOKENS[device]) * vocabulary
    if head_trains:  # as they come, in fp32, their softmax and their gradient
        return logits * (itemsize + 3 * FLOAT32)
    return logits * itemsize + 2 * FLOAT32 * min(logits, LOSS_BLOCK_LOGITS[device])
