"""safetensors files whose bytes depend on their content alone, made without a second copy of the tensors.

The library's order of metadata changes with each call, and it copies every tensor before it writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# In the order in which the library lays tensors: wide elements first, so that each lies at a multiple of its own size.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that is not written yet.

    Args:
        tensors: contiguous, on the CPU; read when the file is.
        metadata: free-form, of strings.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's content in pieces: the header, and each tensor as it lies in memory."""
        order = list(DTYPE_NAMES)
        names = sorted(self.tensors, key=lambda name: (order.index(self.tensors[name].dtype), name))
        header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **self.metadata}.items()))}
        offset = 0
        for name in names:
            tensor = self.tensors[name]
            stop = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8 bytes
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            if self.tensors[name].numel():
                flat = self.tensors[name].detach().reshape(-1).view(torch.uint8)
                yield memoryview(flat.numpy())  # type: ignore[arg-type]


def weights_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a small file at once; see `TensorFile`."""
    return b"".join(TensorFile({k: v.contiguous() for k, v in tensors.items()}, metadata).chunks())
