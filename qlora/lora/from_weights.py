"""Starts that are found from the base's weights, layer by layer while it is loaded: PiSSA, OLoRA, LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora.config.schema import LoraConfig
from qlora.errors import ConfigError
from qlora.lora import initial
from qlora.lora.inject import base_of, selection_of
from qlora.lora.layer import generator_of
from qlora.lora.starts import PLACE, refuse_other_kinds
from qlora.lora.update import Update
from qlora.quant.linear import QuantizedLinear
from qlora.quant.residual import Factors, Subtracts


class FromWeights:
    """Implements `quant.residual.Method` for a LoRA config of which `starts.needs_weights` is true.

    Attributes:
        name, seed, subtracts: see there.
    """

    def __init__(self, config: LoraConfig, seed: int) -> None:
        self.config, self.name, self.seed = config, config.init_lora_weights, seed
        self.subtracts: Subtracts = "start"
        if self.name == "loftq":
            self.subtracts = "other" if config.loftq_iterations > 1 else "nothing"

    def targets(self, model: Any, tied: set[str]) -> dict[str, tuple[int, float]]:
        selection, _ = selection_of(model, self.config)
        paths = list(selection.targeted)
        self._check(model, paths, tied)
        if self.name == "loftq":
            paths = [path for path in paths if isinstance(base_of(model.get_submodule(path)), QuantizedLinear)]
            if not paths:
                raise ConfigError(
                    "loftq starts from what quantization loses, and no targeted layer is quantized",
                    place=PLACE,
                    found=self.name,
                    next_step="set model.quantization, or take pissa",
                )
        updates = {path: Update.of(self.config, path) for path in paths}
        return {path: (update.r, update.scaling) for path, update in updates.items()}

    def _check(self, model: Any, paths: list[str], tied: set[str]) -> None:
        """Refuse layers that a decomposition of the weight has no meaning for, or of which more would change."""
        refuse_other_kinds(model, paths, self.name)
        for path in paths:
            if f"{path}.weight" in tied and self.name != "loftq":
                raise ConfigError(
                    f"{self.name} would take its part out of a weight that the base uses elsewhere too",
                    place=PLACE,
                    found=f"{path} is tied",
                    next_step="exclude it (lora.exclude_modules)",
                )

    def factors(self, path: str, weight: Tensor, r: int, scaling: float, held: Callable[[Tensor], Tensor]) -> Factors:
        """See `quant.residual.Method`. What is taken out is rounded to `lora.dtype`, so that the update gives it back."""
        if self.name == "loftq":
            start, subtracted = initial.loftq(weight, r, scaling, self.config.loftq_iterations, held)
            return Factors(start, subtracted, scaling)
        if self.name == "olora":
            start = initial.olora(weight, r)
        else:
            niter = int(self.name.rpartition("_")[2]) if "_niter_" in self.name else None
            start = initial.pissa(weight, r, scaling, niter, generator_of(path, self.seed))
        dtype = getattr(torch, self.config.dtype)
        A, B = (part.to(dtype).float().contiguous() for part in start)
        return Factors((A, B), (A, B), scaling)
