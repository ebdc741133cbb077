"""PEFT's names for our parameters, and back.

A parameter of the model `model.layers.0.mlp.up_proj.lora_A.default` is `base_model.model.model.layers.0.mlp.up_proj.
lora_A.weight` in an adapter file: PEFT's wrapper puts a prefix before the module's path in the base, and the adapter's
name is left out, so that a file can be loaded under any name. A module trained as a whole keeps its own name.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.errors import AdapterError
from qlora.lora.kinds import KINDS
from qlora.lora.token_rows import ROWS

PREFIX = "base_model.model."
# What PEFT also writes beside a targeted embedding or head: the base's own weight, which must match the base.
BASE = "base_layer.weight"
# What a tensor of an update is called behind the path of its layer.
UPDATE_PARTS = frozenset(part for kind in KINDS for part in kind.TABLES)
PARTS_A, PARTS_B = (frozenset(list(kind.TABLES)[index] for kind in KINDS) for index in (0, 1))


@dataclass(frozen=True)
class AdapterKey:
    """What one tensor of an adapter file is.

    Attributes:
        path: module path in the base.
        part: what follows it in the file: a tensor of an update (`UPDATE_PARTS`), BASE for a copy of the base's weight, ROWS
            for rows of tokens, or a parameter's own name in a module that is trained as a whole.
    """

    path: str
    part: str

    @property
    def is_of_update(self) -> bool:
        """Whether it belongs to a LoRA layer."""
        return self.part in UPDATE_PARTS

    @property
    def is_of_whole(self) -> bool:
        """Whether it takes the place of a parameter of the base."""
        return not self.is_of_update and self.part not in (BASE, ROWS)

    def in_file(self) -> str:
        """The key in an adapter file."""
        return f"{PREFIX}{self.path}.{self.part}"


def parse_key(key: str, place: str) -> AdapterKey:
    """Read a key of an adapter file. Raises AdapterError where it is none, or of a kind that is not supported."""
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"the tensor {key} is no part of a PEFT adapter", place=place, wanted=f"names that begin {PREFIX}"
        )
    rest = key[len(PREFIX) :]
    for part in (*UPDATE_PARTS, BASE, ROWS):
        if rest.endswith(f".{part}") and rest != f".{part}":
            return AdapterKey(rest.removesuffix(f".{part}"), part)
    if any(mark in rest for mark in (".lora_", "lora_magnitude", "trainable_tokens", ".modules_to_save.")):
        raise AdapterError(f"the tensor {key} is of a kind this version cannot apply", place=place)
    path, _, part = rest.rpartition(".")
    if not path or not part:
        raise AdapterError(f"the tensor {key} names no module", place=place)
    return AdapterKey(path, part)
