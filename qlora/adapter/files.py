"""Adapter files, in one place for whoever uses them: `save.py` writes, `read.py` opens, `fit.py` checks, `load.py` loads.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them (`docs/adapter_format.md`). What
PEFT has no field for (the base's fingerprint, how it was quantized) is in the safetensors metadata, where other readers do
not look.
"""

from qlora.adapter.fit import check_fit
from qlora.adapter.load import delete_adapter, load_adapter
from qlora.adapter.read import METADATA_KEY, TEMPLATE_NAME, WEIGHTS_NAME, AdapterFile, open_adapter
from qlora.adapter.save import adapter_parameters, adapter_record, render_files, save_adapter

__all__ = [
    "METADATA_KEY",
    "TEMPLATE_NAME",
    "WEIGHTS_NAME",
    "AdapterFile",
    "adapter_parameters",
    "adapter_record",
    "check_fit",
    "delete_adapter",
    "load_adapter",
    "open_adapter",
    "render_files",
    "save_adapter",
]
