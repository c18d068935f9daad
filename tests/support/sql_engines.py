"""SQL engines for rows of `token_usage`: PostgreSQL, ClickHouse, and DuckDB for BigQuery.

Each is a context manager that gives a function `(statements, rows) -> rows of the last statement`, as text by column.
The first statement makes the table; nothing of it is left afterwards.
"""

from __future__ import annotations

import csv
import io
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Rows = list[dict[str, str]]
Run = Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Rows]


class EngineMissing(Exception):
    """This machine has no such engine; the message says what to install."""


@contextmanager
def postgresql() -> Iterator[Run]:
    """A server of its own in a temporary directory, by another user than root, which it refuses."""
    found = shutil.which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None or shutil.which("psql") is None:
        raise EngineMissing("PostgreSQL (Debian, Ubuntu: apt-get install postgresql)")
    binaries = Path(found).resolve().parent
    as_user: dict[str, Any] = {}
    # Where nobody may go too, and short: the path of a socket holds 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        place = f"{folder}/data"

        def call(program: str, *arguments: str) -> None:
            subprocess.run(
                [binaries / program, *arguments],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                timeout=60,
                **as_user,
            )

        call("initdb", "-D", place, "-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8", "--no-locale")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        call("pg_ctl", "-D", place, "-l", f"{folder}/log", "-w", "-s", "-o", options, "start")
        try:
            yield lambda statements, rows: _psql(folder, statements, rows)
        finally:
            call("pg_ctl", "-D", place, "-m", "immediate", "-s", "stop")


def _psql(folder: str, statements: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Rows:
    table, *others = statements
    load = f"COPY token_usage ({', '.join(rows[0])}) FROM STDIN WITH (FORMAT csv, NULL '\\N');\n{_csv(rows)}\\.\n"
    script = "\n".join(["BEGIN;", table, load, *others, "ROLLBACK;"])
    options = ["-h", folder, "-U", "tests", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-X", "-q", "--csv", "-f", "-"]
    done = subprocess.run(["psql", *options], input=script, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout)))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Without a head; every value in quotes but null, which is \\N."""
    quoted = [
        ["\\N" if value is None else '"' + str(value).replace('"', '""') + '"' for value in row.values()]
        for row in rows
    ]
    return "".join(",".join(row) + "\n" for row in quoted)


@contextmanager
def clickhouse() -> Iterator[Run]:
    """In this process, by chdb: half a gigabyte, so in no lock of ours."""
    try:
        from chdb.session import Session
    except ImportError:
        raise EngineMissing("ClickHouse in a package (pip install chdb)") from None

    def run(statements: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Rows:
        table, *others, query = statements
        session = Session()
        try:
            session.query(table)
            session.query(f"INSERT INTO token_usage ({', '.join(rows[0])}) FORMAT CSV\n{_csv(rows)}")
            for statement in others:
                session.query(statement)
            return list(csv.DictReader(io.StringIO(str(session.query(query.rstrip().rstrip(";"), "CSVWithNames")))))
        finally:
            session.close()

    yield run


@contextmanager
def bigquery_on_duckdb() -> Iterator[Run]:
    """BigQuery has no engine to be had: sqlglot must parse its SQL, and what it becomes runs on DuckDB."""
    import duckdb
    import sqlglot

    def run(statements: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Rows:
        with tempfile.TemporaryDirectory() as folder, duckdb.connect(config={"threads": 1}) as database:
            landed = Path(folder) / "landed.csv"
            for number, statement in enumerate(statements):
                [translated] = sqlglot.transpile(statement, read="bigquery", write="duckdb")
                answer = database.execute(translated)
                if number == 0:
                    landed.write_text(_csv(rows), encoding="utf-8")
                    database.execute(rf"COPY token_usage FROM '{landed}' (FORMAT csv, NULL '\N', HEADER false)")
            names = [column[0] for column in answer.description or ()]
            return [dict(zip(names, map(str, row), strict=True)) for row in answer.fetchall()]

    yield run


ENGINES: Mapping[str, Callable[[], AbstractContextManager[Run]]] = {
    "PostgreSQL": postgresql,
    "ClickHouse": clickhouse,
    "BigQuery": bigquery_on_duckdb,
}
