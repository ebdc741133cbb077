"""Shapes against the models themselves: what the headers say, what the config alone says, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import BaseModelError
from qlora.plan.shapes import LLAMA_LIKE, read_shapes, shapes_from_config

TINY = Path(__file__).parents[2] / "qlora/assets/tiny"


def config_alone(folder: Path, target: Path) -> Path:
    shutil.copy(folder / "config.json", target / "config.json")
    return target


def test_headers_name_every_tensor_of_every_architecture(make_base: Callable[..., Path], architecture: str) -> None:
    """safetensors' own reader is the judge of shapes, and the sum over kinds must miss none."""
    from safetensors import safe_open

    folder = make_base(architecture)
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    base = read_shapes(folder)
    assert {t.path: t.shape for t in base.tensors} == {n: s for n, s in stored.items() if not (base.tied and "lm_head" in n)}
    assert base.num_layers == 2
    assert base.hidden_size == 64


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_the_config_alone_says_what_the_headers_say(
    make_base: Callable[..., Path], tmp_path: Path, name: str, changes: dict[str, bool]
) -> None:
    folder = make_base(name, **changes)
    exact, computed = read_shapes(folder), read_shapes(config_alone(folder, tmp_path))
    assert computed.tensors == exact.tensors
    assert computed.tied == exact.tied
    assert computed.source != exact.source


def test_the_order_is_that_of_a_forward_pass() -> None:
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 11, "tie_word_embeddings": False}
    paths = [t.path for t in shapes_from_config(config).tensors]
    assert paths[0] == "model.embed_tokens.weight"
    assert paths[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(path.split(".")[2]) for path in paths[1:-2]]
    assert layers == sorted(layers)


def test_files_of_several_shards(make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_base("llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert read_shapes(folder).tensors == read_shapes(make_base("llama")).tensors
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    next(iter(sorted(copy.glob("*.safetensors")))).unlink()
    with pytest.raises(BaseModelError, match="names files that are not there"):
        read_shapes(copy)


def test_an_unknown_config_alone_is_refused_with_a_cure(make_base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="not known from its config alone") as caught:
        read_shapes(config_alone(make_base("gpt2"), tmp_path))
    assert "safetensors" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks what shapes follow from"),
        ({"num_hidden_layers": "six"}, "lacks what shapes follow from"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "comes quantized"),
    ],
)
def test_a_config_with_a_gap_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((TINY / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=message):
        read_shapes(tmp_path)


@pytest.mark.parametrize(
    "damage", [b"", b"\x10", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"\x09" + b"\0" * 7 + b'{"a": {} }']
)
def test_a_damaged_header_is_an_error(tmp_path: Path, damage: bytes) -> None:
    (config_alone(TINY, tmp_path) / "model.safetensors").write_bytes(damage)
    with pytest.raises(BaseModelError, match="damaged safetensors header"):
        read_shapes(tmp_path)


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        read_shapes(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match="not JSON"):
        read_shapes(tmp_path)
