"""Reading safetensors by hand, against the safetensors library, on whole files and on damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora import model_files
from qlora.errors import BaseModelError
from qlora.model_files import INDEX_NAME, find_weight_files
from qlora.quant import shards

DTYPE_NAMES = sorted(shards.DTYPES)


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Any bytes at all, NaN and infinities among them (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def all_types(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file with one tensor of each type, an empty one, a scalar, and one of four dimensions."""
    tensors = {name: random_tensor(dtype, 5, 7, seed=i) for i, (name, dtype) in enumerate(shards.DTYPES.items())}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "four": random_tensor(torch.float16, 2, 3, 1, 4)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "note": "hello"})
    return tmp_path / "model.safetensors", tensors


def test_types_are_as_wide_as_headers_are_checked_for() -> None:
    assert {name: dtype.itemsize for name, dtype in shards.DTYPES.items()} == model_files.ITEMSIZES


def test_every_type_reads_as_the_library_reads_it(all_types: tuple[Path, dict[str, torch.Tensor]]) -> None:
    file, tensors = all_types
    want = load_file(file)
    entries, metadata = shards.read_header_and_metadata(file)
    assert metadata == {"format": "pt", "note": "hello"}
    assert entries.keys() == want.keys() == tensors.keys()
    for name, entry in entries.items():
        found = entry.read_whole()
        assert found.dtype == want[name].dtype == entry.dtype
        assert found.shape == want[name].shape == entry.shape
        assert torch.equal(as_bytes(found), as_bytes(want[name]))
        assert entry.num_bytes == found.numel() * found.element_size()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(DTYPE_NAMES), ends=st.tuples(st.integers(0, 35), st.integers(0, 35)))
def test_any_run_of_elements(all_types: tuple[Path, dict[str, torch.Tensor]], name: str, ends: tuple[int, int]) -> None:
    file, tensors = all_types
    start, stop = sorted(ends)
    found = shards.read_header(file)[name].read(start, stop)
    assert torch.equal(as_bytes(found), as_bytes(tensors[name].reshape(-1)[start:stop]))


def test_only_the_bytes_asked_for_are_read_and_nothing_is_mapped(tmp_path: Path) -> None:
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"w": tensor}, tmp_path / "model.safetensors")

    def bytes_read() -> int:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    overhead = -bytes_read() + bytes_read()  # of looking at the counter itself
    before = bytes_read()
    entry = shards.read_header(tmp_path / "model.safetensors")["w"]
    piece = entry.read(1000, 3000)
    read = bytes_read() - before - overhead
    assert torch.equal(piece, tensor[1000:3000])
    # The header with its eight bytes of length, the piece, and no page beside them.
    assert read <= 2000 * 4 + (entry.offset + 8192)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4, 5), "b": torch.arange(7)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(BaseModelError, match=r"model\.safetensors"):
            shards.read_header(file)
    file.write_bytes(whole)
    shards.read_header(file)


def test_a_file_that_is_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64, 64)}, file)
    entry = shards.read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="ends inside a"):
        entry.read_whole()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_byte_changed_in_the_header_reads_or_is_refused(tmp_path: Path, place: int, value: int) -> None:
    """Never another error, and what reads lies within the file."""
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.randn(4, 5), "b.weight": torch.arange(7)}, file, {"format": "pt"})
    content = bytearray(file.read_bytes())
    content[place % (len(content) - 80 - 56)] = value  # header and its length; the data are 80 and 56 bytes
    file.write_bytes(content)
    refusal = None
    try:
        for entry in shards.read_header(file).values():
            assert entry.read_whole().shape == entry.shape
    except BaseModelError as error:
        refusal = error
    assert refusal is None or str(file) in str(refusal)


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not JSON": b"{",
    "not text": b"\xff\xfe",
    "a list": [],
    "a number": 3,
    "nested without end": b"[" * 100_000,
    "a key twice": b'{"a": %s, "a": %s}' % (json.dumps(A).encode(), json.dumps(A).encode()),
    "a field twice": b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}',
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": A | {"dtype": "F3"}},
    "dtype is a list": {"a": A | {"dtype": ["F32"]}},
    "entry is a number": {"a": 3},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "one offset": {"a": A | {"data_offsets": [0]}},
    "offsets are words": {"a": A | {"data_offsets": ["0", "8"]}},
    "offsets are fractions": {"a": A | {"data_offsets": [0.0, 8.0]}},
    "offsets before the data": {"a": A | {"data_offsets": [-8, 0]}},
    "offsets in the wrong order": {"a": A | {"data_offsets": [8, 0]}},
    "offsets beyond the file": {"a": A | {"data_offsets": [8, 16]}},
    "too few bytes": {"a": A | {"data_offsets": [0, 4]}},
    "negative shape": {"a": A | {"shape": [-2, -1]}},
    "shape of fractions": {"a": A | {"shape": [2.0]}},
    "shape of truths": {"a": A | {"shape": [True, 2]}},
    "shape is a number": {"a": A | {"shape": 2}},
    "overlap": {"a": A, "b": A},
    "metadata is a list": {"__metadata__": ["x"], "a": A},
    "metadata is no text": {"__metadata__": {"x": 3}, "a": A},
}


