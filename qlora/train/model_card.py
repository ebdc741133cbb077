"""README.md of a trained adapter: where it comes from and how it is loaded, here and elsewhere."""

from __future__ import annotations

from qlora.checkpoint.state import Identity
from qlora.config.schema import JobConfig
from qlora.lora.inject import LoraReport


def model_card(config: JobConfig, identity: Identity, report: LoraReport, num_steps: int) -> str:
    """The text of the card."""
    base = identity.base
    pinned = f", revision {base['revision']}" if base.get("revision") else ""
    quantization = config.model.quantization
    bits = f"{quantization.quant_type}, double quantization {quantization.double_quant}" if quantization else "none"
    return f"""---
base_model: {base["name"]}
library_name: peft
tags: [lora, qlora]
---
# LoRA adapter

| | |
|---|---|
| base | {base["name"]}{pinned} |
| base fingerprint | {base.get("fingerprint")} |
| quantization while training | {bits} |
| rank, alpha | {config.lora.r}, {config.lora.lora_alpha:g} |
| trained parameters | {report.num_trainable:,} of {report.num_total:,} ({report.percent:.3g}%) |
| optimizer steps | {num_steps} |
| versions | {", ".join(f"{name} {number}" for name, number in identity.versions.items())} |

With qlora: `qlora generate --adapter THIS_FOLDER --prompt "..."`

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "THIS_FOLDER")
```
"""
