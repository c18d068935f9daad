"""EmbeddingProvider for a model on this machine: an ONNX export, mean pooling, length 1. No network, no torch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from processor.adapters.local_files import LocalFiles
from processor.adapters.tokens import WordPiece
from processor.domain import EmbeddingFunction, ModelSpec, Vector
from processor.errors import InputRejected, ProviderTransient, SettingsError
from processor.ports import ProviderAnswer


class LocalProvider:
    """Runs texts one by one on `threads` threads (0: one per core), off the event loop.

    Batches padded to their longest text were slower on 2 cores (58 texts/s against 66 of 106 tokens, int8 MiniLM),
    and a text alone has the same vector whatever it is called with. Billed tokens are those the model processes,
    [CLS] and [SEP] included.
    """

    name = "local"

    def __init__(self, files: LocalFiles, model: ModelSpec, *, threads: int = 0) -> None:
        # Else onnxruntime (seen in 1.31) keeps a device id and a queue of reports to its maker in the home directory.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
            import tokenizers  # noqa: F401  (used by WordPiece; both are told of here, at start)
        except ImportError as error:
            raise SettingsError(
                f"EMBEDDING_PROVIDER: local needs {error.name}, pip install 'embedding-processor[local]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(str(files.model), options, providers=["CPUExecutionProvider"])
        self._inputs = [put.name for put in self._session.get_inputs()]
        self._check_output(model)
        self._tokenizer = WordPiece(files.tokenizer)
        self._model = model
        count = threads or os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="local-model")

    async def embed(
        self,
        texts: Sequence[str],
        function: EmbeddingFunction,  # noqa: ARG002  (there is one model)
        attempt_id: str,  # noqa: ARG002  (there is nobody to tell it to)
    ) -> ProviderAnswer:
        """InputRejected for a text over the model's limit; nothing is cut here, and nothing was run then."""
        loop = asyncio.get_running_loop()
        tokenized = await loop.run_in_executor(self._threads, self._tokenize, texts)
        # Cancelling the call takes back what no thread has begun.
        vectors = await asyncio.gather(*(loop.run_in_executor(self._threads, self._infer, ids) for ids in tokenized))
        return ProviderAnswer(vectors, range(len(texts)), self._model.name, sum(map(len, tokenized)))

    async def list_models(self) -> Sequence[str]:
        return [self._model.name]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _tokenize(self, texts: Sequence[str]) -> list[Sequence[int]]:
        tokenized = [self._tokenizer.ids(text) for text in texts]
        if max(map(len, tokenized), default=0) > self._model.max_input_tokens:
            # With a status, so that the attempt's receipt says: answered, nothing billed.
            raise InputRejected("text_too_long", http_status=400)
        return tokenized

    def _infer(self, ids: Sequence[int]) -> Vector:
        tokens = np.array([ids], np.int64)
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens),
        }
        try:
            output = self._session.run(None, {name: feeds[name] for name in self._inputs})[0][0]
        except Exception as error:  # noqa: BLE001  (onnxruntime's classes share no base, and may quote input)
            failure = ProviderTransient(f"inference_{type(error).__name__.lower()}")
        else:
            vector: Vector = output.mean(axis=0) if output.ndim == 2 else output
            vector /= np.sqrt(vector @ vector)
            return vector
        raise failure

    def _check_output(self, model: ModelSpec) -> None:
        unknown = set(self._inputs) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown:
            raise SettingsError(
                f"EMBEDDING_LOCAL_MODEL_PATH: {model.name} wants inputs {sorted(unknown)}, not known here"
            )
        size = self._session.get_outputs()[0].shape[-1]
        if isinstance(size, int) and size != model.dimensions[0]:
            raise SettingsError(
                f"{model.name}: dimensions is {model.dimensions[0]} in the catalogue, but the model gives {size}"
            )
