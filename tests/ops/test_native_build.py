"""Kernels in C: where they are kept, what is not loaded, and what happens without a compiler, a cache or a good one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qlora.ops import nf4
from qlora.ops.native import build
from qlora.ops.nf4_quantize import NativeQuantizer

NAME = "nf4_quantize"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of this test's own; what the process has loaded is forgotten before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load.cache_clear()
    yield tmp_path / "cache" / "qlora" / "native"
    build.load.cache_clear()


@pytest.fixture
def compiler() -> None:
    if build._find_compiler() is None:
        pytest.skip("no C compiler")


def load_again() -> build.Loaded:
    """As another process would."""
    build.load.cache_clear()
    return build.load(NAME)


def place_of(loaded: build.Loaded) -> Path:
    assert loaded.library is not None, loaded.reason
    assert hasattr(loaded.library, "qlora_quantize_4bit")
    return Path(loaded.library._name)


def assert_falls_back(reason: str) -> None:
    """The bytes are bitsandbytes' own, and so is the way to them."""

    def exact(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return nf4._quantize_exactly("nf4", weight, block_size)

    own = NativeQuantizer(nf4.four_bit_code("nf4", torch.device("cpu")), exact)
    assert not own.is_native
    assert reason in own.describe()
    weight = torch.randn(64 * 50 + 17, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(own.quantize(weight, 64), exact(weight, 64), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("compiler")
def test_it_is_compiled_once_and_kept(cache: Path) -> None:
    first = place_of(build.load(NAME))
    assert [first] == list(cache.iterdir())  # nothing of the work is left behind
    assert cache.stat().st_mode & 0o777 == 0o700
    made = first.stat()
    assert place_of(load_again()) == first
    assert first.stat().st_ino == made.st_ino


@pytest.mark.usefixtures("compiler")
def test_it_is_kept_where_new_files_are_a_groups_to_write(cache: Path) -> None:
    """As on systems that give every user a group."""
    before = os.umask(0o002)
    try:
        first = place_of(build.load(NAME))
    finally:
        os.umask(before)
    assert first.parent == cache
    assert {folder.stat().st_mode & 0o777 for folder in (cache, cache.parent, cache.parent.parent)} == {0o700}


@pytest.mark.usefixtures("compiler")
def test_another_cpu_or_compiler_has_a_file_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [place_of(build.load(NAME))]
    with monkeypatch.context() as changed:
        changed.setattr(build, "_describe_cpu", lambda: "flags: sse")
        places.append(place_of(load_again()))
    found = build._find_compiler()
    assert found is not None
    with monkeypatch.context() as changed:
        changed.setenv("CC", f"{found[0]} -g0")
        places.append(place_of(load_again()))
    assert len(set(places)) == 3
    assert {place.parent for place in places} == {cache}


@pytest.mark.usefixtures("compiler")
def test_a_compiler_that_does_not_know_the_cpu(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = build._find_compiler()
    assert found is not None
    refusing = tmp_path / "refusing"
    refusal = 'case "$*" in *march*) echo "error: bad value" >&2; exit 1;; esac'
    refusing.write_text(f'#!/bin/sh\n{refusal}\nexec {found[0]} "$@"\n')
    refusing.chmod(0o755)
    monkeypatch.setenv("CC", str(refusing))
    assert place_of(build.load(NAME)).parent == cache


@pytest.mark.usefixtures("compiler")
def test_processes_that_build_at_once(cache: Path) -> None:
    code = (
        "import sys; sys.stdin.read()\n"
        "from qlora.ops.native.build import load\n"
        f"loaded = load({NAME!r})\n"
        "assert loaded.library.qlora_quantize_4bit, loaded.reason\n"
        "print(loaded.library._name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        assert process.stdin is not None
        process.stdin.close()  # now
    names = set()
    for process in started:
        assert process.stdout is not None
        names.add(process.stdout.read().strip())
        process.stdout.close()
        assert process.wait(60) == 0
    assert [Path(name) for name in names] == list(cache.iterdir())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("place", ["/proc/nowhere", "a file"])
def test_a_cache_that_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """It is compiled in a private place, and nothing stays behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert temporary in place_of(build.load(NAME)).parents
    assert not list(temporary.iterdir())
    assert not cache.exists()


def _is_open(cache: Path, kept: Path) -> None:
    cache.chmod(0o777)


def _file_is_open(cache: Path, kept: Path) -> None:
    kept.chmod(0o766)


def _above_is_open(cache: Path, kept: Path) -> None:
    cache.parent.chmod(0o777)


def _file_is_a_link(cache: Path, kept: Path) -> None:
    kept.rename(cache / "elsewhere")
    kept.symlink_to(cache / "elsewhere")


def _file_is_of_another_user(cache: Path, kept: Path) -> None:
    _give_away(kept)


def _folder_is_of_another_user(cache: Path, kept: Path) -> None:
    _give_away(cache)


def _above_is_of_another_user(cache: Path, kept: Path) -> None:
    _give_away(cache.parent)


def _give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 65534, 65534)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "spoil",
    [
        _is_open, _file_is_open, _above_is_open, _file_is_a_link,
        _file_is_of_another_user, _folder_is_of_another_user, _above_is_of_another_user,
    ],
)  # fmt: skip
def test_what_others_could_have_written_is_not_loaded(cache: Path, spoil: Callable[[Path, Path], None]) -> None:
    kept = place_of(build.load(NAME))
    spoil(cache, kept)
    # It is compiled anew, in a private place.
    assert cache not in place_of(load_again()).parents


@pytest.mark.usefixtures("compiler")
def test_a_file_cut_short_is_made_again(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    found = build._find_compiler()
    assert found is not None
    source = Path(build.__file__).with_name(f"{NAME}.c")
    kept = cache / f"{NAME}-{build._fingerprint(source, found)}.so"
    kept.touch(0o700)
    assert place_of(build.load(NAME)) == kept
    assert kept.stat().st_size


@pytest.mark.usefixtures("cache")
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_falls_back("no C compiler")


@pytest.mark.usefixtures("cache")
def test_with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    assert_falls_back("/bin/false: ended with 1")


@pytest.mark.usefixtures("cache")
def test_with_a_compiler_that_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/true")
    assert_falls_back("/bin/true: it made no file")


@pytest.mark.usefixtures("cache")
def test_with_a_compiler_that_makes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd"
    odd.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo text > "$2"; shift; done\n')
    odd.chmod(0o755)
    monkeypatch.setenv("CC", str(odd))
    assert_falls_back("odd: ")


def test_the_package_holds_the_source() -> None:
    """A wheel takes along what pyproject.toml names."""
    text = (Path(build.__file__).parents[3] / "pyproject.toml").read_text()
    assert '"qlora.ops.native" = ["*.c"]' in text
    assert Path(build.__file__).with_name(f"{NAME}.c").is_file()
