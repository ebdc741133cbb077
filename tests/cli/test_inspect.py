"""`qlora inspect` against real PEFT's files, against damage, and against safetensors' own judgement of a header."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora.cli.adapter_folder import read_adapter_folder
from qlora.cli.inspect import describe
from qlora.cli.main import main
from qlora.cli.tensor_header import read_header
from qlora.errors import AdapterError, CheckpointError

PREFIX = "base_model.model.model.layers.0."
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], "revision": "abc"}


def tensors(r: int = 4) -> dict[str, np.ndarray]:
    shapes = {"q_proj.lora_A": (r, 6), "q_proj.lora_B": (8, r), "v_proj.lora_A": (r, 6), "v_proj.lora_B": (2, r)}
    return {f"{PREFIX}{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(values: dict[str, np.ndarray] | None = None, folder: str = "adapter", **config: object) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": "owner/base", **config}))
        save_file(tensors() if values is None else values, path / "adapter_model.safetensors", {"format": "pt"})
        return path

    return write


def commit(folder: Path, **extra: object) -> Path:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files, **extra}))
    (folder / "COMMITTED").touch()
    return folder


def message_of(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter_folder(folder)
    return str(caught.value)


def test_what_real_peft_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: PEFT's own count of what it saved."""
    peft = pytest.importorskip("peft", reason="the test extra installs it")
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(10, 6)
            self.q_proj = torch.nn.Linear(6, 8)
            self.conv = torch.nn.Conv1d(6, 8, 3)
            self.head = torch.nn.Linear(8, 10)

    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=["embed", "q_proj", "conv"], modules_to_save=["head"]
    )
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    state = peft.get_peft_model_state_dict(model)
    facts = describe(read_adapter_folder(tmp_path / "adapter"))
    assert facts["num_tensors"] == len(state)
    assert facts["num_parameters"] == sum(tensor.numel() for tensor in state.values())
    assert facts["num_bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert (facts["r"], facts["lora_alpha"], facts["num_lora_modules"]) == (3, 6, 3)
    assert facts["scaling"] == pytest.approx(model.base_model.model.q_proj.scaling["default"])
    assert facts["dtypes"] == {"F32": len(state)}
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "head" in capsys.readouterr().out


VARIANTS = {
    "use_dora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "token_rows": {"trainable_token_indices": [3, 4, 9]},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "layers_to_transform": {"layers_to_transform": [1]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_real_peft_saved(
    tmp_path: Path, make_model: Callable[..., Any], variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: PEFT's layers, as they are in memory."""
    peft = pytest.importorskip("peft", reason="the test extra installs it")
    from peft.tuners.lora import LoraLayer

    base = make_model("mixtral") if variant == "target_parameters" else make_model("llama")
    targets = ["q_proj"] if variant == "target_parameters" else ["q_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, **VARIANTS[variant]))
    model.save_pretrained(str(tmp_path))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    facts = describe(read_adapter_folder(tmp_path))
    assert facts["num_lora_modules"] == len(layers)
    assert facts["ranks"] == dict(sorted(Counter(layer.r["default"] for layer in layers).items()))
    experts = sum(type(layer).__name__ == "ParamWrapper" for layer in layers)
    assert facts["lora_modules_by_kind"].get("experts", 0) == experts
    assert facts["token_rows"] == ({"model.embed_tokens": 3} if variant == "token_rows" else {})
    assert facts["num_whole_modules"] == 0
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in {
        "use_dora": ["variants", "use_rslora, use_dora"],
        "lora_bias": ["lora_bias"],
        "rank_pattern": ["rank_pattern", "q_proj: 2", "2 layers of r 2, 2 layers of r 4", "down_proj: 3"],
        "token_rows": ["rows of tokens", "3 of model.embed_tokens"],
        "target_parameters": ["experts", "mlp.experts.down_proj"],
        "layers_to_transform": ["layers_to_transform"],
    }[variant]:
        assert part in shown, shown


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"], ["down_proj"]])
@pytest.mark.parametrize("owner", ["mlp.experts.", ""])
@pytest.mark.parametrize("pattern", [{"gate_up_proj": 8}, {r"layers\.0\.mlp\.experts\.down_proj": 2, "gate_up_proj": 3}])
def test_ranks_of_experts_by_pattern(
    tmp_path: Path, make_model: Callable[..., Any], names: list[str], owner: str, pattern: dict[str, int]
) -> None:
    """Oracle: PEFT's layers, as they are in memory."""
    peft = pytest.importorskip("peft", reason="the test extra installs it")
    from peft.tuners.lora import LoraLayer

    entries = [f"{owner}{name}" for name in names]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=entries, rank_pattern=pattern)
    model = peft.get_peft_model(make_model("mixtral"), config)
    model.save_pretrained(str(tmp_path))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    facts = describe(read_adapter_folder(tmp_path))
    assert facts["ranks"] == dict(sorted(Counter(layer.r["default"] for layer in layers).items()))
    assert facts["lora_modules_by_kind"]["experts"] == sum(type(layer).__name__ == "ParamWrapper" for layer in layers)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ranks_of_experts_that_cannot_be_told(
    tmp_path: Path, make_model: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft", reason="the test extra installs it")
    entries = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=entries, rank_pattern={"gate_up_proj": 8})
    peft.get_peft_model(make_model("mixtral"), config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"target_parameters": [*entries, "mlp.experts.third"]}))
    facts = describe(read_adapter_folder(tmp_path))
    assert facts["ranks"] == {4: 2, "unknown": 4}
    assert main(["inspect", str(tmp_path)]) == 0
    assert "4 layers of unknown r" in capsys.readouterr().out
    file.write_text(json.dumps(written | {"rank_pattern": {"gate_up_proj": 7}}))
    assert "of its experts has" in message_of(tmp_path)


