"""Compiles a kernel in C when it is first wanted, keeps it in the user's cache, and loads it.

A kernel is one C file beside this one. It is compiled for the CPU it runs on, in a fraction of a second, with whatever
compiler is there: no package and no headers of torch or Python are needed. What came out is kept under a name made of
everything that decides it (source, flags, compiler, CPU), so that nodes of several kinds may share a home. It is written
under another name first and then renamed, so that any number of ranks may do so at once.

What is loaded is code, so nothing is loaded that others than the user could have written: file, folder and all folders
above must belong to the user or root and be closed to others' writing. Where the cache is not such a place, or is not to be
written to, the kernel is compiled into a private temporary folder, in every process anew.

Where there is no compiler, or it does not work, there is no kernel, and the reason is given: callers know another way.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Exact: no contraction to fused products, none of the arithmetic that some compilers take for granted.
_FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-fast-math")
# The first that compiles is taken.
_FOR_THIS_CPU: tuple[tuple[str, ...], ...] = (("-march=native",), ())
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_SECONDS = 60
# What /proc/cpuinfo says of the first processor that decides what it can run.
_CPU_KEYS = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part", "isa")


@dataclass(frozen=True)
class Loaded:
    """A library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


class _CannotCompileError(Exception):
    """The compiler does not do it, wherever the result is put."""


class _UnsafeError(OSError):
    """Others could have put something there."""


@functools.cache
def load(name: str) -> Loaded:
    """The compiled `name`.c of this folder, by ctypes, whose calls let other threads run. Once a process. Rank-local."""
    source = Path(__file__).with_name(f"{name}.c")
    if not hasattr(os, "geteuid"):
        return Loaded(None, "kernels in C are compiled on POSIX systems only")
    compiler = _find_compiler()
    if compiler is None:
        return Loaded(None, f"no C compiler was found ($CC, {', '.join(_COMPILERS)})")
    try:
        file_name = f"{name}-{_fingerprint(source, compiler)}.so"
        try:
            return Loaded(_from_cache(source, compiler, file_name))
        except (OSError, RuntimeError):  # no home, or not one to be written to or trusted
            with tempfile.TemporaryDirectory(prefix="qlora-native-", ignore_cleanup_errors=True) as folder:
                return Loaded(_build(source, compiler, Path(folder), file_name))
    except (_CannotCompileError, OSError) as error:
        return Loaded(None, f"{shlex.join(compiler)}: {error}")


def _find_compiler() -> list[str] | None:
    """$CC with its arguments, or the first of the usual names; None where there is none."""
    for named in (os.environ.get("CC", "").split(), *([name] for name in _COMPILERS)):
        path = shutil.which(named[0]) if named else None
        if path:
            return [path, *named[1:]]
    return None


def _fingerprint(source: Path, compiler: list[str]) -> str:
    """A hash of all that decides what is compiled, and where it runs."""
    version = _run([*compiler, "--version"]).stdout
    parts = [source.read_text(), repr(_FLAGS), repr(_FOR_THIS_CPU), repr(compiler), version, _describe_cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _describe_cpu() -> str:
    """What -march=native and the C library depend on."""
    lines = [platform.machine(), *platform.libc_ver()]
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if not line.strip():
                    break
                if line.partition(":")[0].strip() in _CPU_KEYS:
                    lines.append(line.strip())
    except OSError:
        lines.append(platform.node())
    return "\n".join(lines)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler. Raises _CannotCompileError where it does not end well."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise _CannotCompileError(str(error)) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        first_error = next((line for line in said if "error" in line), said[0] if said else "it said nothing")
        raise _CannotCompileError(f"ended with {done.returncode}: {first_error[:300]}")
    return done


def _from_cache(source: Path, compiler: list[str], file_name: str) -> ctypes.CDLL:
    """Load from the user's cache, compiling where it is not there. Raises OSError where the cache is no good."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qlora" / "native"
    _make_private(folder)
    folder = folder.resolve()
    _check_own(folder)
    for above in folder.parents:
        _check_closed(above)
    path = folder / file_name
    if path.exists():
        _check_own(path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink()  # cut short, as by a machine that lost its power
    return _build(source, compiler, folder, file_name)


def _build(source: Path, compiler: list[str], folder: Path, file_name: str) -> ctypes.CDLL:
    """Compile into a folder, under the name at once or not at all, and load."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = Path(private) / file_name
        for number, flags in enumerate(_FOR_THIS_CPU, start=1):
            try:
                _run([*compiler, *_FLAGS, *flags, "-o", str(made), str(source)])
                break
            except _CannotCompileError:
                if number == len(_FOR_THIS_CPU):
                    raise
        if not made.is_file():
            raise _CannotCompileError("it made no file")
        made.chmod(0o700)
        made.replace(folder / file_name)
    return ctypes.CDLL(str(folder / file_name))


def _make_private(folder: Path) -> None:
    """Make a folder and those missing above it for the user alone, whatever the umask."""
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _check_own(path: Path) -> None:
    """Raise unless the user alone could have written here."""
    found = path.lstat()
    if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UnsafeError(f"{path} is not the user's alone")


def _check_closed(folder: Path) -> None:
    """Raise where others than the user and root could put another folder in the place of one that lies in this one."""
    found = folder.lstat()
    open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if found.st_uid not in (0, os.geteuid()) or open_to_others:
        raise _UnsafeError(f"others may write to {folder}")
