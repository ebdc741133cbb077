"""`qlora eval`: loss and perplexity on data.eval, the base beside base and adapter."""

from __future__ import annotations

from pathlib import Path

from qlora.adapter.base import load_base
from qlora.adapter.files import load_adapter
from qlora.config.schema import JobConfig
from qlora.data.loader import EvalLoader, plan_packs
from qlora.data.prepare import prepare
from qlora.data.tokenizer import load_tokenizer, padding_token_id
from qlora.objective.evaluate import evaluate
from qlora.objective.train_model import TrainModel
from qlora.quant.source import resolve_base


def run_evaluate(config: JobConfig, adapter: Path | None) -> dict[str, dict[str, float]]:
    """Evaluate in one process and print a table. Returns the values of `base` and, where there is one, `adapter`."""
    source = resolve_base(config.model.base, config.model.revision, allow_pickle=config.model.allow_pickle)
    tokenizer = load_tokenizer(str(source.folder))
    rows = prepare(config.data.eval, tokenizer, config.data)
    model, _ = load_base(
        config.model.base,
        revision=config.model.revision,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        attention="auto" if config.model.attention in ("auto", "documents") else config.model.attention,
        allow_pickle=config.model.allow_pickle,
    )
    loader = EvalLoader(
        rows,
        plan_packs(rows, config.data, seed=0),
        per_device_batch_size=config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size,
        rank=0,
        world_size=1,
        pad_token_id=padding_token_id(tokenizer),
    )
    results = {"base": evaluate(TrainModel(model, config.model.attention), loader, model.device)}
    if adapter is not None:
        # Only now: modules that the adapter trained as wholes replace the base's own.
        load_adapter(model, adapter)
        results["adapter"] = evaluate(TrainModel(model, config.model.attention), loader, model.device)
    print(f"{'':10}{'loss':>10}{'perplexity':>14}{'target tokens':>16}")
    for name, values in results.items():
        print(
            f"{name:10}{values['eval_loss']:>10.4f}{values['eval_perplexity']:>14.3f}{values['eval_num_target_tokens']:>16,}"
        )
    return results
