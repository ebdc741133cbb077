"""Text that every Python installation carries: its own documentation, as text and as (name, summary) pairs.

The idea: a demonstration needs data, and data needs a licence, a download and a place. The standard library is already
there. Python files are read with `ast` and never imported, so nothing runs; modules written in C have no source, so
those of a fixed list are imported and asked. Everything is visited in sorted order and chosen by SHA-256, never by set
order or clock: the same Python version on the same platform always gives the same pairs.

Docstrings differ between Python versions. That is why the pairs are made at run time and not stored.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules (with everything below them) whose names become pairs: what people use, on every Python from 3.10 to 3.13.
_PAIR_MODULES = """
    abc argparse array ast asyncio atexit base64 binascii bisect builtins bz2 calendar cmath cmd codecs collections
    colorsys concurrent configparser contextlib contextvars copy csv dataclasses datetime decimal difflib dis doctest
    enum errno filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass glob graphlib gzip hashlib heapq
    hmac html inspect io ipaddress itertools json keyword linecache locale logging lzma marshal math mimetypes mmap
    numbers operator os pathlib pickle pkgutil platform plistlib pprint queue random re reprlib sched secrets select
    selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct
    subprocess sys sysconfig tarfile tempfile textwrap threading time timeit tokenize tomllib traceback tracemalloc
    types typing unicodedata urllib uuid venv warnings wave weakref webbrowser zipapp zipfile zlib zoneinfo
"""
PAIR_MODULES = frozenset(_PAIR_MODULES.split())

# Python files that are not documentation of the library: its own tests, vendored copies, programs that open windows.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "_bundled"}
)
_SKIPPED_FILES = frozenset({"antigravity", "this", "__main__", "__phello__", "__hello__", "ntpath", "genericpath"})

# Modules written in C. Those of the first list hide behind a public module of the same name without the underscore.
_HIDDEN_C_MODULES = """
asyncio bisect bz2 codecs collections contextvars csv ctypes curses datetime decimal functools hashlib heapq io json locale
lzma operator pickle random signal socket sqlite3 sre ssl struct symtable tracemalloc uuid warnings weakref zoneinfo
"""
_OPEN_C_MODULES = """
array atexit binascii cmath errno faulthandler fcntl gc grp itertools marshal math mmap pwd readline resource select sys
syslog termios time unicodedata zlib
"""
_C_MODULES = (
    ("builtins", ""),
    ("posix", "os"),
    ("_elementtree", "xml.etree.ElementTree"),
    *((f"_{name}", name) for name in _HIDDEN_C_MODULES.split()),
    *((name, name) for name in _OPEN_C_MODULES.split()),
)
_PUBLIC_NAMES = {"posixpath": "os.path", "_collections_abc": "collections.abc"}
_ASYNCIO_EXPORTS = """
coroutines events exceptions futures locks queues runners streams subprocess taskgroups tasks threads timeouts
"""
_ASYNCIO_MODULES = frozenset(_ASYNCIO_EXPORTS.split())

_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*?\)[)\]]*(\s*->\s*[^.\n]*?)?(\s*(--|:)\s*|\s*\n|\s*$)", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(\[*])")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|cf|vs|[A-Z])\.$")
_SUMMARY = re.compile(r"^[A-Z][A-Za-z0-9 ,;'\"()\[\]{}<>=+*/%&|^~!?#$@:._`-]*$")
_CODE = re.compile(r">>>|->|^[\w.]+\s*\(|^\w+[_:]|::")
_WORD = re.compile(r"[a-z0-9]{2,}")
MIN_SUMMARY_CHARS = 16
MAX_SUMMARY_CHARS = 90
MAX_NAME_CHARS = 48

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """A documented name and the first sentence of its docstring, on one line."""

    name: str
    summary: str

    def __post_init__(self) -> None:
        if not self.name or "\n" in self.summary or not MIN_SUMMARY_CHARS <= len(self.summary) <= MAX_SUMMARY_CHARS:
            raise ValueError(f"not a pair: {self.name!r}, {self.summary!r}")


def source_files() -> list[tuple[str, Path]]:
    """Return (module name, path) of the standard library's Python files, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or _SKIPPED_FOLDERS.intersection(parts) or parts[-1] in _SKIPPED_FILES:
            continue
        if parts[0].startswith(("config-", "_sysconfigdata")):  # how this one Python was built
            continue
        found.append((".".join(parts), path))
    return sorted(found)


