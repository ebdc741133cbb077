"""README.md of a trained adapter: where it comes from and how it is loaded, here and elsewhere."""

from __future__ import annotations

from qlora.checkpoint.state import Identity
from qlora.config.schema import JobConfig
from qlora.lora.report import LoraReport

_FIRST_PLAIN = """ this adapter fits what its start left of the base's weights. Make a plain one of it first, with
`qlora export THIS_FOLDER OUT --for peft`, and open that:"""

_OPEN = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(BASE)"""
_OPEN_GROWN = """from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained("THIS_FOLDER")
if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # rows for the new tokens
    model.resize_token_embeddings(len(tokenizer))"""


def model_card(config: JobConfig, identity: Identity, report: LoraReport, num_steps: int) -> str:
    """The text of the card."""
    base = identity.base
    pinned = f", revision {base['revision']}" if base.get("revision") else ""
    quantization = config.model.quantization
    bits = quantization.kind if quantization else "none"
    if quantization and quantization.bits == 4:
        bits += f", double quantization {quantization.double_quant}"
    lora = config.lora
    changes_base = lora.init_lora_weights not in ("default", "gaussian", "eva", "loftq") or (
        lora.init_lora_weights == "loftq" and lora.loftq_iterations > 1
    )
    folder = "OUT" if changes_base else "THIS_FOLDER"
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

With PEFT:{_FIRST_PLAIN if changes_base else ""}

```python
from peft import PeftModel
{_OPEN_GROWN if lora.new_tokens else _OPEN}
model = PeftModel.from_pretrained(model, "{folder}")
```
"""
