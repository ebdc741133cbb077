"""What an injection did, in numbers and in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import median

from torch import nn

from qlora.config.schema import LoraConfig
from qlora.lora.target import summarize
from qlora.lora.token_rows import TokenIds
from qlora.lora.update import pattern_of
from qlora.ops import nf4
from qlora.quant.linear import QuantizedLinear


@dataclass(frozen=True)
class LoraReport:
    """What an injection did. Counts are of weights: a quantized layer counts its weights, not its bytes.

    Attributes:
        targeted: path -> the entry of target_modules that matched it.
        skipped: path -> why a layer that could carry an adapter does not.
        trained: modules trained as a whole.
        token_rows: see `AdapterRecord`.
        num_trainable, num_total: parameters.
        errors: path -> relative error of the quantized weight, plain and with the update that it starts with, where the
            start was found from the weights (see `quant.residual.InitialFactors`).
        waits_for_inputs: A keeps its default start until `start_from_inputs` is given data (eva).
        patterns: an entry of rank_pattern or alpha_pattern in words -> number of the layers that it decides about.
    """

    targeted: dict[str, str]
    skipped: dict[str, str]
    trained: tuple[str, ...]
    num_trainable: int
    num_total: int
    untargetable: dict[str, str] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    patterns: dict[str, int] = field(default_factory=dict)
    token_rows: TokenIds = field(default_factory=dict)
    waits_for_inputs: bool = False

    @property
    def percent(self) -> float:
        """Share of the parameters that train, in percent."""
        return 100.0 * self.num_trainable / self.num_total

    def __str__(self) -> str:
        lines = [f"LoRA on {len(self.targeted)} layers"]
        lines += [f"  {name}: {count} x, by {entry}" for (name, entry), count in summarize(self.targeted).items()]
        lines += [f"  {pattern}, in {count} x" for pattern, count in self.patterns.items()]
        if self.trained:
            lines.append(f"trained as a whole: {', '.join(self.trained[:6])}{' ...' if len(self.trained) > 6 else ''}")
        lines += [f"rows of tokens: {len(ids)} of {path}" for path, ids in self.token_rows.items()]
        for title, table in (("left without", self.skipped), ("cannot carry one", self.untargetable)):
            lines += [f"  {title}: {name}, {count} x ({why})" for (name, why), count in summarize(table).items()]
        if self.errors:
            lines += [f"quantization error |W - (Q + s B A)| / |W| of {len(self.errors)} layers"]
            lines += [f"  {when}: {_spread(self.errors, index)}" for index, when in enumerate(("plain", "at the start"))]
        if self.waits_for_inputs:
            lines.append("eva: A waits for data, at its default start until start_from_inputs is called, which train does")
        lines.append(f"trainable {self.num_trainable:,} of {self.num_total:,} parameters ({self.percent:.4g}%)")
        return "\n".join(lines)


def matched_patterns(config: LoraConfig, paths: Collection[str]) -> dict[str, int]:
    """See `LoraReport.patterns`: the first pattern that matches a path decides."""
    found: dict[str, int] = {}
    tables: dict[str, Mapping[str, float]] = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for key, table in tables.items():
        first = [pattern_of(table, path) for path in paths]
        found |= {f"{key} {pattern}: {value:g}": first.count(pattern) for pattern, value in table.items()}
    return found


def _spread(errors: dict[str, tuple[float, float]], index: int) -> str:
    values = {path: both[index] for path, both in errors.items()}
    worst = max(values, key=lambda path: values[path])
    return f"median {median(values.values()):.4g}, worst {values[worst]:.4g} ({worst})"


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of weights. Quantized layers count their weights, not their bytes; ZeRO-3 shares count as the whole."""
    packed = {id(p): 0 for m in model.modules() if isinstance(m, QuantizedLinear) for p in (m.weight, m.statistics)}
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, nf4.BnbLinear4bit)):
            packed[id(module.weight)] = module.in_features * module.out_features
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad or not trainable_only:
            whole = getattr(parameter, "ds_numel", parameter.numel())
            total += packed.get(id(parameter), whole)
    return total
