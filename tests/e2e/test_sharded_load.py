"""Ranks under ZeRO-3 load a base in shares, and nothing that they gather outlives its use.

Real processes do both (`load_in_shares.py`, one launch). The oracle of loading is a whole load in this process: the
tensors that ranks gather have its bytes. The oracle of training is the same model, whole, in plain torch.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.places import free_port

pytestmark = pytest.mark.e2e
MakeBase = Callable[..., Path]
WORLDS = (1, 2, 3, 4)
# Nothing is a multiple of three, and an MLP's width is odd.
UNEVEN = {"intermediate_size": 129, "vocab_size": 319}
LOADS = (
    "llama", "llama tied", "llama tied, both in the files", "llama tied, two in the files", "llama fp4", "llama float32",
    "llama unquantized", "llama in 4 bits", "llama of two dtypes", "gpt2", "gpt_neox", "gemma2", "mixtral",
    "llama to 8 bits", "llama in 8 bits", "gpt2 to 8 bits", "llama, pissa", "llama, loftq, 8 bits", "gpt2, olora",
)  # fmt: skip

RECOMPUTE = ("none", "plain", "reentrant")
# No gather runs ahead: what is whole between forward and backward is so by mistake.
NOTHING_AHEAD = {"stage3_prefetch_bucket_size": 0}
STRICT = (
    *(f"{model}, {recompute}" for model in ("llama", "mixtral") for recompute in RECOMPUTE),
    *("experts, none", "experts, plain"),  # with updates of the fused experts
)
# Gathers run ahead until so many elements are whole.
MOST_AHEAD = 30_000
SOME_AHEAD = {"stage3_max_live_parameters": MOST_AHEAD}
AHEAD = ("llama, ahead", "mixtral, ahead")
SHIPPED = "llama, shipped"
GOOD = (*STRICT, *AHEAD, SHIPPED)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """What the ranks run, for what is to be the same here."""
    path = Path(__file__).with_name("load_in_shares.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Bases


@pytest.fixture(scope="module")
def loads(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Bases, each with something that the others have not."""
    one = {"num_hidden_layers": 1}
    tied = make_base("llama", tie_word_embeddings=True, **UNEVEN, **one)
    folder = tmp_path_factory.mktemp("bases")
    bases = {
        # Wide enough for padding not to count.
        "llama": make_base("llama", hidden_size=256, intermediate_size=512, max_shard_size="1MB"),
        "llama tied": tied,
        "llama tied, both in the files": _with_head(tied, folder / "both", 0.0),
        "llama tied, two in the files": _with_head(tied, folder / "two", 1.0),
        "llama fp4": make_base("llama", **UNEVEN, **one),
        "llama float32": make_base("llama", **one),
        "llama unquantized": make_base("llama", **UNEVEN, **one),
        "llama in 4 bits": _quantized(make_base("llama", **one), folder / "in_4_bits", load_in_4bit=True),
        "llama of two dtypes": _of_two_dtypes(make_base("llama", dtype="float32", **one), folder / "two_dtypes"),
        "gpt2": make_base("gpt2", n_layer=1),  # Conv1D keeps its weights transposed
        "gpt_neox": make_base("gpt_neox", **one),  # biases
        "gemma2": make_base("gemma2", **one),
        "mixtral": make_base("mixtral", **one),  # experts of several tensors each
        "llama to 8 bits": make_base("llama", **UNEVEN, **one),
        "llama in 8 bits": _quantized(make_base("llama", **UNEVEN, **one), folder / "in_8_bits", load_in_8bit=True),
        "gpt2 to 8 bits": make_base("gpt2", n_layer=1),
        "llama, pissa": make_base("llama", **UNEVEN, **one),
        "llama, loftq, 8 bits": make_base("llama", **UNEVEN, **one),
        "gpt2, olora": make_base("gpt2", n_layer=1),
    }
    starts = {
        "llama, pissa": {"init_lora_weights": "pissa", "r": 3},
        "llama, loftq, 8 bits": {"init_lora_weights": "loftq", "loftq_iterations": 2, "r": 3},
        "gpt2, olora": {"init_lora_weights": "olora", "r": 3},
    }
    quantizations: dict[str, Any] = {
        "llama fp4": {"quant_type": "fp4", "double_quant": False, "block_size": 4096},
        "llama float32": {"quant_storage": "float32", "block_size": 32},
        "llama unquantized": None,
        "llama to 8 bits": {"bits": 8},
        "gpt2 to 8 bits": {"bits": 8},
        "llama, loftq, 8 bits": {"bits": 8},
    }
    assert tuple(bases) == LOADS
    return {
        name: {"base": str(base), "dtype": "bfloat16", "quantization": quantizations.get(name, {})}
        | ({"initial": starts[name]} if name in starts else {})
        for name, base in bases.items()
    }


