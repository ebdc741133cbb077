"""`qlora eval`: loss and perplexity on data.eval, the base beside base and adapter, on one process or many."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch

from qlora.adapter.base import load_base
from qlora.adapter.files import AdapterFile, open_adapter
from qlora.adapter.new_tokens import recorded_tokens
from qlora.config.load import dump_config
from qlora.config.schema import JobConfig, LoraConfig
from qlora.data.loader import EvalLoader, plan_packs
from qlora.data.new_tokens import add_new_tokens
from qlora.data.prepare import prepare
from qlora.data.tokenizer import load_tokenizer, padding_token_id
from qlora.distributed import runtime as processes
from qlora.distributed.runtime import Runtime
from qlora.errors import AdapterError
from qlora.infer.opening import find_adapter, put_in
from qlora.lora.kinds import WRAPPERS
from qlora.lora.layer import disable_adapter
from qlora.objective.evaluate import evaluate
from qlora.objective.train_model import LossHead, TrainModel
from qlora.quant.source import resolve_base

Results = dict[str, dict[str, float]]


def run_evaluate(config: JobConfig, adapter: Path | None, *, as_json: bool = False) -> Results:
    """Evaluate on all ranks and print a table, or JSON, on the main one. Collective.

    Returns the values of `base` and, where there is one, `adapter`, on every rank.
    """
    source = resolve_base(config.model.base, config.model.revision, allow_pickle=config.model.allow_pickle)
    tokenizer = load_tokenizer(str(source.folder))
    new = _new_tokens(adapter)
    add_new_tokens(tokenizer, new)
    rows = prepare(config.data.eval, tokenizer, config.data)
    plan = plan_packs(rows, config.data, seed=0)
    runtime = processes.start_inference()
    try:
        runtime.refuse_differences(
            {
                "base": str(source.fingerprint),
                "data": rows.fingerprint,
                "packing plan": plan.hash,
                "job": dump_config(config),
                "option --adapter": "none" if adapter is None else "given",
            }
        )
        found = find_adapter(runtime, adapter) if adapter is not None else None
        loader = EvalLoader(
            rows,
            plan,
            per_device_batch_size=config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            pad_token_id=padding_token_id(tokenizer),
        )
        results = _evaluate_both(config, runtime, loader, found, new)
        if runtime.is_main:
            print(json.dumps(results) if as_json else _table(results), flush=True)
        return results
    finally:
        runtime.end()


def _new_tokens(adapter: Path | None) -> tuple[str, ...]:
    """The tokens that were added for an adapter. What is wrong with its files is said when all ranks can be told."""
    try:
        record = recorded_tokens(open_adapter(adapter)) if adapter is not None else None
    except AdapterError:
        return ()
    return record.tokens if record is not None else ()


def _evaluate_both(
    config: JobConfig, runtime: Runtime, loader: EvalLoader, found: AdapterFile | None, new: tuple[str, ...]
) -> Results:
    """The base without and with the adapter. Collective.

    Modules that an adapter trained as wholes replace the base's own, and one that started from the base's weights has
    another base; then the base itself is loaded once more, before.
    """
    if found is None or not (found.trained or found.changes_base):
        return _load_and_evaluate(config, runtime, loader, found, new)
    base = _load_and_evaluate(config, runtime, loader, None, new)
    # What was loaded refers to itself in circles; the next one needs its room.
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return base | _load_and_evaluate(config, runtime, loader, found, new)


def _load_and_evaluate(
    config: JobConfig, runtime: Runtime, loader: EvalLoader, found: AdapterFile | None, new: tuple[str, ...]
) -> Results:
    """Values of `base`, unless the adapter has replaced parts of it, and of `adapter`, where there is one. Collective."""
    model, _ = load_base(
        config.model.base,
        revision=config.model.revision,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=runtime.device,
        attention="auto" if config.model.attention in ("auto", "documents") else config.model.attention,
        allow_pickle=config.model.allow_pickle,
        sharding=runtime.sharding(),
        lora=LoraConfig(new_tokens=list(new)),
        adapter=found.folder if found is not None else None,
    )
    if found is not None:
        put_in(runtime, model, found)
    train_model = TrainModel(model, config.model.attention)
    results = {}
    with processes.for_inference(runtime, train_model, leaves=(*WRAPPERS, LossHead)):
        train_model.settle()
        if found is None or not (found.trained or found.changes_base):
            with disable_adapter(model):
                results["base"] = evaluate(train_model, loader, runtime.device, runtime)
        if found is not None:
            results["adapter"] = evaluate(train_model, loader, runtime.device, runtime)
    return results


def _table(results: Results) -> str:
    lines = [f"{'':10}{'loss':>10}{'perplexity':>14}{'target tokens':>16}"]
    for name, values in results.items():
        loss, perplexity, num_tokens = (values[f"eval_{key}"] for key in ("loss", "perplexity", "num_target_tokens"))
        lines.append(f"{name:10}{loss:>10.4f}{perplexity:>14.3f}{num_tokens:>16,}")
    return "\n".join(lines)
