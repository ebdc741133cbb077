"""LoRA over the fused weights of a block of experts: (E, out, in), or (E, in, out) in some models, and biases (E, out).

transformers keeps all experts of a block in one module, written for its experts interface (`use_experts_implementation`):

    y_e = W_down,e gate(W_up,e x + b_up,e) + b_down,e;    the block's output is the weighted sum over a token's experts

A module that is called once for two weights is not wrapped weight by weight. `LoraExperts` takes its place and its call;
inside it each adapted weight has a `LoraExpertWeight`, a LoRA layer at the weight's own path (`mlp.experts.down_proj`) that
holds the updates and is never called itself. The module's own gate, activation and norm are used; its weights are multiplied
in `ops.lora_experts`, where no whole update is made. With no update active the module's own forward is called.

Under ZeRO-3 `LoraExperts` is gathered as one: ranks whose tokens go to other experts do the same collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import whole_shape
from qlora.errors import AdapterError, ConfigError
from qlora.lora.layer import LoraLayer, refuse_variants
from qlora.lora.update import Update
from qlora.ops.lora_experts import Routing, expert_delta, lora_experts_linear, per_expert, route

DOWN = "down_proj"
# What the experts interface sets on a module that is written for it.
INTERFACE = ("has_gate", "has_bias", "is_transposed")


class ExpertWeight(nn.Module):
    """One fused weight of an experts module, seen as a layer that an update can be added to. It owns nothing.

    Attributes:
        experts: the module whose weight it is; not a child, because the model has it already.
        name: what the weight is called there.
    """

    experts: Any

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts
        self.name = name

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it lies there."""
        weight: nn.Parameter = self.experts.get_parameter(self.name)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(E, out), frozen, or None."""
        return getattr(self.experts, f"{self.name}_bias").data if self.experts.has_bias else None

    @property
    def is_transposed(self) -> bool:
        """Whether each expert's weight lies as (in, out)."""
        return bool(self.experts.is_transposed)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of experts, inputs, outputs."""
        num_experts, rows, columns = whole_shape(self.weight)
        return (num_experts, rows, columns) if self.is_transposed else (num_experts, columns, rows)

    def read(self) -> Tensor:
        """W (E, out, in), a view, read anew from the parameter."""
        return self.oriented(self.weight.data)

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight that lies as this one does, as (E, out, in)."""
        return weight.mT if self.is_transposed else weight

    def apply_to(self, x: Tensor, routing: Routing, *, from_tokens: bool) -> Tensor:
        """The frozen layers' outputs (S, out), see `ops.lora_experts`."""
        return lora_experts_linear(x, routing, self.read, self.bias, None, None, 1.0, from_tokens=from_tokens)


class LoraExpertWeight(LoraLayer):
    """W_e + s B_e A_e of every expert. Shapes: A (E r, in), B (out, r E), as in an adapter file."""

    base_layer: ExpertWeight
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    _merged_weight: Tensor | None

    def __init__(self, base_layer: ExpertWeight) -> None:
        super().__init__(base_layer)
        # A buffer, so that it moves with the layer; never part of what is saved.
        self.register_buffer("_merged_weight", None, persistent=False)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether it is a fused weight, as `module_at` gives it."""
        return isinstance(module, ExpertWeight) and why_not(module.experts, module.name) is None

    @classmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        assert isinstance(module, ExpertWeight)
        refuse_variants(
            update,
            "a fused expert weight",
            use_dora="no adapter format has a place for a magnitude of each expert",
            lora_bias="no adapter format has a place for a bias of each expert",
        )
        num_experts, num_inputs, num_outputs = module.sizes
        return {
            "lora_A.weight": (num_experts * update.r, num_inputs),
            "lora_B.weight": (num_outputs, update.r * num_experts),
        }

    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        raise ConfigError("a fused expert weight cannot have a magnitude", place="lora.use_dora")

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B_e A_e of all experts, in the layout of the weight, multiplied in fp32 or wider."""
        update, num_experts = self.updates[name], self.base_layer.sizes[0]
        A, B = self.lora_A[name], self.lora_B[name]
        return expert_delta(A, B, num_experts, update.r, update.scaling, self.base_layer.is_transposed).to(dtype)

    def to_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """An update's factors, fp32: A (E, r, inputs), B (E, outputs, r), so that each expert's delta is s B_e A_e."""
        A, B = self.lora_A[name].detach().float(), self.lora_B[name].detach().float()
        return per_expert(A, B, self.base_layer.sizes[0])

    def from_factors(self, A: Tensor, B: Tensor, update: Update) -> dict[str, Tensor]:
        """The reverse of `to_factors`."""
        shapes = self.shapes(self.base_layer, update)
        values = {"lora_A.weight": A.flatten(0, 1), "lora_B.weight": B.permute(1, 2, 0).flatten(1)}
        return {part: value.reshape(shapes[part]) for part, value in values.items()}

    def merge(self) -> None:
        """Add the active update to a copy of the weight and use that from now on.

        Raises:
            AdapterError: there is no active update, one is merged already, or ZeRO-3 has partitioned the weight.
        """
        name = self._check_can_merge()
        weight = self.base_layer.weight.data
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._merged_weight = (weight.to(wide) + self.delta(name, wide)).to(weight.dtype)
        self.merged_adapter = name

    def unmerge(self) -> None:
        """Go back to the weight and the update beside it. Raises AdapterError where nothing is merged."""
        self._check_can_unmerge()
        self._merged_weight = self.merged_adapter = None

    def apply_to(self, x: Tensor, routing: Routing, *, from_tokens: bool) -> Tensor:
        """The experts' outputs (S, out) with what is active, see `ops.lora_experts`."""
        base = self.base_layer
        if self.computes_merged:
            assert self._merged_weight is not None
            merged = base.oriented(self._merged_weight)
            return lora_experts_linear(x, routing, lambda: merged, base.bias, None, None, 1.0, from_tokens=from_tokens)
        name = self.applied
        if name is None:
            return base.apply_to(x, routing, from_tokens=from_tokens)
        update = self.updates[name]
        return lora_experts_linear(
            x,
            routing,
            base.read,
            base.bias,
            self.lora_A[name],
            self.lora_B[name],
            update.scaling,
            update.dropout if self.training else 0.0,
            from_tokens=from_tokens,
        )

    def _device(self) -> torch.device:
        return self.base_layer.weight.device

    def _check_can_merge(self) -> str:
        name = super()._check_can_merge()
        if self.base_layer.weight.numel() == 0:
            raise AdapterError("the weight is partitioned over ranks", next_step="save the adapter and use `qlora merge`")
        return name


