"""What remains between an adapter that started from the base's weights and the plain one that is made of it.

On a base that is not quantized they are one function. On a quantized one they are not: the plain adapter stands beside
quantize(W), the other one beside quantize(W - s B' A').
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qlora.adapter.config_file import CONFIG_NAME, as_text
from qlora.adapter.merge_report import Text, run_unmerged
from qlora.adapter.read import METADATA_KEY, WEIGHTS_NAME, AdapterFile
from qlora.adapter.residual import unfold_initial
from qlora.adapter.tensor_file import weights_file
from qlora.config.schema import QuantizationConfig
from qlora.quant.source import BaseSource


@dataclass(frozen=True)
class Remaining:
    """The plain adapter's logits against those that were trained, over the places of a text.

    Attributes:
        kl: mean of KL(trained || plain), in nats.
        relative: |plain - trained| / |trained| of all logits.
        same: share of places at which both find the same token most likely.
    """

    kl: float
    relative: float
    same: float
    num_places: int

    def __str__(self) -> str:
        return (
            f"beside the base as it is held here, the plain adapter against the trained one, over {self.num_places} tokens: "
            f"KL {self.kl:.3g} nats, relative difference of logits {self.relative:.3g}, same next token at {self.same:.1%}"
        )

    def record(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


def write_plain(found: AdapterFile, folder: Path) -> None:
    """Write the plain adapter's two files into a folder. Raises AdapterError, OSError."""
    tensors, fields = unfold_initial(found)
    config = json.loads((found.folder / CONFIG_NAME).read_text(encoding="utf-8")) | fields
    described = {key: value for key, value in found.described.items() if key != "initial"}
    (folder / CONFIG_NAME).write_text(as_text(config), encoding="utf-8")
    (folder / WEIGHTS_NAME).write_bytes(weights_file(tensors, {METADATA_KEY: json.dumps(described, sort_keys=True)}))


def measure(
    found: AdapterFile, source: BaseSource, quantization: QuantizationConfig | None, dtype: torch.dtype, text: Text
) -> Remaining:
    """Compare both on a text, one model after the other. Rank-local.

    Args:
        text: from `merge_report.read_text`.

    Raises:
        QloraError: the base cannot be loaded, or the adapter is not its.
    """
    trained = run_unmerged(source, quantization, dtype, found.folder, text)
    with TemporaryDirectory() as name:
        write_plain(found, Path(name))
        plain = run_unmerged(source, quantization, dtype, Path(name), text)
    kl = difference = norm = torch.zeros((), dtype=torch.float64)
    same = num_places = 0
    for own, wanted in zip(plain, trained, strict=True):
        q, p = own.double(), wanted.double()
        difference, norm = difference + (q - p).square().sum(), norm + p.square().sum()
        same += int((q.argmax(1) == p.argmax(1)).sum())
        num_places += len(p)
        q, p = q.log_softmax(1), p.log_softmax(1)
        kl = kl + (p.exp() * (p - q)).sum()
    return Remaining(float(kl) / num_places, float((difference / norm).sqrt()), same / num_places, num_places)
