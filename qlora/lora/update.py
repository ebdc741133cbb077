"""What one adapter does in one layer: rank, scaling, and which of LoRA's variants. Torch-free."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from qlora.config.schema import LoraConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Update:
    """The numbers of one low-rank update.

    Attributes:
        r: rank.
        scaling: s in h = W x + s B A x: lora_alpha / r (Hu et al. 2021), or lora_alpha / sqrt(r) (Kalajdzievski 2023).
        dropout: probability of dropping an input of A in training.
        use_dora: the columns' directions and their magnitude are trained apart (Liu et al. 2024, equation 5).
        lora_bias: B has a bias, scaled as its product is.
        layer: a number of the layer, made of its path, from which its dropout is drawn.
    """

    r: int
    scaling: float
    dropout: float = 0.0
    use_dora: bool = False
    lora_bias: bool = False
    layer: int = field(default=0, compare=False)

    @classmethod
    def of(cls, config: LoraConfig, path: str) -> Update:
        """The update that a config means for the layer at a path: patterns go before the config's own r and lora_alpha."""
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        layer = zlib.crc32(path.encode()) or 1
        return cls(r, scaling, config.lora_dropout, config.use_dora, config.lora_bias, layer)


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches a module's path, or the default."""
    pattern = pattern_of(patterns, path)
    return default if pattern is None else patterns[pattern]


def pattern_of(patterns: Iterable[str], path: str) -> str | None:
    """The first regular expression that matches a module's path, or the end of it at a dot (PEFT's rule)."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
