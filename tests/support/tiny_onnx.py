"""ONNX models of a few nodes, written by hand: no package that writes them is needed, and their vectors are plain sums.

`lookup` looks a token up in a table, so that the vector of a text is what numpy makes of the table's rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_INT64, _FLOAT = 7, 1
_OPSET = 13


def lookup(table: NDArray[np.float32], *, mixing: bool = False) -> bytes:
    """A model whose token vectors are the rows of `table`; `mixing` divides all by the greatest value of the run, as
    quantising over a whole run does."""
    output = "last_hidden_state"
    nodes = [_node("Gather", ["table", "input_ids"], ["rows" if mixing else output])]
    if mixing:
        nodes += [
            _node("ReduceMax", ["rows"], ["greatest"]),
            _node("Div", ["rows", "greatest"], [output]),
        ]
    return _model(nodes, {"table": table}, [(output, [None, None, table.shape[1]])])


def pooling_itself(table: NDArray[np.float32], *, texts: int | None = None) -> bytes:
    """A model with one output, a text's: the greatest of each value of its tokens' rows, padding's among them.

    `texts`: how many it takes at once, None: any number.
    """
    nodes = [
        _node("Gather", ["table", "input_ids"], ["rows"]),
        _node("ReduceMax", ["rows"], ["sentence_embedding"], axis=1),
    ]
    return _model(nodes, {"table": table}, [("sentence_embedding", [texts, table.shape[1]])], texts=texts)


def greedy(table: NDArray[np.float32], *, from_tokens: int) -> bytes:
    """`lookup`, but a text of more tokens than that wants memory that no machine has: 4 TB for each token more."""
    nodes = [
        _node("Gather", ["table", "input_ids"], ["rows"]),
        _node("Shape", ["input_ids"], ["shape"]),
        _node("Gather", ["shape", "one"], ["length"]),
        _node("Sub", ["length", "limit"], ["over"]),
        _node("Max", ["over", "zero"], ["past"]),
        _node("Mul", ["past", "huge"], ["size"]),
        _node("ConstantOfShape", ["size"], ["wasted"]),
        _node("ReduceSum", ["wasted"], ["nothing"]),
        _node("Add", ["rows", "nothing"], ["last_hidden_state"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "table": table,
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "limit": np.array([from_tokens], np.int64),
        "huge": np.array([1 << 40], np.int64),
    }
    return _model(nodes, constants, [("last_hidden_state", [None, None, table.shape[1]])])


def write_export(
    directory: Path,
    model: bytes,
    tokenizer: Path,
    *,
    pooling: dict[str, Any] | None = None,
    modules: Sequence[str] = ("Transformer", "Pooling", "Normalize"),
    prompts: dict[str, str] | None = None,
    max_seq_length: int | None = 64,
    nested: bool = True,
) -> Path:
    """A directory as sentence-transformers exports one. `pooling` None: no configuration at all, only the model."""
    where = directory / "onnx" if nested else directory
    where.mkdir(parents=True, exist_ok=True)
    (where / "model.onnx").write_bytes(model)
    (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    if pooling is None:
        return directory
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": paths.get(name, name), "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    return directory


# --- the encoding: protocol buffers, the fields of onnx.proto3


def _model(
    nodes: Sequence[bytes],
    constants: dict[str, NDArray[Any]],
    outputs: Sequence[tuple[str, Sequence[int | None]]],
    *,
    texts: int | None = None,
) -> bytes:
    graph = b"".join(
        [
            *(_bytes(1, node) for node in nodes),
            _bytes(2, b"tiny"),
            *(_bytes(5, _tensor(name, array)) for name, array in constants.items()),
            *(_bytes(11, _value(name, _INT64, [texts, None])) for name in INPUTS),
            *(_bytes(12, _value(name, _FLOAT, shape)) for name, shape in outputs),
        ]
    )
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _number(2, _OPSET))


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], *, axis: int | None = None) -> bytes:
    return b"".join(
        [
            *(_bytes(1, name.encode()) for name in inputs),
            *(_bytes(2, name.encode()) for name in outputs),
            _bytes(4, operator.encode()),
            # What is reduced is left out of the shape: an attribute of kind INT (2); the axes are INTS (7), or all.
            *([_bytes(5, _bytes(1, b"keepdims") + _number(3, 0) + _number(20, 2))] if "Reduce" in operator else []),
            *([_bytes(5, _bytes(1, b"axes") + _number(8, axis) + _number(20, 7))] if axis is not None else []),
        ]
    )


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    kind = _INT64 if array.dtype == np.int64 else _FLOAT
    return b"".join(
        [
            *(_number(1, size) for size in array.shape),
            _number(2, kind),
            _bytes(8, name.encode()),
            _bytes(9, array.tobytes()),
        ]
    )


def _value(name: str, kind: int, shape: Sequence[int | None]) -> bytes:
    dims = b"".join(
        _bytes(1, _number(1, size) if size is not None else _bytes(2, f"{name}_{i}".encode()))
        for i, size in enumerate(shape)
    )
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, dims)))


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
