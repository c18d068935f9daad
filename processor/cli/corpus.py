"""Text for the demo: the docstrings of Python's own standard library, or the files given."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from processor.cli.produce import read_text, text_files
from processor.cli.splitter import split_text
from processor.client import Chunk

MAX_CHARACTERS = 300
MAX_CHUNKS = 1_200

MODULES = (
    *("datetime", "re", "json", "random", "math", "statistics", "hashlib", "hmac", "secrets", "base64", "zlib", "gzip"),
    *("zipfile", "tarfile", "shutil", "tempfile", "pathlib", "glob", "fnmatch", "os", "os.path", "subprocess"),
    *("threading", "queue", "asyncio", "socket", "ssl", "selectors", "select", "signal", "time", "calendar"),
    *("decimal", "fractions", "collections", "heapq", "bisect", "array", "struct", "copy", "pickle", "itertools"),
    *("functools", "operator", "contextlib", "argparse", "logging", "traceback", "inspect", "ast", "dis"),
    *("csv", "configparser", "sqlite3", "urllib.parse", "urllib.request", "http.client", "email.message", "html"),
    *("string", "textwrap", "difflib", "unicodedata", "locale", "codecs", "io", "uuid", "ipaddress", "weakref"),
    *("types", "enum", "dataclasses", "abc", "numbers", "cmath", "bz2", "lzma", "mimetypes", "smtplib"),
    *("xml.etree.ElementTree", "concurrent.futures", "multiprocessing", "unittest", "doctest", "pprint", "shlex"),
)


class Question(NamedTuple):
    """A search text and the chunk ids of which one must be among the first three answers."""

    text: str
    answers: frozenset[str]


class Corpus(NamedTuple):
    """Document id -> its chunks, and what to ask of them."""

    documents: Mapping[str, Sequence[Chunk]]
    questions: Sequence[Question]

    @property
    def size(self) -> int:
        return sum(map(len, self.documents.values()))


QUESTIONS = (
    Question("parse a date from a string", frozenset({"datetime.datetime.strptime"})),
    Question("shuffle a list in random order", frozenset({"random.Random.shuffle", "random.shuffle"})),
    Question("copy a file together with its permissions", frozenset({"shutil.copy", "shutil.copy2"})),
    Question("compute the greatest common divisor", frozenset({"math.gcd"})),
    Question("the median of some numbers", frozenset({"statistics.median", "statistics.median_low"})),
)


def standard_library() -> Corpus:
    """Each documented function, class and method of `MODULES`, up to `MAX_CHUNKS`: a module is a document."""
    documents: dict[str, list[Chunk]] = {}
    left = MAX_CHUNKS
    for name in MODULES:
        chunks = [Chunk(chunk_id, text) for chunk_id, text in _docstrings(importlib.import_module(name), name)][:left]
        if chunks:
            documents[name] = chunks
            left -= len(chunks)
    return Corpus(documents, QUESTIONS)


def of_files(paths: Sequence[Path], *, questions: int = 5) -> Corpus:
    """The files as documents; asked are the first words of chunks spread over them, which must find their own."""
    documents = {
        path.as_posix(): [
            Chunk(f"{path.as_posix()}#{place}", piece)
            for place, piece in enumerate(split_text(read_text(path), max_characters=2 * MAX_CHARACTERS))
        ]
        for path in text_files(paths)
    }
    documents = {name: chunks for name, chunks in documents.items() if chunks}
    chunks = [chunk for listed in documents.values() for chunk in listed]
    step = max(1, len(chunks) // questions)
    asked = [Question(c.text[:120], frozenset({c.chunk_id})) for c in chunks[::step][:questions]]
    return Corpus(documents, asked)


def _docstrings(module: ModuleType, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, that name and the beginning of its docstring) of what the module offers, by name."""
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or inspect.ismodule(value):
            continue
        home = getattr(value, "__module__", None) or name
        if home.lstrip("_").split(".")[0] != name.split(".", maxsplit=1)[0]:
            continue  # imported from elsewhere
        if inspect.isclass(value):
            yield from _chunk(f"{name}.{attribute}", value)
            for member, part in sorted(vars(value).items()):
                if not member.startswith("_") and (callable(part) or isinstance(part, classmethod | staticmethod)):
                    yield from _chunk(f"{name}.{attribute}.{member}", part)
        elif callable(value):
            yield from _chunk(f"{name}.{attribute}", value)


def _chunk(qualified: str, value: object) -> Iterator[tuple[str, str]]:
    doc = value.__doc__
    if isinstance(doc, str) and len(doc.split()) >= 3:
        body = split_text(doc, max_characters=MAX_CHARACTERS)[0]
        yield qualified, f"{qualified}: {body}"
