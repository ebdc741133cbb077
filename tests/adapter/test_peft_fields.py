"""Every field of PEFT's config off its default: the adapter computes what it computes in PEFT, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import config as peft_config
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapter.files import load_adapter
from qlora.errors import AdapterError
from qlora.lora.layer import lora_layers
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIG = "adapter_config.json"
MakeBase = Callable[..., Path]

# A value off the default for each field. PEFT makes the adapter.
BY_PEFT: dict[str, list[Any]] = {
    "task_type": ["CAUSAL_LM", "FEATURE_EXTRACTION"],
    "inference_mode": [True],
    "r": [3, 80],
    "target_modules": [r".*layers\.1\..*(q|up)_proj", "all-linear"],
    "exclude_modules": [["layers.1.self_attn.q_proj"]],
    "lora_alpha": [5],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"]],
    "init_lora_weights": [
        False, "gaussian", "Gaussian", "eva", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica",
    ],
    "layers_to_transform": [[1], 1],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 3}],
    "megatron_core": ["another.core"],
    "trainable_token_indices": [[5, 7], {"embed_tokens": [5, 7]}],
    "use_dora": [True],
    "velora_config": [peft_config.VeloraConfig()],
    "qalora_group_size": [8],
    "layer_replication": [[[0, 2], [1, 2]]],
    "runtime_config": [peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)],
    "lora_bias": [True],
    "use_bdlora": [peft_config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)],
    "kasa_config": [peft_config.KasaConfig()],
    "alora_invocation_tokens": [[5, 6]],
    "ensure_weight_tying": [True],
}  # fmt: skip
# What PEFT applies only with data, other quantizers or other layers: the field is written beside a plain adapter.
BY_HAND: dict[str, list[Any]] = {
    "peft_type": ["IA3", "ADALORA"],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}],
    "peft_version": ["0.1.0"],
    "base_model_name_or_path": ["owner/another"],
    "revision": ["abc"],
    "megatron_config": [{"hidden_size": 8}],
    "loftq_config": [{"loftq_bits": 4, "loftq_iter": 1}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"corda_method": "kpm", "cache_file": "/etc/passwd"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "use_qalora": [True],
    "monteclora_config": [{}, {"num_samples": 2}],
    "arrow_config": [{"top_k": 2}],
    "target_parameters": [["mlp.experts.down_proj"]],
    "init_lora_weights": ["loftq", "corda", "lora_ga", "unheard of", 7, ["gaussian"]],
}
# What one field needs of others.
BESIDE: dict[str, dict[str, Any]] = {
    "layers_pattern": {"layers_to_transform": [1]},
    "use_bdlora": {"target_modules": ["q_proj"]},
}
CASES = [
    (field, value, made) for table, made in ((BY_PEFT, True), (BY_HAND, False)) for field in table for value in table[field]
]


@pytest.fixture(scope="module")
def base(make_base: MakeBase) -> Path:
    return make_base("llama", dtype="float32")


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)[0]


def test_the_table_has_every_field_of_this_peft() -> None:
    assert BY_PEFT.keys() | BY_HAND.keys() == {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.filterwarnings("ignore")  # PEFT's own remarks on each of them
@pytest.mark.parametrize(("field", "value", "made_by_peft"), CASES, ids=lambda value: str(value)[:40])
def test_a_field_is_applied_or_refused_by_name(
    base: Path, tmp_path: Path, field: str, value: Any, made_by_peft: bool
) -> None:
    config = (
        {"r": 4, "target_modules": ["q_proj", "up_proj"]} | BESIDE.get(field, {}) | ({field: value} if made_by_peft else {})
    )
    model = get_peft_model(theirs(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    if not made_by_peft:
        written = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(written | {field: value}))

    ours = load_model(resolve_base(str(base)), dtype="float32")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    refused = ""
    try:
        load_adapter(ours, tmp_path)
    except AdapterError as error:
        refused = str(error)
    if refused:
        assert field in refused or (field == "peft_type" and "not a LoRA adapter" in refused)
        assert not list(lora_layers(ours))
        after = ours.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        return
    if made_by_peft:
        model = PeftModel.from_pretrained(theirs(base), tmp_path)
    want = logits(model)
    torch.testing.assert_close(logits(ours), want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert not torch.allclose(want, logits(theirs(base)), atol=0.01)


# Of the values above, those that would make the mathematics another one: a guard against letting one through unnoticed.
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1e-4}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("megatron_config", {"hidden_size": 8}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"num_groups": 2}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("a_field_of_next_year", 0.5),
    ],
)
def test_what_another_mathematics_is(base: Path, tmp_path: Path, field: str, value: Any) -> None:
    get_peft_model(theirs(base), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | {field: value}))
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field} changes what the adapter computes"):
        load_adapter(load_model(resolve_base(str(base)), dtype="float32"), tmp_path)
