"""The aggregator's state in one SQLite file: seen copies, totals, the ledger, task progress, documents, cursors.

Totals are acknowledged by the broker before a run is saved, and the Kafka offset is committed after; the file's own
next offset is the one that counts. So a transaction lost with the power (WAL with synchronous=NORMAL loses whole ones
from the end, and never tears one) only means that a run is folded again from where the file stands. Nothing waits
for the disk. Ids are kept as blobs: about 50 bytes for a usage event.
"""

# ruff: noqa: S608 - every name put into a statement is a constant of this file

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from processor.accounts import (
    Attempt,
    BucketKey,
    Cursor,
    DocumentKey,
    DocumentVectors,
    Ledger,
    Seen,
    TaskKey,
    TaskProgress,
    UsageSums,
    UsageTotal,
)
from processor.domain import CallOutcome
from processor.errors import StoreError, StoreTaken
from processor.ports import StoreChange

SCHEMA_VERSION = 2

SUMS = [field.name for field in fields(UsageSums)]
_SUM_VALUES = attrgetter(*SUMS)
OUTCOMES = (None, CallOutcome.OK, CallOutcome.INVALID, CallOutcome.FAILED)
"""An attempt's outcome by the number that is stored; 0: no receipt yet."""

BATCH = 500
"""Keys of one SELECT."""

SCHEMA = f"""
CREATE TABLE owner (token TEXT NOT NULL);
CREATE TABLE topics (topic TEXT PRIMARY KEY, partitions INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE cursors (
    topic TEXT, partition INTEGER, next_offset INTEGER NOT NULL, last_offset INTEGER NOT NULL,
    last_append_ms INTEGER NOT NULL, last_crc INTEGER NOT NULL, seen_only_until_ms INTEGER,
    PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE seen (
    partition INTEGER, request BLOB, offset INTEGER NOT NULL, last_ms INTEGER NOT NULL,
    PRIMARY KEY (partition, request)
) WITHOUT ROWID;
CREATE TABLE totals (
    bucket TEXT, partition INTEGER, last_offset INTEGER NOT NULL,
    {", ".join(f"{name} INTEGER NOT NULL" for name in SUMS)},
    PRIMARY KEY (bucket, partition)
) WITHOUT ROWID;
CREATE TABLE tasks (
    task TEXT PRIMARY KEY, done INTEGER NOT NULL, failed INTEGER NOT NULL, total INTEGER,
    updated_at_ms INTEGER NOT NULL, published INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX unpublished_tasks ON tasks (published) WHERE published = 0;
CREATE TABLE attempts (
    attempt BLOB PRIMARY KEY, last_ms INTEGER NOT NULL, confirm_by_ms INTEGER, estimated_tokens INTEGER NOT NULL,
    price INTEGER, outcome INTEGER NOT NULL, billed_tokens INTEGER NOT NULL, attributed_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX open_attempts ON attempts (outcome) WHERE outcome = 0 AND confirm_by_ms IS NOT NULL;
CREATE TABLE ledger ({", ".join(f"{name} INTEGER NOT NULL" for name in Ledger._fields)});
CREATE TABLE documents (
    document TEXT PRIMARY KEY, partition INTEGER NOT NULL, source_version TEXT NOT NULL, live BLOB NOT NULL, stale BLOB
);
CREATE INDEX stale_documents ON documents (partition) WHERE stale IS NOT NULL;
INSERT INTO owner VALUES ('');
INSERT INTO ledger VALUES ({", ".join("0" for _ in Ledger._fields)});
PRAGMA user_version = {SCHEMA_VERSION};
"""


