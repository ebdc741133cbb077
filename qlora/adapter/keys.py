"""PEFT's names for our parameters, and back.

A parameter of the model `model.layers.0.mlp.up_proj.lora_A.default` is `base_model.model.model.layers.0.mlp.up_proj.
lora_A.weight` in an adapter file: PEFT's wrapper puts a prefix before the module's path in the base, and the adapter's
name is left out, so that a file can be loaded under any name. A module trained as a whole keeps its own name.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.errors import AdapterError

PREFIX = "base_model.model."
# What PEFT also writes beside a targeted embedding or head: the base's own weight, which must match the base.
BASE_SUFFIX = ".base_layer.weight"


@dataclass(frozen=True)
class AdapterKey:
    """What one tensor of an adapter file is.

    Attributes:
        path: module path in the base.
        part: "lora_A", "lora_B", "base" (a copy of the base's weight), or the parameter's own name in a module that is
            trained as a whole.
    """

    path: str
    part: str

    def in_file(self) -> str:
        """The key in an adapter file."""
        suffix = f".{self.part}.weight" if self.part in ("lora_A", "lora_B") else f".{self.part}"
        return PREFIX + self.path + suffix


def parse_key(key: str, place: str) -> AdapterKey:
    """Read a key of an adapter file. Raises AdapterError where it is none, or of a kind that is not supported."""
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"the tensor {key} is no part of a PEFT adapter", place=place, wanted=f"names that begin {PREFIX}"
        )
    rest = key[len(PREFIX) :]
    for part in ("lora_A", "lora_B"):
        if rest.endswith(f".{part}.weight"):
            return AdapterKey(rest.removesuffix(f".{part}.weight"), part)
    if rest.endswith(BASE_SUFFIX):
        return AdapterKey(rest.removesuffix(BASE_SUFFIX), "base")
    if any(mark in rest for mark in (".lora_", "lora_magnitude", "trainable_tokens", ".modules_to_save.")):
        raise AdapterError(f"the tensor {key} is of a kind this version cannot apply", place=place)
    path, _, part = rest.rpartition(".")
    return AdapterKey(path, part)