def _with_head(base: Path, folder: Path, difference: float) -> Path:
    """A tied base whose files hold the head as well."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += difference  # in the last rank's run
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _quantized(base: Path, folder: Path, **bits: bool) -> Path:
    """As transformers saves a base that it has quantized."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        **bits,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config).save_pretrained(folder)
    return folder


def _of_two_dtypes(base: Path, folder: Path) -> Path:
    """One file in fp32 and one in fp16."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[::2]},
        "model-00002-of-00002.safetensors": {name: tensors[name].half() for name in names[1::2]},
    }
    for file, part in parts.items():
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


# Trainings


@pytest.fixture(scope="module")
def trainings(make_base: MakeBase) -> dict[str, dict[str, Any]]:
    """Among their weights are such as torch's own functions read: a linear layer that is left alone, routers, experts."""
    models: dict[str, dict[str, Any]] = {
        "llama": {
            "base": str(make_base("llama", dtype="float32", **UNEVEN)),
            "quantization": {"skip_modules": ["o_proj"]},
            "lora": {"r": 4, "exclude_modules": ["o_proj"]},
        },
        "mixtral": {"base": str(make_base("mixtral", dtype="float32")), "quantization": {}, "lora": {"r": 4}},
    }
    fused = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    models["experts"] = models["mixtral"] | {"lora": {"r": 4} | fused}

    def training(model: str, recompute: str, zero: dict[str, Any], steps: int = 3, spoil: str | None = None) -> Any:
        own = {"dtype": "float32", "recompute": recompute, "zero": zero, "steps": steps, "spoil": spoil}
        return models[model] | own

    plans = {name: training(*name.split(", "), NOTHING_AHEAD) for name in STRICT}
    plans |= {
        "llama, ahead": training("llama", "none", SOME_AHEAD),
        "mixtral, ahead": training("mixtral", "plain", SOME_AHEAD),
        SHIPPED: training("llama", "none", {}),
        "llama, no look-up": training("llama", "none", NOTHING_AHEAD, 1, "no look-up"),
        "mixtral, no look-up": training("mixtral", "none", NOTHING_AHEAD, 1, "no look-up"),
        "llama, bitsandbytes": training("llama", "none", NOTHING_AHEAD, 1, "bitsandbytes"),
    }
    plans["llama, bitsandbytes"]["quantization"] = {"double_quant": False, "skip_modules": ["o_proj"]}
    return plans


# The launch


