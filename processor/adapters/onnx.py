"""EmbeddingProvider for a model on this machine: the ONNX export of a sentence-transformers model.

No network, no torch. The model runs off the event loop on a bounded number of threads, a few short texts or one long
one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from processor.adapters.local_calls import embed_in_pieces
from processor.adapters.local_files import SETTING, LocalFiles, Pooling
from processor.adapters.tokens import WordPiece
from processor.domain import EmbeddingFunction, ModelSpec
from processor.errors import SettingsError
from processor.ports import ProviderAnswer

PIECE_TOKENS = 160
"""Tokens that are run at once, padding included, when texts are shorter. Measured on 2 cores, MiniLM, in texts a second
of CPU: of 14 tokens 186 one by one, 296 eight at once; of 44 tokens 81 and 92 (four); of 137 tokens 28 one by one, 26
four at once, 19 sixteen at once."""
_PADDING = 1 / 8
"""Most of a text's own length that is added to it."""
_SAME = 1e-5
_TOKEN_OUTPUTS = ("last_hidden_state", "token_embeddings")
_PROBE_LENGTHS = (3, 8)


class LocalProvider:
    """Runs calls on `threads` threads (0: one per core). Billed tokens are those of the texts, special ones included.

    A call's texts are sorted by length and run in pieces of about PIECE_TOKENS, hardly padded. A model whose vectors
    depend on what else is run with them (quantised over the whole piece, without a mask) runs text by text.
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
        options.log_severity_level = 4  # what goes wrong is raised, and told by us
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(files.model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  (onnxruntime's classes share no base)
            raise SettingsError(f"{SETTING}: {files.model} can't be loaded: {type(error).__name__}") from None
        self._inputs = {put.name: np.int32 if "int32" in put.type else np.int64 for put in self._session.get_inputs()}
        self._output = self._choose_output(model)
        self._pooling = files.pooling
        self._model = model
        self._tokenizer = WordPiece(files.tokenizer)
        self._piece_tokens = PIECE_TOKENS if self._mixes_well() else 1
        count = threads or os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="local-model")

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
            threads=self._threads,
            pieces=lambda lengths: pieces(lengths, self._piece_tokens),
            run=lambda _, tokens: self._run(tokens),
        )

    async def list_models(self) -> Sequence[str]:
        return [self._model.name]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors of shape (n, d) of n texts that are run at once."""
        lengths = np.array([len(each) for each in tokens])
        ids = np.zeros((len(tokens), lengths.max()), np.int64)
        for row, each in zip(ids, tokens, strict=True):
            row[: len(each)] = each
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        given = {name: feeds[name].astype(kind) for name, kind in self._inputs.items()}
        output = self._session.run([self._output], given)[0].astype(np.float32, copy=False)
        vectors = pooled(output, mask, self._pooling) if output.ndim == 3 else output
        if self._model.normalised:
            lengths_of_vectors = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
            np.divide(vectors, lengths_of_vectors, out=vectors, where=lengths_of_vectors > 0)
        return vectors

    def _mixes_well(self) -> bool:
        """Whether texts of two lengths have the same vectors run at once as run alone."""
        texts = [[token % 7 + 1 for token in range(length)] for length in _PROBE_LENGTHS]
        try:
            alone = [self._run([each])[0] for each in texts]
        except Exception as error:  # noqa: BLE001  (onnxruntime's classes share no base)
            raise SettingsError(
                f"{SETTING}: {self._model.name} can't be run on a few tokens: {type(error).__name__}; export it anew"
            ) from None
        try:
            at_once = self._run(texts)
        except Exception:  # noqa: BLE001  (an export for one text at a time)
            return False
        return bool(np.abs(at_once - np.array(alone)).max() < _SAME)

    def _choose_output(self, model: ModelSpec) -> str:
        unknown = set(self._inputs) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown:
            raise SettingsError(f"{SETTING}: {model.name} wants inputs {sorted(unknown)}, not known here")
        outputs = {put.name: put.shape for put in self._session.get_outputs()}
        name = next((each for each in (*_TOKEN_OUTPUTS, "sentence_embedding") if each in outputs), next(iter(outputs)))
        size = outputs[name][-1]
        if isinstance(size, int) and size != model.dimensions[0]:
            raise SettingsError(
                f"{model.name}: dimensions is {model.dimensions[0]} in the catalogue, but the model gives {size}"
            )
        return name


def pieces(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of texts to run at once: near-equal lengths, at most `tokens` of them with padding, or one text alone."""
    piece: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if piece:
            shortest, longest = lengths[piece[0]], lengths[index]
            if (len(piece) + 1) * longest > tokens or longest > shortest * (1 + _PADDING) + 1:
                yield piece
                piece = []
        piece.append(index)
    if piece:
        yield piece


def pooled(output: NDArray[np.float32], mask: NDArray[np.bool_], pooling: Pooling) -> NDArray[np.float32]:
    """Texts' vectors (n, d) of their tokens' (n, length, d); `mask` (n, length) is false for padding, on the right."""
    lengths = mask.sum(axis=1)
    match pooling:
        case Pooling.CLS:
            vectors = output[:, 0]
        case Pooling.LAST:
            vectors = output[np.arange(len(output)), lengths - 1]
        case Pooling.MAX:
            vectors = np.where(mask[:, :, None], output, -np.inf).max(axis=1)
        case _:
            by = np.sqrt(lengths) if pooling is Pooling.MEAN_SQRT_LEN else lengths
            vectors = np.einsum("ntd,nt->nd", output, mask.astype(np.float32)) / by[:, None]
    return np.ascontiguousarray(vectors, np.float32)
