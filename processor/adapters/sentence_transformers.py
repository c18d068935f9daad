"""EmbeddingProvider for a model on this machine, run by sentence-transformers: on a GPU, or a kind that ONNX lacks.

The package brings torch, gigabytes of it; the model is read from a directory, never downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from processor.adapters.local_calls import embed_in_pieces
from processor.adapters.local_files import SETTING, LocalFiles
from processor.adapters.tokens import WordPiece
from processor.domain import EmbeddingFunction, ModelSpec
from processor.errors import SettingsError
from processor.ports import ProviderAnswer

PIECE_TEXTS = 32
"""Texts that are run at once, of near-equal lengths; a cancelled call holds the model for no more than these."""


class SentenceTransformersProvider:
    """Runs one piece of a call after the other, off the event loop; torch spreads each over `threads` (0: its choice).

    Billed tokens are those of the texts, special ones included.
    """

    name = "sentence-transformers"

    def __init__(self, files: LocalFiles, model: ModelSpec, *, device: str = "cpu", threads: int = 0) -> None:
        try:
            import torch
            import transformers
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise SettingsError(
                f"EMBEDDING_PROVIDER: sentence-transformers needs {error.name}, "
                "pip install 'embedding-processor[sentence-transformers]'"
            ) from None
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        try:
            self._encoder: Any = SentenceTransformer(str(files.model), device=device, local_files_only=True)
        except Exception as error:  # noqa: BLE001  (whatever loading a model and a device may raise)
            raise SettingsError(
                f"{SETTING}: {files.model} can't be loaded on EMBEDDING_LOCAL_DEVICE {device}: {type(error).__name__}"
            ) from None
        # Prefixes are the catalogue's, and whatever is too long was refused before: nothing is added or cut in there.
        self._encoder.default_prompt_name = None
        self._encoder.max_seq_length = model.max_input_tokens
        self._encoder.tokenizer.split_special_tokens = True  # "[SEP]" in a text is ordinary text
        self._tokenizer = WordPiece(files.tokenizer)
        self._model = model
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-model")
        try:
            size = len(self._encode(["size"])[0])
        except Exception as error:  # noqa: BLE001  (torch's classes share no base)
            raise SettingsError(
                f"{SETTING}: {files.model} can't be run on EMBEDDING_LOCAL_DEVICE {device}: {type(error).__name__}"
            ) from None
        if size != model.dimensions[0]:
            raise SettingsError(
                f"{model.name}: dimensions is {model.dimensions[0]} in the catalogue, but the model gives {size}"
            )

    async def embed(
        self,
        texts: Sequence[str],
        function: EmbeddingFunction,  # noqa: ARG002  (there is one model)
        attempt_id: str,  # noqa: ARG002  (there is nobody to tell it to)
    ) -> ProviderAnswer:
        """InputRejected for a text over the model's limit; nothing is cut here, and nothing was run then."""
        return await embed_in_pieces(
            texts,
            self._model,
            tokenizer=self._tokenizer,
            threads=self._thread,
            pieces=_pieces,
            run=lambda texts, _: self._encode(texts),
        )

    async def list_models(self) -> Sequence[str]:
        return [self._model.name]

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors (n, d) of n texts that are run at once."""
        found = self._encoder.encode(
            list(texts),
            batch_size=len(texts),
            normalize_embeddings=self._model.normalised,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(found, np.float32)


def _pieces(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts to run at once, of near-equal lengths."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(by_length), PIECE_TEXTS):
        yield by_length[start : start + PIECE_TEXTS]
