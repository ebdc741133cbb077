"""The whole way from files to mapped token rows: policies, counts, the cache, and several processes at once."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora.config.schema import DataConfig
from qlora.data import prepare as prepare_module
from qlora.data.prepare import prepare
from qlora.data.token_store import TokenWriter
from qlora.errors import DataError


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _rows(dataset: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(dataset.row(index)[0]) for index in range(len(dataset))]


def test_rows_and_targets_are_those_of_the_files(make_tokenizer, write_rows, data_config) -> None:
    tokenizer = make_tokenizer("chatml")
    source = write_rows([_chat(f"Q{number}", f"A{number}") for number in range(600)])
    seen: list[int] = []
    dataset = prepare([source], tokenizer, data_config(), on_progress=seen.append)
    assert seen == [256, 512, 600]
    assert len(dataset) == dataset.statistics.num_records == 600
    for index in (0, 255, 256, 599):
        tokens, targets = dataset.row(index)
        answer = f"A{index}<|im_end|>"
        assert tokenizer.decode(tokens) == f"<|im_start|>user\nQ{index}<|im_end|>\n<|im_start|>assistant\n{answer}\n"
        assert tokenizer.decode(tokens[targets == 1]) == answer


def test_the_second_call_reads_nothing_but_the_cache(make_tokenizer, write_rows, data_config, monkeypatch) -> None:
    source = write_rows([_chat("Q", "A")])
    first = prepare([source], make_tokenizer(), data_config())

    def fail(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(prepare_module, "encode_rows", fail)
    second = prepare([source], make_tokenizer(), data_config())
    assert second.fingerprint == first.fingerprint
    assert second.folder == first.folder
    assert second.statistics == first.statistics
    assert np.array_equal(second.tokens, first.tokens)


def test_everything_that_changes_rows_changes_the_fingerprint(make_tokenizer, write_rows, data_config, tmp_path) -> None:
    rows = [_chat("Q", "A")]
    source = write_rows(rows)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    other_tokenizer = make_tokenizer("chatml")
    other_tokenizer.add_tokens(["<new>"])

    def fingerprint(path: str = source, tokenizer: Any = None, **values: Any) -> str:
        return prepare([path], tokenizer or make_tokenizer("chatml"), data_config(**values)).fingerprint

    found = [
        fingerprint(),
        fingerprint(write_rows([*rows, *rows], "more.jsonl")),
        fingerprint(tokenizer=other_tokenizer),
        fingerprint(tokenizer=make_tokenizer("chatml_eos_differs")),
        fingerprint(tokenizer=make_tokenizer("qwen3")),
        fingerprint(chat_template=str(template)),
        fingerprint(format="messages"),
        fingerprint(train_on="all"),
        fingerprint(max_length=2000),
        fingerprint(over_long="split"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(write_rows(rows, "same.jsonl"), packing=False) == found[0]


def test_a_damaged_cache_is_made_again(make_tokenizer, write_rows, data_config) -> None:
    source = write_rows([_chat("Q", "A")])
    dataset = prepare([source], make_tokenizer(), data_config())
    expected = dataset.tokens.tolist()
    (dataset.folder / "tokens.npy").write_bytes(b"")
    assert prepare([source], make_tokenizer(), data_config()).tokens.tolist() == expected


@pytest.mark.parametrize("over_long", ["truncate", "split", "drop"])
def test_rows_over_the_length_follow_the_policy_and_are_counted(
    make_tokenizer, write_rows, data_config, over_long: str
) -> None:
    tokenizer = make_tokenizer("chatml")
    max_length = 24
    rows = [_chat("Q", "A"), _chat("Q", "word " * 40), _chat("long question " * 40, "A")]
    dataset = prepare([write_rows(rows)], tokenizer, data_config(max_length=max_length, over_long=over_long))
    statistics = dataset.statistics
    assert dataset.lengths.max() <= max_length
    assert statistics.num_records == 3
    assert all(dataset.target_counts > 0)
    whole = tokenizer.apply_chat_template(rows[1]["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert len(whole) > 2 * max_length
    if over_long == "truncate":
        # The third row would be all prompt: there is nothing to learn from it.
        assert (statistics.num_truncated, statistics.num_without_target, len(dataset)) == (2, 1, 2)
        assert dataset.row(1)[0].tolist() == whole[:max_length]
    elif over_long == "split":
        assert statistics.num_split == 2
        num_parts = -(-len(whole) // max_length)
        together = np.concatenate([dataset.row(1 + part)[0] for part in range(num_parts)])
        assert together.tolist() == whole
        assert statistics.num_without_target > 0
    else:
        assert (statistics.num_dropped, statistics.num_without_target, len(dataset)) == (2, 0, 1)


def test_rows_without_a_target_are_left_out_and_counted(make_tokenizer, write_rows, data_config) -> None:
    question = {"messages": [{"role": "user", "content": "Q"}]}
    dataset = prepare([write_rows([question, _chat("Q", "A"), question])], make_tokenizer(), data_config())
    assert len(dataset) == 1
    assert dataset.statistics.num_without_target == 2


def test_nothing_to_learn_at_all_is_refused_with_a_rendered_row(make_tokenizer, write_rows, data_config) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "bot", "content": "A"}]}] * 2
    source = write_rows(rows)
    config = data_config()
    with pytest.raises(DataError, match="not one token to learn in 2 rows") as caught:
        prepare([source], make_tokenizer(), config)
    assert "<|im_start|>bot\nA<|im_end|>" in str(caught.value.found)
    assert caught.value.place == f"{source}:1"
    assert not [path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir()]


def test_turns_that_are_no_targets_are_counted(make_tokenizer, write_rows, data_config) -> None:
    turns = [*_chat("Q", "A")["messages"], *_chat("R", "B")["messages"]]
    dataset = prepare([write_rows([{"messages": turns}, _chat("Q", "A")])], make_tokenizer("qwen3"), data_config())
    assert dataset.statistics.num_unstable == 1


def test_text_files_are_learned_whole(make_tokenizer, data_config, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello world\n")
    tokenizer = make_tokenizer(None, adds_bos=True)
    dataset = prepare([str(tmp_path / "text")], tokenizer, data_config())
    assert _rows(dataset, tokenizer) == ["<s>hello world\n</s>"]
    assert dataset.num_target_tokens == dataset.statistics.num_tokens - 1


def test_no_source_is_refused(make_tokenizer, data_config) -> None:
    with pytest.raises(DataError, match="no data is named"):
        prepare([], make_tokenizer(), data_config())


def test_a_cache_that_cannot_be_written_is_named(make_tokenizer, write_rows, data_config, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="token cache cannot be written") as caught:
        prepare([write_rows([_chat("Q", "A")])], make_tokenizer(), data_config())
    assert "data.cache_dir" in str(caught.value.next_step)


def test_a_full_disk_is_named_and_leaves_no_half_cache(make_tokenizer, write_rows, data_config, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", full)
    config = data_config()
    with pytest.raises(DataError, match="No space left on device"):
        prepare([write_rows([_chat("Q", "A")])], make_tokenizer(), config)
    assert not [path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir()]


def test_truncation_and_padding_saved_with_a_tokenizer_change_nothing(make_tokenizer, write_rows, data_config) -> None:
    source = write_rows([_chat("Q", "A"), _chat("Q", "word " * 40)])
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    dataset = prepare([source], tokenizer, data_config())
    plain = prepare([source], make_tokenizer(), data_config(cache_dir_name="other"))
    assert dataset.fingerprint == plain.fingerprint
    assert dataset.tokens.tolist() == plain.tokens.tolist()


def test_stopping_from_outside_leaves_no_half_cache(make_tokenizer, write_rows, data_config) -> None:
    class Stop(Exception):
        pass

    def stop(num_records: int) -> None:
        raise Stop

    source = write_rows([_chat(f"Q{number}", "A") for number in range(300)])
    config = data_config()
    with pytest.raises(Stop):
        prepare([source], make_tokenizer(), config, on_progress=stop)
    assert not [path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir()]
    assert len(prepare([source], make_tokenizer(), config)) == 300


def test_processes_share_the_work_and_a_killed_one_is_replaced(make_tokenizer, write_rows, tmp_path: Path) -> None:
    """One process works and is killed in the middle; of those that waited, one works and the rest read."""
    tokenizer = make_tokenizer("chatml")
    source = write_rows([_chat(f"Q{number}", "A") for number in range(300)])
    cache = tmp_path / "cache"
    logs, results = ([tmp_path / f"{name}{number}" for number in range(3)] for name in ("log", "result"))

    def work(number: int, seconds: float) -> None:
        def on_progress(num_records: int) -> None:
            logs[number].touch()
            time.sleep(seconds)

        dataset = prepare([source], tokenizer, DataConfig(cache_dir=str(cache)), on_progress=on_progress)
        results[number].write_text(f"{dataset.fingerprint} {len(dataset)} {int(dataset.tokens.sum())}")

    # Forked rather than started anew: importing the libraries three times would take most of the tests' time.
    context = multiprocessing.get_context("fork")
    first, *others = (context.Process(target=work, args=(number, 60 * (number == 0))) for number in range(3))
    first.start()
    deadline = time.monotonic() + 20
    while not logs[0].exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in others:
        process.start()
    time.sleep(0.3)
    assert list(cache.glob("*.unfinished-*"))
    assert not logs[1].exists()
    assert not logs[2].exists()
    first.terminate()
    first.join(timeout=5)
    assert first.exitcode == -signal.SIGTERM
    for process in others:
        process.join(timeout=20)
        assert process.exitcode == 0
    assert results[1].read_text() == results[2].read_text()
    assert results[1].read_text().split()[1] == "300"
    assert logs[1].exists() != logs[2].exists()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
