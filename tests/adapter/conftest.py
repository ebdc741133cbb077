"""A small base and a good adapter of it, for tests of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.adapter.files import save_adapter
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.lora.inject import inject_lora
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from tests.adapter.random_values import randomize


@pytest.fixture
def load_llama(make_base: Callable[..., Path]) -> Callable[..., Any]:
    def load(*, in_4bit: bool = False, **changes: Any) -> Any:
        source = resolve_base(str(make_base("llama", **changes)))
        return load_model(source, quantization=QuantizationConfig() if in_4bit else None)

    return load


@pytest.fixture
def saved(load_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a good adapter of the llama base."""
    model = load_llama()
    inject_lora(model, LoraConfig(r=4))
    return save_adapter(randomize(model), tmp_path / "saved")
