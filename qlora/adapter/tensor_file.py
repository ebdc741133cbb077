"""Small safetensors files as bytes that depend on their content alone."""

from __future__ import annotations

import json

from safetensors.torch import save as safetensors_bytes
from torch import Tensor


def weights_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library's order of metadata changes with each call."""
    plain = safetensors_bytes(tensors)
    data_at = 8 + int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))} | json.loads(plain[8:data_at])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + plain[data_at:]
