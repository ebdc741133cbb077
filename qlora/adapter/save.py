"""Saving an adapter: what was trained and nothing else; the same state gives the same bytes from every kind of sharding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter import config_file
from qlora.adapter.expert_keys import paths_in_file, target_parameters
from qlora.adapter.keys import AdapterKey
from qlora.adapter.new_tokens import RECORD, tokens_of
from qlora.adapter.read import METADATA_KEY, TEMPLATE_NAME, WEIGHTS_NAME
from qlora.adapter.residual import INITIAL_NAME, describe_initial, render_initial
from qlora.adapter.tensor_file import TensorFile
from qlora.distributed.collectives import whole_parameters
from qlora.errors import AdapterError
from qlora.files import Content, write_file
from qlora.lora.experts import LoraExpertWeight
from qlora.lora.inject import AdapterRecord, base_of, list_candidates
from qlora.lora.linear import is_conv1d
from qlora.lora.starts import initial_factors
from qlora.lora.token_rows import ROWS
from qlora.quant.load import BaseRecord


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter by their keys in a file, sorted. Rank-local."""
    record = adapter_record(model, name)
    found: dict[str, nn.Parameter] = {}
    for path, there in paths_in_file(model, record.targeted).items():
        layer: Any = model.get_submodule(path)
        found |= {AdapterKey(there, part).in_file(): parameter for part, parameter in layer.parts(name).items()}
    for path in record.token_rows:
        rows: Any = model.get_submodule(path)
        found[AdapterKey(path, ROWS).in_file()] = rows.trainable_tokens[name]
    for path in record.trained:
        for part, parameter in model.get_submodule(path).named_parameters(recurse=False):
            found[AdapterKey(path, part).in_file()] = parameter
    return dict(sorted(found.items()))


# What PEFT calls the task of a transformers model, by the end of its class's name.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a model is for, or None."""
    is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for end, task in _TASKS.items():
        if type(model).__name__.endswith(end) and not (task == "SEQ_2_SEQ_LM" and is_decoder):
            return task
    return "CAUSAL_LM" if hasattr(model, "generate") else None


def adapter_record(model: nn.Module, name: str) -> AdapterRecord:
    """What is known of one adapter of a model. Raises AdapterError where there is none of that name."""
    adapters: dict[str, AdapterRecord] = model.__dict__.get("qlora_adapters", {})
    if name not in adapters:
        raise AdapterError(f"the model has no adapter {name!r}", found=sorted(adapters) or "none at all")
    return adapters[name]


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, write: bool = True) -> Path:
    """Write an adapter's two files. Collective under ZeRO-3: every rank calls it, with `write` on one alone.

    Raises:
        AdapterError: no such adapter, or a tensor came out empty or not finite; nothing is written then.
    """
    folder = Path(folder)
    state = whole_parameters(adapter_parameters(model, name), keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in render_files(model, state, name).items():
            write_file(folder / file_name, content)
    return folder


def render_files(model: nn.Module, state: dict[str, Tensor], name: str = "default") -> dict[str, Content]:
    """The content of an adapter's files by file name. Raises AdapterError where a tensor is empty or not finite.

    The tensors' file is not rendered but refers to `state`, which must stay as it is until the file is written.

    A model whose update started from the base's weights takes the record of that along (`qlora.adapter.residual`), and one
    that was trained with a chat template other than its tokenizer's (`qlora_chat_template`) that template. New tokens of
    the base or the adapter are recorded, also where their rows are not trained, and their tokenizer's files taken along.
    """
    for key, value in state.items():
        if value.numel() == 0:
            raise AdapterError(f"{key} is empty: it was not gathered from its shares", next_step="report this as a bug")
        if not torch.isfinite(value).all():
            raise AdapterError(f"{key} holds values that are not finite, so the adapter was not written")
    record = adapter_record(model, name)
    base: BaseRecord | None = model.__dict__.get("qlora_base")
    candidates, _ = list_candidates(model)
    described = _describe_base(base)
    files: dict[str, Content] = {}
    initial = initial_factors(model)
    changes_base = initial is not None and initial.changes_base
    if initial is not None and (changes_base or record.config.init_lora_weights == initial.method):
        files[INITIAL_NAME] = factors = render_initial(initial)
        described["initial"] = describe_initial(initial, factors)
    new = tokens_of(model, name)
    if new is not None:
        described[RECORD] = new.describe()
        files |= new.files
    fused = [path for path in record.targeted if isinstance(model.get_submodule(path), LoraExpertWeight)]
    config = config_file.render(
        record.config,
        targeted=[path for path in record.targeted if path not in fused],
        target_parameters=target_parameters(model, fused, record.config.target_parameters),
        trained=record.trained,
        token_rows=record.token_rows,
        all_paths=[candidate.path for candidate in candidates],
        base=base.source.name if base else None,
        revision=base.source.revision if base else None,
        task_type=task_type(model),
        initial=initial.method if initial is not None and changes_base else None,
        fan_in_fan_out=any(is_conv1d(base_of(model.get_submodule(path))) for path in record.targeted),
    )
    metadata = {METADATA_KEY: json.dumps(described, sort_keys=True)}
    files |= {WEIGHTS_NAME: TensorFile(state, metadata), config_file.CONFIG_NAME: config.encode()}
    template: str | None = model.__dict__.get("qlora_chat_template")
    if template is not None:
        files[TEMPLATE_NAME] = template.encode()
    return files


def _describe_base(base: BaseRecord | None) -> dict[str, Any]:
    if base is None:
        return {}
    return {
        "base": base.source.record(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization.model_dump() if base.quantization else None,
    }
