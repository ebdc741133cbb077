"""A model folder around its tensors: config.json, tokenizer and the other small files, and all of it or nothing.

A folder is written under another name beside its own and renamed when it is whole, so that no reader ever finds a part.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.files import sync_folder
from qlora.model_files import INDEX_NAME
from qlora.quant.source import MERGED_NAME, ORIGIN_NAME, BaseSource

NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.gguf", INDEX_NAME, "config.json"),
    *(ORIGIN_NAME, MERGED_NAME, "merge_report.json"),
)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place when the block ends well. Nothing is left where it fails.

    Raises:
        OSError: `out` is neither absent nor empty, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OSError(errno.EEXIST, "something is there already", str(out))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    absent = [parent for parent in temporary.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def copy_rest(source: BaseSource, out: Path, dtype: str, quantization: dict[str, Any] | None = None) -> None:
    """config.json with the dtype and quantization of what was written, tokenizer, and the other small files.

    Args:
        quantization: what config.json says under `quantization_config`; None for weights in `dtype`.
    """
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if quantization is not None:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    skipped = {file for pattern in NOT_COPIED for file in source.folder.glob(pattern)}
    for file in source.folder.iterdir():
        if file.is_file() and file not in skipped and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(file, out / file.name)