@dataclass(frozen=True)
class Launched:
    """What the ranks wrote."""

    out: Path

    def ranks(self, world_size: int, kind: str, name: str) -> list[dict[str, Any]]:
        files = [self.out / f"{world_size}.{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text())[kind][name] for file in files]


@pytest.fixture(scope="module")
def launched(
    project: Any, loads: dict[str, Any], trainings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Launched:
    out = tmp_path_factory.mktemp("shares")
    worlds = [
        {"size": size, "port": free_port(), "loads": loads, "trainings": trainings if size == 2 else {}} for size in WORLDS
    ]
    plan, log = out / "plan.json", out / "launch.log"
    plan.write_text(json.dumps({"out": str(out), "worlds": worlds}))
    script = str(Path(__file__).with_name("load_in_shares.py"))
    process = project.start([*project.launch_arguments("zero3", max(WORLDS)), script, str(plan)], log)
    assert project.wait(process, log) == 0, log.read_text(errors="replace")[-6000:]
    return Launched(out)


# Loading


@pytest.fixture(scope="module")
def wholes(script: ModuleType, loads: dict[str, Any]) -> dict[str, Any]:
    """The bases, loaded whole in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the mean of the scales depends on it
    models = {name: script.load(plan) for name, plan in loads.items()}
    torch.set_num_threads(before)
    return models


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_what_ranks_gather_is_the_whole_base_byte_for_byte(
    launched: Launched, script: ModuleType, wholes: dict[str, Any], world_size: int, name: str
) -> None:
    model = wholes[name]
    wanted = script.digests(dict(model.named_parameters()) | dict(model.named_buffers()))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    others = ("gpt2", "gemma2", "gpt2 to 8 bits", "gpt2, olora")
    assert tied == (name in ("llama tied", "llama tied, both in the files", *others))
    for found in launched.ranks(world_size, "loads", name):
        assert list(found["digests"]) == list(wanted)
        assert [key for key, value in found["digests"].items() if value != wanted[key]] == []
        assert found["tied"] == tied


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_rank_keeps_a_run_of_every_tensor(launched: Launched, wholes: dict[str, Any], world_size: int, name: str) -> None:
    quantized = wholes[name].qlora_base.quantized
    assert (quantized == ()) == (name == "llama unquantized")
    for found in launched.ranks(world_size, "loads", name):
        parameters = found["parameters"]
        for key, facts in parameters.items():
            assert (facts["share"], facts["held"]) == (-(-facts["whole"] // world_size), 0), key
        for path in quantized:
            for own in ("weight", "statistics"):
                assert parameters[f"{path}.{own}"]["share"] > 0
            assert parameters[f"{path}.statistics"]["dtype"] == "torch.uint8"
        assert found["elements_left"] == 0  # of what was gathered for the hashes


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_rank_keeps_and_reads_its_part_of_a_base(
    launched: Launched, loads: dict[str, Any], wholes: dict[str, Any], world_size: int
) -> None:
    from qlora.quant.shards import read_entries

    kept_whole = sum(p.numel() * p.element_size() for p in wholes["llama"].parameters())
    in_files = sum(entry.num_bytes for entry in read_entries(Path(loads["llama"]["base"])).values())
    ranks = launched.ranks(world_size, "loads", "llama")
    for found in ranks:
        kept = sum(facts["share"] * facts["itemsize"] for facts in found["parameters"].values())
        assert kept_whole / world_size <= kept <= 1.02 * kept_whole / world_size
        assert found["bytes_read"] <= 1.05 * in_files / world_size
    assert sum(found["bytes_read"] for found in ranks) >= in_files


# Training


@pytest.mark.parametrize("name", GOOD)
def test_no_gathered_weight_is_kept_for_backward(launched: Launched, name: str) -> None:
    for found in launched.ranks(2, "trainings", name):
        traced = [step["traced"] for step in found["steps"]]
        assert [traced[0], traced[-1]] == [False, True]
        assert len(found["frozen"]) > 20
        for step in found["steps"]:
            assert step["between"]["seen"] == sorted(found["frozen"])  # each was gathered, and looked at
            assert step["between"]["leaked"] == {}
            assert step["after"] == {"leaked": {}, "held": {}}


@pytest.mark.parametrize("name", STRICT)
def test_without_gathers_ahead_nothing_is_whole_between_forward_and_backward(launched: Launched, name: str) -> None:
    for found in launched.ranks(2, "trainings", name):
        assert [step["between"]["held"] for step in found["steps"]] == [{}, {}, {}]


@pytest.mark.parametrize("name", AHEAD)
def test_gathers_run_ahead_as_far_as_the_configuration_says(launched: Launched, name: str) -> None:
    """Once DeepSpeed knows the order, it keeps or gathers what backward needs first: so many elements and one tensor."""
    for found in launched.ranks(2, "trainings", name):
        assert sum(found["frozen"].values()) > 2 * MOST_AHEAD
        held = [sum(step["between"]["held"].values()) for step in found["steps"]]
        assert held[0] == 0
        assert 0 < max(held) <= MOST_AHEAD + max(found["frozen"].values())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama, no look-up", ["layers.0.self_attn.o_proj.weight"]),
        ("mixtral, no look-up", ["layers.0.mlp.gate.weight", "layers.0.mlp.experts.down_proj"]),
        ("llama, bitsandbytes", ["layers.0.mlp.down_proj.base_layer.weight"]),
    ],
)
def test_the_count_finds_weights_that_are_kept(launched: Launched, name: str, kept: list[str]) -> None:
    """Without the look-up, and with bitsandbytes' own function, they are: the tests above can fail."""
    for found in launched.ranks(2, "trainings", name):
        leaked = found["steps"][0]["between"]["leaked"]
        assert {f"model.model.{key}" for key in kept} <= set(leaked)
        assert all(size > 0 for size in leaked.values())


@pytest.fixture(scope="module")
def gradients(script: ModuleType, trainings: dict[str, Any]) -> Callable[[str], dict[str, torch.Tensor]]:
    """The gradients of three steps of a model in this process, over the batches of both ranks."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def compute(model: str) -> dict[str, torch.Tensor]:
        train_model = script.build(trainings[f"{model}, none"])
        parameters = {name: p for name, p in train_model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=script.LEARNING_RATE, weight_decay=0.0)
        found = {}
        for step in range(3):
            loss = sum(train_model(script.batch_of(step, rank))[0] for rank in range(2))
            (loss / script.num_targets(step, 2)).backward()
            found |= {f"{step}.{name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        return found

    def get(model: str) -> dict[str, torch.Tensor]:
        if model not in known:
            known[model] = compute(model)
        return known[model]

    return get


@pytest.mark.parametrize("name", GOOD)
def test_gradients_are_those_of_one_process(
    launched: Launched, gradients: Callable[[str], dict[str, torch.Tensor]], name: str
) -> None:
    found, wanted = load_file(launched.out / f"2.{name}.safetensors"), gradients(name.split(",")[0])
    assert sorted(found) == sorted(wanted)
    assert len(found) > 3 * 2 * 6
    for key, value in found.items():
        scale = float(wanted[key].abs().max())
        assert (scale > 0) == (not (key.startswith("0.") and ".lora_A." in key))  # B starts at zero
        # From the second step on there is what AdamW makes of the rounding of gradients that are nearly zero.
        atol = (1e-5 if key.startswith("0.") else 1e-3) * scale
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
