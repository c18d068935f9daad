"""Records with header names that are not UTF-8 are read like any others.

aiokafka's parser raises UnicodeDecodeError for such a name before there is a record, so that one record of a careless
producer would stop whoever reads its partition. Once met, its Python parser takes over for the life of the process,
given a buffer whose slices decode without an error.
"""

from __future__ import annotations

from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy


class _Buffer(bytearray):
    """What can't be decoded is written as `\\xNN`; nothing else about it differs."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return _Buffer(found) if isinstance(place, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]  # as below
    _buffer: bytearray

    def _read_msg(self, *arguments: Any) -> Any:
        if not isinstance(self._buffer, _Buffer):
            self._buffer = _Buffer(self._buffer)
        return super()._read_msg(*arguments)


class _Records(_MemoryRecordsPy):  # type: ignore[misc]  # its base is typed by a protocol only
    def next_batch(self, *arguments: Any) -> Any:
        next_slice = self._next_slice
        batch = super().next_batch(*arguments)
        of_ours = next_slice is not None and next_slice[self.MAGIC_OFFSET] >= 2
        return _Batch(next_slice) if batch is not None and of_ours else batch


def read_any_header_name() -> None:
    """From here on, in every consumer of this process."""
    fetcher.MemoryRecords = _Records
