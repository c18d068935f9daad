"""Whether faust and aiokafka run their compiled parts: without a word they fall back to Python.

Without aiokafka's a record costs four times the CPU (234 us instead of 60, d=8, medians of three rounds). Without
faust's it costs the same as long as faust sees runs instead of records.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiokafka.record import default_records, memory_records, util
from faust import streams
from faust.transport import conductor

FIX = "install wheels built for this platform, and unset NO_CYTHON and AIOKAFKA_NO_EXTENSIONS"


def loaded() -> Mapping[str, bool]:
    """By the part that has a compiled twin; all True is as it should be."""
    return {
        "faust_streams": streams._CStreamIterator is not None,  # type: ignore[attr-defined]  # not exported
        "faust_conductor": conductor.ConductorHandler is not None,  # type: ignore[attr-defined]  # not exported
        "aiokafka_record_batches": default_records.DefaultRecordBatch is not default_records._DefaultRecordBatchPy,
        "aiokafka_memory_records": memory_records.MemoryRecords is not memory_records._MemoryRecordsPy,
        "aiokafka_crc32c": util.calc_crc32c is not util.calc_crc32c_py,
    }
