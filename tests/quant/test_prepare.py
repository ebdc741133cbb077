"""A prepared base against the same base quantized while it is read, here and by transformers: equal bytes, equal logits."""

from __future__ import annotations

import errno
import json
import logging
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

import qlora
from qlora.adapter.files import open_adapter
from qlora.adapter.merge_files import run_merge
from qlora.checkpoint.resume import Found, check_identity
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.schema import JobConfig, LoraConfig, QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import AdapterError, BaseModelError, CheckpointError
from qlora.lora.inject import inject_lora
from qlora.model_files import find_weight_files
from qlora.ops import nf4, nf4_format
from qlora.quant import prepare, shards
from qlora.quant.load import load_model
from qlora.quant.prepare import run_prepare
from qlora.quant.source import ORIGIN_NAME, Origin, resolve_base
from qlora.quant.write import write_model
from qlora.version import __version__

MakeBase = Callable[..., Path]
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
# A weight's state may be so much longer here: room for the digits of a number, and blanks up to a multiple of 8 bytes.
LONGER_STATE = 24 + 7


def load(folder: Path, **kwargs: Any) -> Any:
    return load_model(resolve_base(str(folder)), **kwargs)


@pytest.fixture(scope="module")
def prepared(make_base: MakeBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A prepared base of an architecture, with the defaults, made once and shared."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = run_prepare(str(make_base(name)), tmp_path_factory.mktemp("prepared") / name)
        return made[name]

    return make


@pytest.fixture
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse."""
    lines: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Note(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield lines
    logging.getLogger("transformers").removeHandler(handler)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def assert_same_model(ours: Any, want: Any) -> None:
    """Two models of ours: equal names, dtypes and bytes of every parameter and buffer, and equal records."""
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(model, kind)()) for model in (ours, want))
        assert found.keys() == wanted.keys()
        assert [name for name in found if not same_bytes(found[name], wanted[name])] == []
    for name in want.qlora_base.quantized:
        one, other = ours.get_submodule(name), want.get_submodule(name)
        assert (one.spec, one.compute_dtype, one.weight_dtype) == (other.spec, other.compute_dtype, other.weight_dtype)
        assert (one.out_features, one.in_features) == (other.out_features, other.in_features)
    assert ours.qlora_base.quantized == want.qlora_base.quantized
    assert ours.qlora_base.quantization == want.qlora_base.quantization
    assert ours.qlora_base.unexpected == ()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, want(IDS).logits)


def in_transformers(folder: Path, warnings: list[str]) -> Any:
    """What transformers makes of a folder, without a word of complaint."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert warnings == []
    return model


def assert_same_in_transformers(theirs: Any, want: Any) -> None:
    """Two models of transformers: equal packed bytes, scales, states, other tensors and logits."""
    layers = {name: m for name, m in want.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers
    assert layers.keys() == {name for name, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    for name, layer in layers.items():
        found, wanted = theirs.get_submodule(name).weight, layer.weight
        assert same_bytes(found.data, wanted.data), name
        one, other = found.quant_state, wanted.quant_state
        assert same_bytes(one.absmax, other.absmax), name
        assert (one.dtype, one.blocksize, one.quant_type) == (other.dtype, other.blocksize, other.quant_type)
        assert (tuple(one.shape), one.nested) == (tuple(other.shape), other.nested)
        if one.nested:
            assert same_bytes(one.state2.absmax, other.state2.absmax), name
            assert one.offset.item() == other.offset.item()
    parameters = dict(want.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert same_bytes(parameter.data, parameters[name].data), name
    # In training mode, because on some CPUs bitsandbytes repacks its weights when it evaluates.
    with torch.no_grad():
        assert torch.equal(theirs.train()(IDS).logits, want.train()(IDS).logits)


def quantized_by_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    stated: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | changes
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **stated)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


# What loads.


def test_every_architecture(
    make_base: MakeBase,
    prepared: Callable[..., Path],
    architecture: str,
    tmp_path: Path,
    warnings_of_transformers: list[str],
) -> None:
    folder = prepared(architecture)
    theirs = quantized_by_transformers(make_base(architecture))
    assert_same_in_transformers(in_transformers(folder, warnings_of_transformers), theirs)
    want = load(make_base(architecture), quantization=QuantizationConfig())
    assert_same_model(load(folder, quantization=QuantizationConfig()), want)
    # Tensor for tensor the files that transformers writes of the base it has quantized itself.
    theirs.save_pretrained(tmp_path)
    found, wanted = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if ".quant_state." in name:
            assert json.loads(bytes(found[name].tolist())) == json.loads(bytes(value.tolist())), name
            assert len(found[name]) <= len(value) + LONGER_STATE
        else:
            assert same_bytes(found[name], value), name


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [
        ({"quant_type": "fp4"}, "bfloat16"),
        ({"double_quant": False}, "float32"),
        (
            {"quant_type": "fp4", "double_quant": False, "skip_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
            "float16",
        ),
    ],
    ids=str,
)
def test_every_kind(
    make_base: MakeBase, tmp_path: Path, stated: dict[str, Any], dtype: str, warnings_of_transformers: list[str]
) -> None:
    """From a base in float32, so that weights are rounded before they are quantized."""
    quantization = QuantizationConfig(**stated)
    folder = make_base("llama", dtype="float32")
    out = run_prepare(str(folder), tmp_path / "out", dtype=dtype, quantization=quantization)
    assert_same_model(load(out, dtype=dtype), load(folder, dtype=dtype, quantization=quantization))
    skipped = [*quantization.skip_modules, "lm_head"]
    want = quantized_by_transformers(
        folder,
        getattr(torch, dtype),
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        llm_int8_skip_modules=["model." + name if name.startswith("layers") else name for name in skipped],
    )
    assert_same_in_transformers(in_transformers(out, warnings_of_transformers), want)


@pytest.mark.parametrize("double_quant", [True, False])
def test_other_block_sizes(
    make_base: MakeBase, tmp_path: Path, double_quant: bool, warnings_of_transformers: list[str]
) -> None:
    """transformers quantizes in blocks of 64 alone, but reads others."""
    quantization = QuantizationConfig(block_size=256, double_quant=double_quant)
    out = run_prepare(str(make_base("qwen2")), tmp_path / "out", quantization=quantization)
    want = load(make_base("qwen2"), quantization=quantization)
    assert_same_model(load(out), want)
    theirs = in_transformers(out, warnings_of_transformers)
    for name in want.qlora_base.quantized:
        state, weight = theirs.get_submodule(name).weight.quant_state, theirs.get_submodule(name).weight.data
        assert state.blocksize == 256
        # Not by its CPU kernel, which begins a block with every row.
        packed, statistics, spec, shape = nf4_format.from_linear4bit(theirs.get_submodule(name), name)
        assert torch.equal(
            nf4.dequantize(packed, statistics, spec, shape, torch.bfloat16), want.get_submodule(name).dequantize()
        )
        assert packed.data_ptr() == weight.data_ptr()


def test_shards_load_as_one_file_does(
    prepared: Callable[..., Path],
    make_base: MakeBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_transformers: list[str],
) -> None:
    """Cut inside of weights' entries as well; from a base that is in shards itself."""
    monkeypatch.setattr(prepare, "write_model", partial(write_model, shard_bytes=9_000))
    out = run_prepare(str(make_base("llama", max_shard_size="60KB")), tmp_path / "out")
    assert len(find_weight_files(out)) > 5
    assert not (out / "model.safetensors").exists()
    assert_same_model(load(out), load(prepared("llama")))
    want = AutoModelForCausalLM.from_pretrained(prepared("llama"))
    assert_same_in_transformers(in_transformers(out, warnings_of_transformers), want)


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_names_without_the_prefix_of_the_base_model(
    make_base: MakeBase,
    prepared: Callable[..., Path],
    tmp_path: Path,
    name: str,
    prefix: str,
    warnings_of_transformers: list[str],
) -> None:
    """As in the files of GPT-2 on the hub."""
    folder = Path(shutil.copytree(make_base(name), tmp_path / "base"))
    tensors = {key.removeprefix(prefix): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    out = run_prepare(str(folder), tmp_path / "out")
    assert not any(key.startswith(prefix) for key in shards.read_entries(out))
    assert_same_model(load(out), load(prepared(name)))
    want = AutoModelForCausalLM.from_pretrained(prepared(name))
    assert_same_in_transformers(in_transformers(out, warnings_of_transformers), want)


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_that_the_files_hold_too(make_base: MakeBase, tmp_path: Path, differ: bool) -> None:
    folder = Path(shutil.copytree(make_base("qwen2"), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][0, 0] += float(differ)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours = load(run_prepare(str(folder), tmp_path / "out"))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (not differ)
    assert_same_model(ours, load(folder, quantization=QuantizationConfig()))


# What a rank reads.


class Share(Sharding):
    """One of several ranks in one process. Ranks that agree bring the same to an exchange."""

    def exchange(self, own: Tensor) -> Tensor:
        return own.repeat(self.world_size)

    def keep(self, parameter: nn.Parameter) -> None:
        start, stop = self.run(parameter.numel())
        parameter.data = parameter.data.reshape(-1)[start:stop].clone()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_ranks_read_their_shares_and_together_the_whole(
    prepared: Callable[..., Path], name: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = dict(load(prepared(name)).named_parameters())
    source = resolve_base(str(prepared(name)))
    entries = shards.read_entries(prepared(name))
    read = shards.TensorEntry.read
    num_bytes: dict[str, int] = {}

    def count(self: shards.TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
        out = read(self, start, stop)
        num_bytes[self.name] = num_bytes.get(self.name, 0) + out.numel() * out.element_size()
        return out

    monkeypatch.setattr(shards.TensorEntry, "read", count)
    runs: dict[str, list[Tensor]] = {}
    total = dict.fromkeys(entries, 0)
    for rank in range(world_size):
        num_bytes.clear()
        model = load_model(source, sharding=Share(rank, world_size))
        for parameter_name, parameter in model.named_parameters():
            runs.setdefault(parameter_name, []).append(parameter.data)
        for entry_name, entry in entries.items():
            total[entry_name] += num_bytes.get(entry_name, 0)
            if not is_small(entry_name) and "absmax" not in entry_name:
                share = -(-entry.num_elements // world_size) * entry.dtype.itemsize
                assert num_bytes.get(entry_name, 0) <= share, entry_name
        for path in model.qlora_base.quantized:
            scales = sum(num_bytes.get(f"{path}.weight{suffix}", 0) for suffix in (".absmax", ".nested_absmax"))
            assert scales <= -(-model_statistics(model, path) // world_size), path
    assert runs.keys() == want.keys()
    for parameter_name, parts in runs.items():
        assert same_bytes(torch.cat(parts), want[parameter_name].data.reshape(-1)), parameter_name
    # Nothing is read by two ranks but the small ones, which each of them reads once.
    assert total == {n: entry.num_bytes * (world_size if is_small(n) else 1) for n, entry in entries.items()}


def model_statistics(model: Any, path: str) -> int:
    layer = model.get_submodule(path)
    return layer.spec.statistics_bytes(layer.out_features * layer.in_features)


def is_small(name: str) -> bool:
    """The tables and the state, which every rank reads to check them."""
    return name.endswith("quant_map") or ".quant_state." in name


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quarter_of_the_bytes(
    make_base: MakeBase, tmp_path: Path, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a byte a weight and its scales, besides a kilobyte of tables a layer; a load reads nothing twice."""
    folder = make_base("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_key_value_heads=4)
    out = run_prepare(str(folder), tmp_path / "out", quantization=QuantizationConfig(double_quant=double_quant))
    before, after = shards.read_entries(folder), shards.read_entries(out)
    quantized = [name for name in before if "_proj" in name]
    assert len(quantized) == 7
    sizes = []
    for name in quantized:
        n = before[name].num_elements
        own = {key.removeprefix(name): entry.num_bytes for key, entry in after.items() if key.startswith(name)}
        blocks = n // 64
        wanted = {"": n // 2, ".quant_map": 64, ".absmax": blocks if double_quant else 4 * blocks}
        if double_quant:
            wanted |= {".nested_absmax": 4 * -(-blocks // 256), ".nested_quant_map": 1024}
        state = own.pop(".quant_state.bitsandbytes__nf4")
        assert own == wanted
        assert state < 256
        sizes.append(sum(own.values()) + state)
    # 4.127 bits or 4.5 of 16, and the tables.
    tables = 7 * (1024 + 64 + 256)
    sixteen_bits = sum(before[name].num_bytes for name in quantized)
    bits = 4 + 8 / 64 + 32 / (64 * 256) if double_quant else 4 + 32 / 64
    assert sum(sizes) <= sixteen_bits * bits / 16 + tables
    rest = {name: entry.num_bytes for name, entry in before.items() if name not in quantized}
    assert {name: after[name].num_bytes for name in rest} == rest
    assert (out / "model.safetensors").stat().st_size < sum(sizes) + sum(rest.values()) + 10_000
    # What loading reads: all of it once, and a state once more than the rest.
    num_bytes = 0
    read = shards.TensorEntry.read

    def count(self: shards.TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
        nonlocal num_bytes
        value = read(self, start, stop)
        num_bytes += value.numel() * value.element_size()
        return value

    monkeypatch.setattr(shards.TensorEntry, "read", count)
    load(out)
    assert num_bytes == sum(entry.num_bytes for entry in after.values())


def test_tensors_begin_at_multiples_of_their_size(prepared: Callable[..., Path], architecture: str) -> None:
    """Some readers map the file and need it; the format leaves no room between tensors."""
    for entry in shards.read_entries(prepared(architecture)).values():
        assert entry.offset % entry.dtype.itemsize == 0, entry.name


# How it is written.


def test_what_is_in_memory(make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight that becomes 4 bits one piece at a time; of the others one tensor."""
    folder = make_base("llama")
    want = load(folder, quantization=QuantizationConfig())
    piece = 1024
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", piece)
    alive: list[weakref.ref[Tensor]] = []
    read = shards.TensorEntry.read

    def read_and_note(self: shards.TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
        if "proj" in self.name:
            assert stop is not None
            assert stop - start <= piece
        assert sum(ref() is not None for ref in alive) <= 1, "more than the one before is still there"
        out = read(self, start, stop)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(shards.TensorEntry, "read", read_and_note)
    out = run_prepare(str(folder), tmp_path / "out")
    monkeypatch.undo()
    assert alive
    assert_same_model(load(out), want)


def test_config_and_small_files(random_base: Path, tmp_path: Path) -> None:
    out = run_prepare(str(random_base), tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    names = {path.name for path in random_base.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {ORIGIN_NAME}
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (random_base / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(random_base).chat_template
    config = json.loads((out / "config.json").read_text())
    stated = config.pop("quantization_config")
    assert config == json.loads((random_base / "config.json").read_text()) | {"dtype": "bfloat16"}
    # The same words that transformers writes, and the names of what stays, which it leaves to be found out.
    quantized_by_transformers(random_base).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert stated == theirs | {"llm_int8_skip_modules": ["lm_head"]}


def test_an_old_key_for_the_dtype_does_not_stay(make_base: MakeBase, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_base("llama", dtype="float32"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    out = run_prepare(str(folder), tmp_path / "out")
    written = json.loads((out / "config.json").read_text())
    assert "torch_dtype" not in written
    assert written["dtype"] == "bfloat16"


# What cannot be prepared, and what is left behind then.


@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_disk_that_fills_up(make_base: MakeBase, tmp_path: Path, empty_folder: bool) -> None:
    """The same as a real one: writing fails in the middle of a file."""
    out = tmp_path / "new" / "out"
    if empty_folder:
        out.mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(BaseModelError, match=r"out: the prepared base cannot be written \(File too large\)") as error:
            run_prepare(str(make_base("llama")), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EFBIG
    assert [*tmp_path.rglob("*")] == ([tmp_path / "new", out] if empty_folder else [])


def test_a_disk_that_is_too_small_is_known_before(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 70_000}))
    monkeypatch.setattr(nf4, "quantize_blocks", lambda *_: pytest.fail("a weight was quantized"))
    with pytest.raises(BaseModelError, match="does not fit onto the disk") as error:
        run_prepare(str(make_base("llama")), tmp_path / "out")
    assert error.value.found == "0.0 GiB free"
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_ends_early(make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base, while it is read."""
    folder = Path(shutil.copytree(make_base("llama"), tmp_path / "base"))
    cut = prepare.write_model

    def cut_short(*args: Any) -> None:
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(100_000)
        cut(*args)

    monkeypatch.setattr(prepare, "write_model", cut_short)
    with pytest.raises(BaseModelError, match="the file ends inside"):
        run_prepare(str(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_nothing_is_written_over(make_base: MakeBase, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(BaseModelError, match="something is there already"):
        run_prepare(str(make_base("llama")), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_is_in_4_bits_already(make_base: MakeBase, prepared: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="in 4 bits already, prepared from") as error:
        run_prepare(str(prepared("llama")), tmp_path / "out")
    assert str(make_base("llama")) in (error.value.next_step or "")
    quantized_by_transformers(make_base("llama")).save_pretrained(tmp_path / "theirs")
    with pytest.raises(BaseModelError, match=r"in 4 bits already\n"):
        run_prepare(str(tmp_path / "theirs"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_quantize(make_base: MakeBase, tmp_path: Path) -> None:
    skipped = QuantizationConfig(skip_modules=[f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")])
    with pytest.raises(BaseModelError, match="there is nothing to quantize") as error:
        run_prepare(str(make_base("llama")), tmp_path / "out", quantization=skipped)
    assert error.value.found == "15 linear layers, all of them left as they are"


def test_layers_that_transformers_would_take_for_unquantized(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because it keeps them in fp32. With --skip-module the base can be prepared."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["o_proj"])
    with pytest.raises(BaseModelError, match="transformers would take these layers for unquantized") as error:
        run_prepare(str(make_base("llama")), tmp_path / "out")
    assert error.value.found == "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj"
    skipped = QuantizationConfig(skip_modules=["o_proj"])
    out = run_prepare(str(make_base("llama")), tmp_path / "out", dtype="float16", quantization=skipped)
    assert shards.read_entries(out)["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float32
    ours = load(out, dtype="float16")
    assert_same_model_without_logits(ours, load(make_base("llama"), dtype="float16", quantization=skipped))
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32


def assert_same_model_without_logits(ours: Any, want: Any) -> None:
    wanted = dict(want.named_parameters())
    assert {name for name, p in ours.named_parameters() if not same_bytes(p.data, wanted[name].data)} == set()


# Where it comes from.


@pytest.fixture
def own(prepared: Callable[..., Path], tmp_path: Path) -> Path:
    """A prepared llama of the test's own."""
    return Path(shutil.copytree(prepared("llama"), tmp_path / "own"))


def test_the_origin_is_recorded(make_base: MakeBase, prepared: Callable[..., Path], own: Path) -> None:
    origin, source = resolve_base(str(make_base("llama"))), resolve_base(str(own))
    assert source.fingerprint == resolve_base(str(prepared("llama"))).fingerprint != origin.fingerprint
    assert origin.origin is None
    assert source.origin == Origin(
        name=str(make_base("llama")),
        revision=None,
        fingerprint=str(origin.fingerprint),
        dtype="bfloat16",
        quantization=QuantizationConfig(),
        prepared=str(source.fingerprint),
        qlora=__version__,
    )
    assert source.record() == {
        "name": str(own),
        "revision": None,
        "fingerprint": source.fingerprint,
        "origin": {
            "name": str(make_base("llama")),
            "revision": None,
            "fingerprint": origin.fingerprint,
            "dtype": "bfloat16",
            "quantization": QuantizationConfig().model_dump(),
        },
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "EOF"),
        (b"\xff{", "expected"),
        (b"[]", "object"),
        (b"[" * 10_000, "recursion"),
        ({"fingerprint": None}, "fingerprint: "),
        ({"fingerprint": "f" * 63}, "fingerprint: "),
        ({"name": 3}, "name: "),
        ({"quantization": {"quant_type": "nf5"}}, "quantization.quant_type: "),
        ({"prepared": 7}, "prepared: "),
    ],
    ids=str,
)
def test_a_damaged_record(own: Path, content: bytes | dict[str, Any], said: str) -> None:
    path = own / ORIGIN_NAME
    changed = content if isinstance(content, bytes) else json.dumps(json.loads(path.read_bytes()) | content).encode()
    path.write_bytes(changed)
    with pytest.raises(BaseModelError, match="damaged record of what the base was prepared from") as error:
        resolve_base(str(own))
    assert error.value.place == str(path)
    assert said in str(error.value.found)
    path.unlink()
    assert resolve_base(str(own)).origin is None


@pytest.mark.parametrize("change", ["weights", "config", "copied"])
def test_a_record_beside_other_weights(make_base: MakeBase, own: Path, change: str) -> None:
    """Copied to where it does not belong, or left where something else was put: it must not vouch for that."""
    if change == "copied":
        record = (own / ORIGIN_NAME).read_bytes()
        shutil.rmtree(own)
        shutil.copytree(make_base("llama"), own)
        (own / ORIGIN_NAME).write_bytes(record)
    elif change == "config":
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    else:
        tensors = load_file(own / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"belongs to other weights, or config\.json was changed") as error:
        resolve_base(str(own))
    assert str(make_base("llama")) in str(error.value.found)
    assert f"delete {ORIGIN_NAME}" in (error.value.next_step or "")


def test_without_the_record_the_block_size_is_that_of_the_files(make_base: MakeBase, tmp_path: Path) -> None:
    quantization = QuantizationConfig(block_size=128, quant_type="fp4")
    out = run_prepare(str(make_base("llama")), tmp_path / "out", quantization=quantization)
    (out / ORIGIN_NAME).unlink()
    assert load(out).qlora_base.quantization == quantization


# Adapters and checkpoints of a prepared base and of its origin are those of one base.


@pytest.fixture
def two_bases(random_base: Path, tmp_path: Path) -> dict[str, Path]:
    """A base, and what was prepared of it with other settings than the defaults."""
    quantization = QuantizationConfig(quant_type="fp4", block_size=128, skip_modules=["down_proj"])
    return {
        "origin": random_base,
        "prepared": run_prepare(str(random_base), tmp_path / "prepared", quantization=quantization),
    }


def make_adapter(base: Path, folder: Path, dtype: str = "bfloat16") -> Path:
    model = load(base, dtype=dtype, quantization=QuantizationConfig())
    inject_lora(model, LoraConfig(r=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return qlora.save_adapter(model, folder)


@pytest.mark.parametrize(
    ("trained_on", "loaded_on"), [("origin", "prepared"), ("prepared", "origin"), ("prepared", "prepared")]
)
def test_an_adapter_goes_both_ways(two_bases: dict[str, Path], tmp_path: Path, trained_on: str, loaded_on: str) -> None:
    adapter = make_adapter(two_bases[trained_on], tmp_path / "adapter")
    model, _ = qlora.load_base(str(two_bases[loaded_on]))
    assert len(qlora.load_adapter(model, adapter).targeted) == 14


def test_an_adapter_of_another_base_is_refused_as_before(
    two_bases: dict[str, Path], prepared: Callable[..., Path], make_base: MakeBase, tmp_path: Path
) -> None:
    adapter = make_adapter(two_bases["prepared"], tmp_path / "adapter")
    for other in (prepared("llama"), make_base("llama")):
        with pytest.raises(AdapterError, match="the adapter was trained on another base") as error:
            qlora.load_adapter(load(other), adapter)
        assert str(resolve_base(str(other)).fingerprint)[:12] in str(error.value.wanted)
        with pytest.raises(AdapterError, match="the adapter was trained on another base"):
            run_merge(adapter, tmp_path / "merged", base=str(other))


def test_merging_an_adapter_of_a_prepared_base(two_bases: dict[str, Path], tmp_path: Path) -> None:
    """Onto what was trained, the files of either base give the same; onto the original, those of the origin alone."""
    adapter = make_adapter(two_bases["prepared"], tmp_path / "adapter", dtype="float32")
    assert open_adapter(adapter).config.base == str(two_bases["prepared"])
    merged = run_merge(adapter, tmp_path / "merged")
    again = run_merge(adapter, tmp_path / "again", base=str(two_bases["origin"]))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (merged, again))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(found[name], wanted[name])] == []
    assert not (merged / ORIGIN_NAME).exists()
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    with pytest.raises(AdapterError, match="there are no original weights") as error:
        run_merge(adapter, tmp_path / "third", onto="original")
    assert f"give {two_bases['origin']}, which it was prepared from, with --base" in (error.value.next_step or "")
    assert run_merge(adapter, tmp_path / "third", onto="original", base=str(two_bases["origin"])).is_dir()


def identity_of(base: Path, **quantization: Any) -> Identity:
    config = JobConfig.model_validate({"model": {"base": str(base), "quantization": quantization}})
    return Identity(resolve_base(str(base)).record(), "data", "plan", config.model_dump(mode="json"), 1, "ddp", {})


def test_a_checkpoint_goes_on_on_the_other_where_both_are_quantized_alike(
    two_bases: dict[str, Path], tmp_path: Path
) -> None:
    stated = {"quant_type": "fp4", "block_size": 128, "skip_modules": ["down_proj"]}
    origin, ready = identity_of(two_bases["origin"], **stated), identity_of(two_bases["prepared"], **stated)
    asks_otherwise = identity_of(two_bases["prepared"])  # and is not asked
    for old, new in ((origin, ready), (ready, origin), (ready, ready), (asks_otherwise, origin), (ready, asks_otherwise)):
        assert check_identity(Found(tmp_path, TrainerState(0, 0, 0, 0), old), new, force=False) == []
    # The same keys in both jobs, and other weights.
    origin = identity_of(two_bases["origin"])
    for old, new in ((origin, asks_otherwise), (asks_otherwise, origin), (origin, ready)):
        with pytest.raises(CheckpointError, match=r"quantized base: .*'[nf]f?p?4'.* then, .* now"):
            check_identity(Found(tmp_path, TrainerState(0, 0, 0, 0), old), new, force=False)


def test_a_checkpoint_of_another_base_is_refused_as_before(
    two_bases: dict[str, Path], prepared: Callable[..., Path], make_base: MakeBase, tmp_path: Path
) -> None:
    found = Found(tmp_path, TrainerState(0, 0, 0, 0), identity_of(two_bases["prepared"]))
    for other in (prepared("llama"), make_base("llama")):
        with pytest.raises(CheckpointError, match=r"base: .* and their weights differ\n.*model\.base: "):
            check_identity(found, identity_of(other), force=False)
    # A plain base under another name is another job, as it was.
    plain = identity_of(two_bases["origin"])
    moved = replace(plain, config=identity_of(make_base("llama")).config)
    with pytest.raises(CheckpointError, match=r"model\.base: "):
        check_identity(Found(tmp_path, TrainerState(0, 0, 0, 0), plain), moved, force=False)


def test_merging_into_layers_that_are_transposed_in_files(
    make_base: MakeBase, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's are (in, out) unquantized and (out, in) in 4 bits: the same model comes out of either base's files."""
    adapter = make_adapter(prepared("gpt2"), tmp_path / "adapter", dtype="float32")
    merged = run_merge(adapter, tmp_path / "merged")
    again = run_merge(adapter, tmp_path / "again", base=str(make_base("gpt2")))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (merged, again))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bytes(found[name], wanted[name])] == []
