"""Sources become records with places; what is missing, empty or of another kind says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from qlora.data.records import Record, digest_of_sources, read_records
from qlora.errors import DataError


def test_each_kind_of_file_gives_its_rows_and_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n')
    (tmp_path / "b.json").write_text('[\n {"x": 3}\n]')
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    datasets.Dataset.from_list([{"x": 4, "y": None}, {"x": 5, "y": [{"z": "w"}]}]).to_parquet(str(tmp_path / "d.parquet"))
    assert list(read_records([str(tmp_path)])) == [
        Record({"x": 1}, f"{tmp_path}/a.jsonl:1"),
        Record({"x": 2}, f"{tmp_path}/a.jsonl:3"),
        Record({"x": 3}, f"{tmp_path}/b.json:2"),
        Record({"text": "one\n\ntwo\n"}, f"{tmp_path}/c.txt:1"),
        Record({"x": 4}, f"{tmp_path}/d.parquet:row 0"),
        Record({"x": 5, "y": [{"z": "w"}]}, f"{tmp_path}/d.parquet:row 1"),
    ]


def test_a_folder_is_read_in_the_order_of_paths_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/9.txt", ".hidden/0.txt", "a/.0.txt", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [record.fields["text"] for record in read_records([str(tmp_path)])] == ["a/9.txt", "b/2.txt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
def test_an_empty_file_has_0_rows(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"0 rows in {path}"):
        list(read_records([str(path)]))


def test_an_empty_list_has_0_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[ ]")
    with pytest.raises(DataError, match="0 rows in"):
        list(read_records([str(path)]))


def test_an_empty_source_among_others_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"0 rows in .*b\.jsonl"):
        list(read_records([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="0 rows in") as caught:
        list(read_records([str(tmp_path)]))
    assert "notes.md" in str(caught.value)


@pytest.mark.parametrize("missing", ["trian.jsonl", "data/train.json", "sub/trian"])
def test_a_missing_file_is_answered_with_what_is_near(tmp_path: Path, monkeypatch, missing: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "sub" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    near = {"trian.jsonl": "train.jsonl", "data/train.json": "data/train.jsonl", "sub/trian": "sub/train"}[missing]
    with pytest.raises(DataError, match="no such file or folder") as caught:
        list(read_records([missing]))
    assert caught.value.place == missing
    assert f"near it is {near}" in str(caught.value.found)


def test_a_missing_file_in_a_missing_folder_is_told_from_the_last_folder_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"nothing like it in {tmp_path}"):
        list(read_records([str(tmp_path / "nowhere" / "x" / "rows.jsonl")]))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"not a kind of file.*\n.*found: \.csv"):
        list(read_records([str(path)]))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"x": 4}]).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable parquet file") as caught:
        list(read_records([str(path)]))
    assert caught.value.place == str(path)


def test_a_hub_id_is_opened_by_its_split(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"x": 1, "y": None}, {"x": 2, "y": "z"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_records(["user/name"])) == [
        Record({"x": 1}, "user/name:row 0"),
        Record({"x": 2, "y": "z"}, "user/name:row 1"),
    ]
    assert len(list(read_records(["user/name:test"]))) == 2
    assert asked == [("user/name", "train"), ("user/name", "test")]
    assert digest_of_sources(["user/name"]) == digest_of_sources(["user/name"])


def test_a_hub_that_does_not_answer_is_the_users_error(monkeypatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="neither a file or folder here, nor a hub data set") as caught:
        list(read_records(["user/name"]))
    assert "ConnectionError: no network" in str(caught.value.found)


def test_the_digest_follows_content_and_order_and_not_names(tmp_path: Path) -> None:
    one, two, moved = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "moved.jsonl"
    one.write_text('{"x": 1}\n')
    two.write_text('{"x": 2}\n')
    before = digest_of_sources([str(one), str(two)])
    assert digest_of_sources([str(two), str(one)]) != before
    one.rename(moved)
    assert digest_of_sources([str(moved), str(two)]) == before
    moved.write_text('{"x": 1}\n{"x": 3}\n')
    assert digest_of_sources([str(moved), str(two)]) != before


def test_reading_records_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": 1}))
    program = (
        "import sys; from qlora.data.records import read_records; "
        f"assert len(list(read_records([{str(path)!r}]))) == 1; "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
