"""What an adapter records of a start that was found from the base's weights, and what it is without that.

`initial_lora.safetensors` lies beside the adapter (PEFT and vLLM look at no other names) and holds, by the layer's path,

    PATH.start_A, PATH.start_B              where training starts
    PATH.subtracted_A, PATH.subtracted_B    what was taken out of the weight, where that is something else (LoftQ in turns)

with method, seed, scalings and quantization errors in its metadata. The adapter's own metadata holds its sha256, so that
the two cannot be mixed up. With it and the base's files the base that was trained on is rebuilt (`qlora.quant.residual`).

An adapter of such a base is one of the unchanged base too, of more rank, because (Meng et al. 2024, section 3)

    W - s B' A' + s B A  =  W + s [B  -B'] [A; A']
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from qlora.adapter.folder import inside
from qlora.adapter.keys import AdapterKey
from qlora.adapter.tensor_file import weights_file
from qlora.errors import AdapterError, BaseModelError
from qlora.lora.update import Update
from qlora.quant import shards
from qlora.quant.residual import Factors, InitialFactors, Pair, Subtracts

if TYPE_CHECKING:
    from qlora.adapter.read import AdapterFile

INITIAL_NAME = "initial_lora.safetensors"
METADATA_KEY = "qlora_initial"
START, SUBTRACTED = ("start_A", "start_B"), ("subtracted_A", "subtracted_B")


def render_initial(initial: InitialFactors) -> bytes:
    """The content of `initial_lora.safetensors`; equal factors give equal bytes."""
    tensors: dict[str, Tensor] = {}
    subtracts: Subtracts = "nothing"
    for path, own in initial.factors.items():
        tensors |= _named(path, START, own.start)
        if own.subtracted is not None:
            same = all(torch.equal(a, b) for a, b in zip(own.subtracted, own.start, strict=True))
            subtracts = "start" if same and subtracts != "other" else "other"
    if subtracts == "other":
        for path, own in initial.factors.items():
            if own.subtracted is not None:
                tensors |= _named(path, SUBTRACTED, own.subtracted)
    record = {
        "method": initial.method,
        "seed": initial.seed,
        "subtracts": subtracts,
        "scaling": {path: own.scaling for path, own in initial.factors.items()},
        "errors": {path: list(both) for path, both in initial.errors.items()},
    }
    return weights_file(dict(sorted(tensors.items())), {METADATA_KEY: json.dumps(record, sort_keys=True)})


def describe_initial(initial: InitialFactors, content: bytes) -> dict[str, Any]:
    """What an adapter's own metadata says of it."""
    return {
        "method": initial.method,
        "seed": initial.seed,
        "changes_base": initial.changes_base,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _named(path: str, parts: tuple[str, str], pair: Pair) -> dict[str, Tensor]:
    return {f"{path}.{part}": value.contiguous().clone() for part, value in zip(parts, pair, strict=True)}


@dataclass(frozen=True)
class RecordedInitial:
    """The record of a start, checked, with no tensor read yet.

    Attributes:
        method: as `lora.init_lora_weights` names it.
        changes_base: the adapter fits the residual of the base alone.
        sha256: of the file.
    """

    file: Path
    method: str
    changes_base: bool
    sha256: str

    def read(self) -> InitialFactors:
        """All factors. Rank-local. Raises AdapterError where the file is not what the record says."""
        try:
            entries, metadata = shards.read_header_and_metadata(self.file)
            record = json.loads(metadata[METADATA_KEY])
            subtracts: str = record["subtracts"]
            if subtracts not in get_args(Subtracts):
                raise ValueError(f"it takes out {subtracts!r}")
            factors = {}
            for path, scaling in record["scaling"].items():
                start = _read_pair(entries, path, START)
                other = _read_pair(entries, path, SUBTRACTED) if subtracts == "other" else start
                if not 0 < float(scaling) < math.inf or any(a.shape != b.shape for a, b in zip(start, other, strict=True)):
                    raise ValueError(f"{path} does not fit itself")
                factors[path] = Factors(start, None if subtracts == "nothing" else other, float(scaling))
            errors = {path: (float(before), float(after)) for path, (before, after) in record["errors"].items()}
            return InitialFactors(str(record["method"]), int(record["seed"]), factors, errors)
        except (BaseModelError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise AdapterError(f"the record of the start is damaged: {error}", place=str(self.file)) from error


def _read_pair(entries: dict[str, shards.TensorEntry], path: str, parts: tuple[str, str]) -> Pair:
    A, B = (entries[f"{path}.{part}"].read_whole() for part in parts)
    if A.dtype != torch.float32 or B.dtype != torch.float32 or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{path} has no two factors that fit each other")
    return A, B


def open_initial(folder: Path, described: dict[str, Any]) -> RecordedInitial | None:
    """The record of the start that an adapter's metadata speaks of; None where it speaks of none. Rank-local.

    Raises:
        AdapterError: the record is missing, damaged, or another adapter's.
    """
    stated = described.get("initial")
    path = folder / INITIAL_NAME
    if stated is None:
        if path.exists():
            raise AdapterError(
                "the record of a start lies beside an adapter that knows of none",
                place=str(path),
                next_step="remove it, if the adapter is for the unchanged base",
            )
        return None
    place = inside(folder, INITIAL_NAME)
    try:
        wanted, method, changes_base = str(stated["sha256"]), str(stated["method"]), bool(stated["changes_base"])
        digest = hashlib.sha256(place.read_bytes()).hexdigest()
    except (KeyError, TypeError, OSError) as error:
        raise AdapterError(f"damaged metadata: initial: {error}", place=str(folder)) from error
    if digest != wanted:
        raise AdapterError(
            "the record of the start is another adapter's",
            place=str(place),
            found=digest[:12],
            wanted=wanted[:12],
            next_step="copy the adapter's folder again, as a whole",
        )
    return RecordedInitial(place, method, changes_base, digest)


def check_initial(recorded: RecordedInitial | None, initial: InitialFactors | None, place: str) -> None:
    """Whether an adapter's base and a model's are changed alike.

    Args:
        recorded: the adapter's.
        initial: the model's, its `qlora_initial`.

    Raises:
        AdapterError: one is the residual of something that the other is not.
    """
    theirs = recorded if recorded is not None and recorded.changes_base else None
    ours = initial if initial is not None and initial.changes_base else None
    if theirs is None and ours is None:
        return
    if theirs is None:
        raise AdapterError(
            "the base is the residual that another adapter started from, and this one is for the base as it is",
            place=place,
            next_step="load the base again, without lora= or adapter=",
        )
    if ours is not None and hashlib.sha256(render_initial(ours)).hexdigest() == theirs.sha256:
        return
    folder = theirs.file.parent
    raise AdapterError(
        f"the adapter started from the base's weights ({theirs.method}) and fits what was left of them, not this base",
        place=place,
        found="the base as its files hold it" if ours is None else "the residual of another adapter",
        next_step=f"call load_base(BASE, adapter={str(folder)!r}) and then load_adapter(model, {str(folder)!r}), "
        "or make a plain adapter of it: "
        f"qlora export {folder} OUT --for peft",
    )


def unfold_initial(found: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter of a changed base as one of the unchanged base: B' and A' are laid beside B and A. Rank-local.

    Exact where the base is not quantized. Where it is, quantize(W) - s B' A' is not quantize(W - s B' A'): what remains
    between them is measured by `unfolding.measure`.

    Returns:
        The tensors by their keys in a file, and the fields of `adapter_config.json` that differ from the adapter's own (r,
        lora_alpha, rank_pattern, alpha_pattern, init_lora_weights). Of an adapter that changed nothing, its own tensors.

    Raises:
        AdapterError: a tensor cannot be read.
    """
    tensors = {key.in_file(): value for key, value in found.read_all().items()}
    config = found.config
    recorded = found.initial
    if recorded is None or not recorded.changes_base:
        return tensors, {"init_lora_weights": True}
    initial = recorded.read()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path in found.targeted:
        key_A, key_B = (AdapterKey(path, part).in_file() for part in ("lora_A.weight", "lora_B.weight"))
        update = Update.of(config.to_lora_config([path], "float32"), path)
        own = initial.factors.get(path)
        if own is not None and own.subtracted is not None:
            A, B = own.subtracted
            tensors[key_A] = torch.cat([tensors[key_A].float(), A]).contiguous()
            tensors[key_B] = torch.cat([tensors[key_B].float(), -B * (own.scaling / update.scaling)], dim=1).contiguous()
        r = tensors[key_A].shape[0] if key_A in tensors else update.r
        alpha = update.scaling * (math.sqrt(update.r) if config.use_rslora else update.r)
        ranks[path] = r
        alphas[path] = alpha * (math.sqrt(r / update.r) if config.use_rslora else r / update.r)
    return tensors, _fields(found, ranks, alphas)


def _fields(found: AdapterFile, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """The config's fields for these ranks and alphas: one of each where all layers have it, else patterns by whole path."""
    config = found.config
    most_r = max(set(ranks.values()), key=lambda r: (sum(own == r for own in ranks.values()), r))
    most_alpha = max(set(alphas.values()), key=lambda a: (sum(own == a for own in alphas.values()), a))
    return {
        "r": most_r,
        "lora_alpha": int(most_alpha) if float(most_alpha).is_integer() else most_alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": {_whole(path): r for path, r in ranks.items() if r != most_r},
        "alpha_pattern": {_whole(path): alpha for path, alpha in alphas.items() if alpha != most_alpha},
        "init_lora_weights": True,
    }


def _whole(path: str) -> str:
    """A pattern of this path alone: without ^, one that is the end of another would match that too (PEFT's rule)."""
    return "^" + path.replace(".", r"\.")