@pytest.mark.parametrize("damage", BAD_HEADERS)
def test_a_damaged_header_is_refused_with_the_files_name(tmp_path: Path, damage: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", BAD_HEADERS[damage], bytes(8))
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        shards.read_header(file)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"a": A | {"dtype": "F4"}}, bytes(8))
    with pytest.raises(BaseModelError, match="a is of a dtype that is not read here") as error:
        shards.read_header(file)
    assert error.value.found == "F4"


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"x" * 100)
    with pytest.raises(BaseModelError, match="cut short"):
        shards.read_header(file)
    # The cap holds also where the file is large enough.
    monkeypatch.setattr(model_files, "MAX_HEADER_BYTES", 64)
    write_raw(file, json.dumps({"a": A}).encode() + b" " * 100, bytes(8))
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        shards.read_header(file)


# Folders.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(3), "b": torch.randn(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.randn(5)}, tmp_path / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for name, number in names.items()}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def change_index(folder: Path, change: Any) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_are_read_as_one(sharded: Path) -> None:
    entries = shards.read_entries(sharded)
    assert sorted(entries) == ["a", "b", "c"]
    assert entries["c"].file.name == "model-00002-of-00002.safetensors"


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="files that are not there") as error:
        shards.read_entries(sharded)
    assert "model-00002-of-00002.safetensors" in str(error.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_out_of_its_folder(sharded: Path, name: str) -> None:
    change_index(sharded, lambda table: table.update(c=name))
    with pytest.raises(BaseModelError, match="files that are not there"):
        find_weight_files(sharded)


def test_an_index_that_names_a_missing_tensor(sharded: Path) -> None:
    change_index(sharded, lambda table: table.update(lost="model-00001-of-00002.safetensors"))
    with pytest.raises(BaseModelError, match="1 tensors that no file holds") as error:
        shards.read_entries(sharded)
    assert error.value.found == "lost"


def test_a_tensor_in_two_files(sharded: Path) -> None:
    save_file({"a": torch.randn(3), "c": torch.randn(5)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(BaseModelError, match="a is in"):
        shards.read_entries(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}', "\\xff"]
)
def test_a_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX_NAME).write_bytes(b"\xff" if text == "\\xff" else text.encode())
    with pytest.raises(BaseModelError, match=r"index\.json"):
        shards.read_entries(sharded)


# The fingerprint.


def fingerprint(folder: Path) -> str:
    return shards.fingerprint(folder, find_weight_files(folder))


def test_the_fingerprint_depends_on_content_alone(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(sharded, copy)
    config = {"transformers_version": "9.9", "model_type": "llama", "_name_or_path": "x", "dtype": "float16"}
    (copy / "config.json").write_text(json.dumps(config))
    assert fingerprint(copy) == fingerprint(sharded)


def test_the_fingerprint_sees_the_config_a_name_a_shape_and_a_value(sharded: Path) -> None:
    seen = {fingerprint(sharded)}
    (sharded / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    seen.add(fingerprint(sharded))
    for tensors in ({"d": torch.ones(5)}, {"d": torch.ones(1, 5)}, {"e": torch.ones(5)}, {"e": torch.ones(5).double()}):
        save_file(tensors, sharded / "model-00002-of-00002.safetensors")
        seen.add(fingerprint(sharded))
    changed = torch.ones(5)
    changed[4] += 1e-6
    save_file({"e": changed}, sharded / "model-00002-of-00002.safetensors")
    seen.add(fingerprint(sharded))
    assert len(seen) == 7


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_config(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json: not JSON"):
        fingerprint(sharded)