class SqliteStore:
    """Implements `ports.AggregateStore` in the file at `path`, made when it is not there.

    `read_only` is for other processes that want to look: nothing is made, claimed or saved. Raises StoreError.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._token = ""
        if read_only and not path.exists():
            raise StoreError(f"EMBEDDING_AGGREGATOR_STORE: there is no {path}; start the aggregator first")
        with self._translated():
            self._db = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._open(read_only)
            except BaseException:
                self._db.close()
                raise

    def _open(self, read_only: bool) -> None:
        self._db.execute("PRAGMA busy_timeout = 5000")
        self._db.execute("PRAGMA cache_size = -65536")
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0 and not read_only:
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"EMBEDDING_AGGREGATOR_STORE: {self._path} has schema version {version}, this program needs "
                f"{SCHEMA_VERSION}: delete the file and start again, it is made anew from the topics"
            )

    def close(self) -> None:
        self._db.close()

    # --- who may write, and where the folds stand ---------------------------------------------------------

    def claim(self) -> None:
        self._token = secrets.token_hex(8)
        with self._translated():
            self._db.execute("UPDATE owner SET token = ?", (self._token,))

    def bind(self, topic: str, partitions: int) -> int:
        with self._translated():
            self._db.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", (topic, partitions))
        ((known,),) = self._rows("SELECT partitions FROM topics WHERE topic = ?", (topic,))
        return int(known)

    def cursor(self, topic: str, partition: int) -> Cursor | None:
        rows = self._rows(
            "SELECT next_offset, last_offset, last_append_ms, last_crc, seen_only_until_ms FROM cursors "
            "WHERE topic = ? AND partition = ?",
            (topic, partition),
        )
        return Cursor(*rows[0]) if rows else None

    def forget(self, topic: str, partition: int) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM cursors WHERE topic = ? AND partition = ?", (topic, partition))

    # --- reading ------------------------------------------------------------------------------------------

    def seen(self, partition: int, request_ids: Collection[str]) -> dict[str, Seen]:
        packed = {pack_id(request_id): request_id for request_id in request_ids}
        sql = "SELECT request, offset, last_ms FROM seen WHERE partition = ? AND request IN ({})"
        return {packed[request]: Seen(offset, ms) for request, offset, ms in self._lookup(sql, packed, partition)}

    def totals(self, keys: Collection[BucketKey]) -> dict[BucketKey, dict[int, tuple[int, UsageSums]]]:
        packed = {_text(key): key for key in keys}
        found: dict[BucketKey, dict[int, tuple[int, UsageSums]]] = {}
        sql = f"SELECT bucket, partition, last_offset, {', '.join(SUMS)} FROM totals WHERE bucket IN ({{}})"
        for bucket, partition, last_offset, *sums in self._lookup(sql, packed):
            found.setdefault(packed[bucket], {})[partition] = (
                last_offset,
                UsageSums(**dict(zip(SUMS, sums, strict=True))),
            )
        return found

    def payers(self, bucket: str) -> set[str]:
        of_all = _text(["", bucket, "all", ""])[len('[""') :]
        rows = self._rows("SELECT DISTINCT bucket FROM totals WHERE substr(bucket, ?) = ?", (-len(of_all), of_all))
        return {BucketKey(*json.loads(key)).payer_id for (key,) in rows}

    def counted(self, begins: Mapping[int, int]) -> dict[tuple[int, int], set[BucketKey]]:
        found: dict[tuple[int, int], set[BucketKey]] = {}
        sql = "SELECT partition, last_offset, bucket FROM totals WHERE (partition, last_offset) IN ({})"
        rows = self._rows(sql.format("SELECT partition, MAX(last_offset) FROM totals GROUP BY partition"))
        for place in begins.items():
            least = "SELECT partition, MIN(last_offset) FROM totals WHERE partition = ? AND last_offset >= ?"
            rows += self._rows(sql.format(least), place)
        for partition, last_offset, bucket in rows:
            found.setdefault((partition, last_offset), set()).add(BucketKey(*json.loads(bucket)))
        return found

    def tasks(self, keys: Collection[TaskKey]) -> dict[TaskKey, TaskProgress]:
        packed = [_text(key) for key in keys]
        sql = "SELECT task, done, failed, total, updated_at_ms FROM tasks WHERE task IN ({})"
        return dict(map(_task, self._lookup(sql, packed)))

    def unpublished_tasks(self) -> dict[TaskKey, TaskProgress]:
        sql = "SELECT task, done, failed, total, updated_at_ms FROM tasks WHERE published = 0"
        return dict(map(_task, self._rows(sql)))

    def attempts(self, attempt_ids: Collection[str]) -> dict[str, Attempt]:
        packed = {pack_id(attempt_id): attempt_id for attempt_id in attempt_ids}
        sql = f"SELECT attempt, {_ATTEMPT} FROM attempts WHERE attempt IN ({{}})"
        return {packed[attempt]: _attempt(row) for attempt, *row in self._lookup(sql, packed)}

    def open_attempts(self) -> list[Attempt]:
        sql = f"SELECT {_ATTEMPT} FROM attempts WHERE outcome = 0 AND confirm_by_ms IS NOT NULL"
        return [_attempt(row) for row in self._rows(sql)]

    def ledger(self) -> Ledger:
        (row,) = self._rows("SELECT * FROM ledger")
        return Ledger(*row)

    def documents(self, keys: Collection[DocumentKey]) -> dict[DocumentKey, DocumentVectors]:
        packed = [_text(key) for key in keys]
        sql = "SELECT document, source_version, live, stale FROM documents WHERE document IN ({})"
        return dict(map(_document, self._lookup(sql, packed)))

    def stale_documents(self, partition: int) -> dict[DocumentKey, DocumentVectors]:
        sql = "SELECT document, source_version, live, stale FROM documents WHERE partition = ? AND stale IS NOT NULL"
        return dict(map(_document, self._rows(sql, (partition,))))

    # --- writing ------------------------------------------------------------------------------------------

    def save(self, change: StoreChange) -> None:
        partition = change.partition
        with self._transaction():
            self._put("cursors", [(change.topic, partition, *change.cursor)])
            self._put("seen", [(partition, pack_id(request), *seen) for request, seen in change.seen.items()])
            self._put(
                "totals",
                [
                    (
                        _text(total.key),
                        partition,
                        total.partitions[partition][0],
                        *_SUM_VALUES(total.partitions[partition][1]),
                    )
                    for total in change.totals
                ],
            )
            self._put(
                "tasks",
                [
                    (_text(key), task.done, task.failed, task.total, task.updated_at_ms, change.tasks_published)
                    for key, task in change.tasks.items()
                ],
            )
            self._put(
                "attempts", [_attempt_row(attempt_id, attempt) for attempt_id, attempt in change.attempts.items()]
            )
            self._put(
                "documents",
                [
                    (
                        _text(key),
                        partition,
                        document.source_version,
                        _joined(document.live),
                        _joined(document.stale) or None,
                    )
                    for key, document in change.documents.items()
                ],
            )
            if change.ledger is not None:
                self._save_ledger(change.ledger)

    def merge_totals(self, totals: Sequence[UsageTotal]) -> None:
        rows = [
            (_text(total.key), partition, last_offset, *_SUM_VALUES(sums))
            for total in totals
            for partition, (last_offset, sums) in total.partitions.items()
        ]
        names = ["last_offset", *SUMS]
        marks = ", ".join("?" for _ in range(2 + len(names)))
        sql = (
            f"INSERT INTO totals VALUES ({marks}) ON CONFLICT (bucket, partition) DO UPDATE SET "
            f"{', '.join(f'{name} = excluded.{name}' for name in names)} WHERE excluded.last_offset > last_offset"
        )
        with self._transaction():
            self._db.executemany(sql, rows)

    def forget_totals(self, keys: Collection[BucketKey]) -> None:
        if keys:
            with self._transaction():
                self._db.executemany("DELETE FROM totals WHERE bucket = ?", [(_text(key),) for key in keys])

    def prune(
        self,
        *,
        seen_before_ms: Mapping[int, int],
        before_ms: int,
        part: int,
        parts: int,
        close: Callable[[Ledger, Collection[Attempt]], Ledger],
    ) -> int:
        low, high = bytes([part * 256 // parts]), bytes([(part + 1) * 256 // parts - 1]) + b"\xff" * 64
        dropped = 0
        with self._transaction():
            for partition, ms in seen_before_ms.items():
                dropped += self._db.execute(
                    "DELETE FROM seen WHERE partition = ? AND request BETWEEN ? AND ? AND last_ms < ?",
                    (partition, low, high, ms),
                ).rowcount
            old = "FROM attempts WHERE attempt BETWEEN ? AND ? AND last_ms < ?"
            rows = self._db.execute(f"SELECT {_ATTEMPT} {old}", (low, high, before_ms)).fetchall()
            if rows:
                self._save_ledger(close(self.ledger(), [_attempt(row) for row in rows]))
                dropped += self._db.execute(f"DELETE {old}", (low, high, before_ms)).rowcount
            if part == 0:
                dropped += self._db.execute("DELETE FROM tasks WHERE updated_at_ms < ?", (before_ms,)).rowcount
        return dropped

    def _save_ledger(self, ledger: Ledger) -> None:
        self._db.execute(f"UPDATE ledger SET {', '.join(f'{name} = ?' for name in ledger._fields)}", ledger)

    # --- SQLite -------------------------------------------------------------------------------------------

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._translated():
            return self._db.execute(sql, values).fetchall()

    def _lookup(self, sql: str, keys: Iterable[str | bytes], *values: Any) -> Iterator[Any]:
        """Rows whose key is one of these; `{}` in the statement stands for their places, after the other values'."""
        wanted = list(keys)
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            yield from self._rows(sql.format(", ".join("?" for _ in batch)), (*values, *batch))

    def _put(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            marks = ", ".join("?" for _ in rows[0])
            self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                # A frozen process that wakes up after another has taken the store over must not write into it.
                if self._db.execute("SELECT token FROM owner").fetchone() != (self._token,):
                    raise StoreTaken(
                        f"EMBEDDING_AGGREGATOR_STORE: another process has claimed {self._path}: aggregators of two "
                        "groups need a file each"
                    )
                yield
            except BaseException:
                if self._db.in_transaction:  # some errors have ended it already
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            cause = getattr(error, "sqlite_errorname", "closed")
            raise StoreError(
                f"EMBEDDING_AGGREGATOR_STORE: {self._path} can't be used ({cause}): free the disk or fix its rights; "
                "if it is damaged, delete it and start again, it is made anew from the topics"
            ) from error


_ATTEMPT = "last_ms, confirm_by_ms, estimated_tokens, price, outcome, billed_tokens, attributed_tokens"


def _attempt(row: Sequence[Any]) -> Attempt:
    attempt = Attempt(*row)
    return attempt._replace(outcome=OUTCOMES[row[4]])


def _attempt_row(attempt_id: str, attempt: Attempt) -> tuple[Any, ...]:
    return (pack_id(attempt_id), *attempt[:4], OUTCOMES.index(attempt.outcome), *attempt[5:])


def _task(row: Sequence[Any]) -> tuple[TaskKey, TaskProgress]:
    task, done, failed, total, updated_at_ms = row
    key = TaskKey(*json.loads(task))
    progress = TaskProgress(**key._asdict(), done=done, failed=failed, total=total, updated_at_ms=updated_at_ms)
    return key, progress


def _document(row: Sequence[Any]) -> tuple[DocumentKey, DocumentVectors]:
    document, source_version, live, stale = row
    return DocumentKey(*json.loads(document)), DocumentVectors(source_version, _split(live), _split(stale or b""))


def _joined(vector_ids: Collection[bytes]) -> bytes:
    return b"".join(sorted(vector_ids))


def _split(joined: bytes) -> frozenset[bytes]:
    return frozenset(joined[start : start + 16] for start in range(0, len(joined), 16))


def _text(key: Sequence[str | None]) -> str:
    """A composite key as one column that can be read and looked up: a JSON array."""
    return _as_json(key)


_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def pack_id(text: str) -> bytes:
    """A UUID in its usual spelling as its 16 bytes; any other text as more than 16, so no two ids share a blob."""
    if len(text) == 36 and text[8:24:5] == "----":
        digits = text.replace("-", "")
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            pass
        else:
            if raw.hex() == digits and len(raw) == 16:
                return raw
    return b"\0" * 17 + text.encode()