def read_source(path: Path) -> str | None:
    """Return the text of one Python file, or None where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (UnicodeDecodeError, SyntaxError):  # SyntaxError: a coding line that names no codec
        return None


def documented_names(modules: frozenset[str] | None = PAIR_MODULES) -> dict[str, str]:
    """Return {dotted public name: whole docstring}, sorted by name.

    Args:
        modules: top-level modules to look at; None looks at all of them.
    """
    found: dict[str, str] = {}
    for module, path in source_files():
        public = _public_name(module)
        if public is None or not _wanted(public, modules):
            continue
        for name, docstring in _docstrings_of_source(public, path):
            found.setdefault(name, docstring)
    for module, public in _C_MODULES:
        if _wanted(public or "builtins", modules):
            for name, docstring in _docstrings_of_c_module(module, public):
                found.setdefault(name, docstring)
    return dict(sorted(found.items()))


def summary_of(docstring: str) -> str | None:
    """Return the first sentence of a docstring as one clean line, or None where there is none worth learning."""
    paragraphs = [part for part in inspect.cleandoc(docstring).split("\n\n") if part.strip()] + [""]
    first = _SIGNATURE.sub("", paragraphs[0], count=1) or paragraphs[1]
    words = " ".join(first.split())
    sentence = ""
    for piece in _SENTENCE_END.split(words):
        sentence = f"{sentence} {piece}".strip()
        if not _ABBREVIATION.search(sentence):
            break
    sentence = sentence[:1].upper() + sentence[1:]
    if not sentence.endswith((".", "!", "?")):
        if sentence.endswith((":", ",", ";", "-")):
            return None
        sentence += "."
    if not MIN_SUMMARY_CHARS <= len(sentence) <= MAX_SUMMARY_CHARS or len(sentence.split()) < 3:
        return None
    return sentence if _SUMMARY.match(sentence) and not _CODE.search(sentence) else None


def make_pairs(modules: frozenset[str] | None = PAIR_MODULES) -> list[Pair]:
    """Return one pair a documented name that has a usable first sentence, sorted by name."""
    pairs = []
    for name, docstring in documented_names(modules).items():
        summary = summary_of(docstring)
        if summary is not None and len(name) <= MAX_NAME_CHARS:
            pairs.append(Pair(name, summary))
    return pairs


def split_pairs(pairs: list[Pair], num_train: int, num_held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Choose training and held-out pairs that share no summary.

    Pairs whose summaries say the same (case, punctuation and one-letter words aside, so that `math.cosh` and
    `cmath.cosh` are twins) form a group, and one pair speaks for its group. Groups are ordered by the SHA-256 of their
    text: the choice depends on nothing else, and another Python version moves only what changed.

    Raises:
        ValueError: there are fewer groups than asked for.
    """
    groups: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda p: (p.name.count("."), len(p.name), p.name)):
        groups.setdefault(summary_key(pair.summary), pair)
    if len(groups) < num_train + num_held_out:
        raise ValueError(f"{num_train} + {num_held_out} pairs wanted, this Python documents {len(groups)}")
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())
    held_out = [groups[key] for key in order[:num_held_out]]
    return [groups[key] for key in order[num_held_out : num_held_out + num_train]], held_out


def summary_key(summary: str) -> str:
    """Return what two summaries share when they say the same: their words of two characters or more, in lower case."""
    return " ".join(_WORD.findall(summary.lower()))


def comment_blocks(source: str, min_chars: int = 120) -> Iterator[str]:
    """Yield runs of whole-line comments of at least `min_chars`, without their hash signs."""
    block: list[str] = []
    for line in [*io.StringIO(source), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").strip())
            continue
        text = "\n".join(block).strip()
        block = []
        if len(text) >= min_chars:
            yield text


def help_topics() -> list[str]:
    """Return the texts of `help()` topics (the language reference, as pydoc carries it), sorted by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[key] for key in sorted(topics)]


def _public_name(module: str) -> str | None:
    """Return the name users import a module's contents by; None for private modules."""
    public = _PUBLIC_NAMES.get(module, module)
    if public.startswith("asyncio."):
        return "asyncio" if public.split(".")[1] in _ASYNCIO_MODULES else None
    return None if any(part.startswith("_") for part in public.split(".")) else public


def _wanted(public: str, modules: frozenset[str] | None) -> bool:
    return modules is None or public.split(".")[0] in modules


def _docstrings_of_source(module: str, path: Path) -> Iterator[tuple[str, str]]:
    source = read_source(path)
    if source is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold invalid escapes; ast warns about them
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template, not Python
            return
    yield from _docstrings_of_tree(module, tree)


def _docstrings_of_tree(prefix: str, node: _Documented) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield prefix, docstring
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from _docstrings_of_tree(f"{prefix}.{child.name}", child)


def _docstrings_of_c_module(module: str, public: str) -> Iterator[tuple[str, str]]:
    try:
        loaded = importlib.import_module(module)
    except ImportError:  # not on this platform, or not in this Python version
        return
    prefix = f"{public}." if public else ""
    for name, member in sorted(vars(loaded).items()):
        if name.startswith("_") or not (inspect.isbuiltin(member) or inspect.isclass(member)) or member.__name__ != name:
            continue  # private, a value, or another name of something that has its own
        if isinstance(member.__doc__, str):
            yield f"{prefix}{name}", member.__doc__
        if not inspect.isclass(member):
            continue
        for attribute, value in sorted(vars(member).items()):
            documented = inspect.ismethoddescriptor(value) or inspect.isdatadescriptor(value) or inspect.isbuiltin(value)
            if documented and not attribute.startswith("_") and isinstance(value.__doc__, str):
                yield f"{prefix}{name}.{attribute}", value.__doc__