class LoraExperts(nn.Module):
    """An experts module with updates on its fused weights; called as it was: (tokens, top_k_index, top_k_weights).

    Attributes:
        base_layer: the module.
        weights: the `LoraExpertWeight` of each adapted weight, by its name; also a child of that name.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weights(self) -> dict[str, LoraExpertWeight]:
        return {name: child for name, child in self.named_children() if isinstance(child, LoraExpertWeight)}

    def layer(self, name: str) -> LoraExpertWeight:
        """The LoRA layer of a weight, made where there is none."""
        if name not in self.weights:
            self.add_module(name, LoraExpertWeight(ExpertWeight(self.base_layer, name)).train(self.training))
        return self.weights[name]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (T, D), the experts chosen for each (T, K) and their weights (T, K) -> (T, D)."""
        layers = self.weights
        if not any(layer.applied is not None or layer.computes_merged for layer in layers.values()):
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        base: Any = self.base_layer
        up, down = (layers.get(name) or ExpertWeight(base, name) for name in (up_of(base), DOWN))
        routing = route(top_k_index, next(iter(layers.values())).base_layer.sizes[0])
        inner_SD = up.apply_to(hidden_states, routing, from_tokens=True)
        inner_SD = base._apply_gate(inner_SD) if base.has_gate else base.act_fn(inner_SD)
        out_SD = down.apply_to(inner_SD, routing, from_tokens=False)
        if getattr(base, "has_post_expert_norm", False):
            out_SD = base.post_expert_norm(out_SD)
        weighted_SD = out_SD * top_k_weights.reshape(-1)[routing.perm_S].unsqueeze(1)
        return routing.gather(weighted_SD).to(hidden_states.dtype)


def up_of(experts: Any) -> str:
    """What an experts module calls the weight before its activation."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def why_not(module: Any, name: str) -> str | None:
    """Why a parameter can carry no update, or None where it can."""
    num_dimensions = len(whole_shape(module.get_parameter(name)))
    if num_dimensions != 3:
        return f"it has {num_dimensions} dimensions, fused expert weights have 3"
    if not all(hasattr(module, attribute) for attribute in INTERFACE):
        return f"{type(module).__name__} is not written for transformers' experts interface, so its call is not known"
    if name not in (up_of(module), DOWN):
        return f"the experts interface multiplies {up_of(module)} and {DOWN} alone"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are shared out over ranks by transformers"
    return None


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter of the base: its path there, the module that owns it, its name in that module."""
    inside = None  # modules come before what is inside them, which follows at once
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        base: Any = module
        if isinstance(module, (LoraLayer, LoraExperts)):
            inside = f"{path}."
            base = module.base_layer
        for name, _ in base.named_parameters(recurse=False):
            yield (f"{path}.{name}" if path else name), base, name