def test_the_record_of_a_start_belongs_to_its_adapter(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write()
    record = folder / "initial_lora.safetensors"
    record.write_bytes(b"x")
    assert "initial_lora.safetensors lies beside an adapter that knows of none" in message_of(folder)
    stated = {"method": "pissa", "changes_base": True, "sha256": hashlib.sha256(b"x").hexdigest()}
    save_file(tensors(), folder / "adapter_model.safetensors", {"format": "pt", "qlora": json.dumps({"initial": stated})})
    assert describe(read_adapter_folder(folder))["initial"] == stated
    assert main(["inspect", str(folder)]) == 0
    assert "pissa, for what was left of the base" in capsys.readouterr().out
    record.write_bytes(b"y")
    assert "initial_lora.safetensors is another adapter's" in message_of(folder)
    record.unlink()
    assert "initial_lora.safetensors: is missing" in message_of(folder)


def test_table_and_json_say_the_same(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = write()
    (folder / "training_args.bin").touch()
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    for part in ("owner/base at abc", "q_proj, v_proj", "8 (scaling 2)", "4 (4 F32)", "88 (352 bytes)", "ok", "not opened"):
        assert part in shown, shown
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["num_parameters"], facts["integrity"], facts["checkpoint"]) == ("adapter", 88, "ok", None)


def test_a_checkpoint_is_compared_with_its_manifest(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = commit(write(folder="run/checkpoints/step-00000007"), identity={"world_size": 7, "versions": {"torch": "2.13"}})
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "2 files match the manifest" in shown
    assert "saved versions    torch 2.13" in shown
    assert "saved world_size  7" in shown
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "adapter_model.safetensors has another sha256" in message_of(folder)
    weights.write_bytes(data[:-1])
    assert "the manifest says" in message_of(folder)
    weights.unlink()
    assert "no adapter_model.safetensors" in message_of(folder)


def test_a_torn_checkpoint_is_named(write: Callable[..., Path]) -> None:
    folder = write(folder="run/checkpoints/step-00000007")
    with pytest.raises(CheckpointError, match="never completed"):
        read_adapter_folder(folder)
    (folder / "COMMITTED").touch()
    assert "manifest.json: is missing" in message_of(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "gone", "."])
def test_a_manifest_cannot_lead_out(write: Callable[..., Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    folder = commit(write())
    (folder / "manifest.json").write_text(json.dumps({"files": {name: {"size": 1, "sha256": "0"}}}))
    assert any(words in message_of(folder) for words in ("leads out", "is missing", "not a regular file"))


def test_links_out_and_pipes_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write()
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of its folder" in message_of(folder)
    weights.unlink()
    weights.symlink_to(weights)
    assert "no adapter_model.safetensors" in message_of(folder)
    weights.unlink()
    os.mkfifo(weights)
    assert "is not a regular file" in message_of(folder)


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickles_are_never_opened(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = write()
    payload = pickle.dumps(Canary(tmp_path / "canary"))
    (folder / "adapter_model.safetensors").write_bytes(payload)
    assert "a pickle file under a safetensors name" in message_of(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(payload)
    assert "the weights are a pickle file, which is never opened" in message_of(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.pop(f"{PREFIX}q_proj.lora_B.weight"), "q_proj has lora_A and no lora_B"),
        (lambda t: t.update({f"{PREFIX}v_proj.lora_A.weight": np.ones((0, 6), np.float32)}), "is empty, shape [0, 6]"),
        (lambda t: t.update({f"{PREFIX}v_proj.lora_B.weight": np.ones((2, 5), np.float32)}), "differ in r"),
        (lambda t: t.clear(), "it holds no tensors"),
        (
            lambda t: t.update({f"{PREFIX}q_proj.lora_magnitude_vector": np.ones(8, np.float32)}),
            "q_proj has a magnitude, and",
        ),
        (lambda t: t.update({f"{PREFIX}q_proj.lora_B.bias": np.ones(8, np.float32)}), "q_proj has a bias, and the config"),
        (lambda t: t.update({f"{PREFIX}o_proj.lora_B.bias": np.ones(8, np.float32)}), "neither lora_A nor lora_B"),
        (lambda t: t.update({f"{PREFIX}q_proj.lora_A": np.ones((4, 6), np.float32)}), "is the same tensor as"),
        (lambda t: t.update({f"{PREFIX}v_proj.lora_B.weight": np.ones((2, 4), np.int8)}), "is of dtype I8"),
        (
            lambda t: t.update(
                {f"{PREFIX}v_proj.lora_A.weight": np.ones((5, 6), np.float32)}
                | {f"{PREFIX}v_proj.lora_B.weight": np.ones((2, 5), np.float32)}
            ),
            "v_proj: lora_A has 5 rows, and the config says r 4",
        ),
    ],
)
def test_a_part_that_is_missing_is_named(write: Callable[..., Path], change: Callable, wanted: str) -> None:
    values = tensors()
    change(values)
    assert wanted in message_of(write(values))


def test_many_damages_are_counted(write: Callable[..., Path]) -> None:
    message = message_of(write({f"m{i}.lora_A.weight": np.ones((1, 1), np.float32) for i in range(29)}))
    assert "damaged: 29 of its parts" in message
    assert "and 9 more" in message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "\x00", "[" * 100_000])
def test_a_broken_config_is_named(write: Callable[..., Path], text: str) -> None:
    folder = write()
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json: is not" in message_of(folder)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (b"\xff", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1}', "malformed"),
        (b'{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 0]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "contradicts itself"),
        (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}', "leave a hole"),
        (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}', "cut off or extended"),
        (b'{"__metadata__": {"a": 1}}', "not text by name"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', "given twice"),
        (b'{"a": {"dtype": "U8", "shape": [' + b"9," * 99 + b'9], "data_offsets": [0, 1]}}', "contradicts itself"),
    ],
)
def test_a_crafted_header_is_refused(tmp_path: Path, header: bytes, wanted: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(AdapterError, match=wanted):
        read_header(path)


@pytest.mark.parametrize(
    ("start", "wanted"), [(b"", "cut off"), (b"\xff" * 8, "hostile"), (struct.pack("<Q", 99), "cut off")]
)
def test_a_header_is_capped(tmp_path: Path, start: bytes, wanted: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    with pytest.raises(AdapterError, match=wanted):
        read_header(path)


def test_headers_are_judged_as_safetensors_judges_them(write: Callable[..., Path]) -> None:
    """Oracle: safetensors' own reader, over cut, flipped and padded copies of a good file."""
    path = write() / "adapter_model.safetensors"
    good = path.read_bytes()
    source = random.Random(0)
    copies = [good, good + b"\0", *(good[:length] for length in range(0, len(good), 16))]
    for _ in range(400):
        copy = bytearray(good)
        copy[source.randrange(min(len(good), 600))] = source.randrange(32, 127)
        copies.append(bytes(copy))
    looser = []
    for copy in copies:
        path.write_bytes(copy)
        try:
            with safe_open(path, "numpy") as file:
                wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            wanted = None
        try:
            found = {tensor.name: tensor.shape for tensor in read_header(path)[0]}
        except AdapterError:
            continue
        if wanted is None:
            looser.append(copy)
        else:
            assert found == wanted
    assert not looser
    path.write_bytes(good)
    assert len(read_header(path)[0]) == 4
