"""Tokenizes a data set once and keeps the result in a cache folder that every rank maps into memory.

No process group and no collective takes part: ranks meet at a file lock, the first one works, the others wait for the
lock and then find the finished folder. So this may run before the ranks know each other, and no collective can time out
while one of them tokenizes. A folder is written under another name and renamed when it is complete: whatever ends the
work early leaves no half cache, and the next one who holds the lock sweeps what was left.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qlora.config.schema import DataConfig
from qlora.data.chat import ChatRenderer, RenderedRow
from qlora.data.formats import read_documents
from qlora.data.records import digest_of_sources, read_records
from qlora.data.token_rows import TokenRow, cut_row, encode_rows
from qlora.data.token_store import TokenizedDataset, TokenWriter, open_store
from qlora.errors import DataError
from qlora.files import sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# To be raised whenever the same data and settings would give other tokens or targets than before.
_PIPELINE_VERSION = 1
_ROWS_AT_ONCE = 256
_SHOWN_CHARACTERS = 2000


def prepare(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> TokenizedDataset:
    """Tokenize sources, or find them tokenized. Rank-local: any number of ranks may call it at once.

    Args:
        paths: files, folders or hub ids, such as `config.train`.
        tokenizer: with its chat template.
        config: format, train_on, max_length, over_long, chat_template and cache_dir are used.
        on_progress: called with the number of records done, about every 256; whatever it raises ends the work and
            leaves no half cache.

    Raises:
        DataError: sources that cannot be read or rendered, or in which nothing is to be learned.
    """
    if not paths:
        raise DataError("no data is named", place="data", found="an empty list", wanted="files, folders or hub ids")
    renderer = ChatRenderer(tokenizer, config.train_on, config.chat_template)
    fingerprint = fingerprint_of(paths, tokenizer, config, renderer.template)
    cache = cache_folder(config)
    folder = cache / fingerprint
    dataset = open_store(folder, fingerprint)
    if dataset is not None:
        return dataset
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{fingerprint}.lock")
        lock.acquire()
    try:
        dataset = open_store(folder, fingerprint)
        if dataset is not None:
            return dataset
        _sweep(cache, fingerprint)
        return _work(paths, tokenizer, config, renderer, fingerprint, folder, on_progress)
    finally:
        lock.release()


def cache_folder(config: DataConfig) -> Path:
    """The folder of all token caches: data.cache_dir, else ~/.cache/qlora/tokens."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else Path.home() / ".cache" / "qlora" / "tokens"


def fingerprint_of(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig, chat_template: str | None
) -> str:
    """Hash (sha256, hexadecimal) everything that decides the token rows. Rank-local; reads every source once.

    Names of files do not count, nor does anything about batches or ranks. A template that prints the date keeps the day
    on which the rows were tokenized.
    """
    parts: dict[str, Any] = {
        "pipeline": _PIPELINE_VERSION,
        "sources": digest_of_sources(paths),
        "format": config.format,
        "train_on": config.train_on,
        "max_length": config.max_length,
        "over_long": config.over_long,
        "chat_template": chat_template,
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.is_fast:
        return repr(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Each call of a tokenizer sets these anew: they are what the last call was, and nothing that rows depend on.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()


def _work(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    renderer: ChatRenderer,
    fingerprint: str,
    folder: Path,
    on_progress: Callable[[int], None] | None,
) -> TokenizedDataset:
    temporary = folder.with_name(f"{fingerprint}.unfinished-{socket.gethostname()}-{os.getpid()}")
    try:
        with _cache_errors(temporary):
            temporary.mkdir()
            writer = TokenWriter(temporary)
        with writer:
            counts = _write_rows(paths, tokenizer, config, renderer, writer, on_progress)
            with _cache_errors(temporary):
                writer.finish(fingerprint, counts)
        with _cache_errors(folder):
            return _publish(temporary, folder, fingerprint)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path, fingerprint: str) -> TokenizedDataset:
    """Give a finished folder its name. Some network file systems grant a lock twice: then what is there first stays."""
    if open_store(folder, fingerprint) is None:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    dataset = open_store(folder, fingerprint)
    if dataset is None:
        raise RuntimeError(f"{folder} was written a moment ago and cannot be opened")
    return dataset


def _write_rows(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    renderer: ChatRenderer,
    writer: TokenWriter,
    on_progress: Callable[[int], None] | None,
) -> dict[str, int]:
    """Write every row that has something to learn; return the counts that end up in the statistics."""
    counts: Counter[str] = Counter(num_records=0)
    shown: RenderedRow | None = None
    num_written = 0
    for batch in _batches(paths, config, renderer):
        shown = shown or batch[0]
        counts["num_records"] += len(batch)
        for rendered, row in zip(batch, encode_rows(tokenizer, batch), strict=True):
            counts["num_unstable"] += rendered.is_unstable
            if row is None:
                counts["num_without_target"] += 1
                continue
            for part in _fitted(row, config, counts):
                if not part.has_target:
                    counts["num_without_target"] += 1
                    continue
                with _cache_errors(writer.folder):
                    writer.add(part.input_ids, part.is_target)
                num_written += 1
        if on_progress is not None:
            on_progress(counts["num_records"])
    if num_written == 0 and shown is not None:
        raise _nothing_to_learn(shown, config, counts)
    return dict(counts)


def _batches(paths: Sequence[str], config: DataConfig, renderer: ChatRenderer) -> Iterator[list[RenderedRow]]:
    documents = read_documents(read_records(paths), config.format, has_chat_template=renderer.template is not None)
    while batch := [renderer.render(document) for document in islice(documents, _ROWS_AT_ONCE)]:
        yield batch


def _fitted(row: TokenRow, config: DataConfig, counts: Counter[str]) -> list[TokenRow]:
    parts = cut_row(row, config.max_length, config.over_long)
    if len(row.input_ids) > config.max_length:
        counts[{"truncate": "num_truncated", "split": "num_split", "drop": "num_dropped"}[config.over_long]] += 1
    return parts


def _nothing_to_learn(row: RenderedRow, config: DataConfig, counts: Counter[str]) -> DataError:
    shown = row.text[:_SHOWN_CHARACTERS] + ("..." if len(row.text) > _SHOWN_CHARACTERS else "")
    spans = [row.text[start:stop][:_SHOWN_CHARACTERS] for start, stop in row.target_spans]
    return DataError(
        f"not one token to learn in {counts['num_records']} rows",
        place=row.place,
        found=f"(first row, rendered)\n{shown}\n  of which to be learned: {spans or 'nothing'}; {dict(counts)}",
        wanted=f"at least one target with train_on: {config.train_on} and max_length: {config.max_length}",
        next_step="give the answers the role `assistant`, raise data.max_length, or set data.train_on: all",
    )


@contextmanager
def _cache_errors(place: Path) -> Iterator[None]:
    """Turn what a file system answers into an error with a cure; only around the cache's own files."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter from locks, where a file system has none
        raise DataError(
            f"the token cache cannot be written ({getattr(error, 'strerror', None) or error})",
            place=str(place),
            next_step="make room there, or name another folder (data.cache_dir)",
        ) from error


def _sweep(cache: Path, fingerprint: str) -> None:
    """Remove what interrupted attempts left. Only the holder of the lock may: nobody else is writing then."""
    for left in cache.glob(f"{fingerprint}.unfinished-*"):
        shutil.rmtree(left, ignore_errors=True)
