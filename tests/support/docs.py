"""The generated pages of docs/: `python -m tests.support.docs` writes them, a test holds them to what they describe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from processor.adapters.schemas import schema_directory
from processor.adapters.topics import REQUEST_TOPICS, Topic, topics
from processor.metrics import METRICS
from tests.unit.test_bad_input import BAD_CHUNKS, DEAD, ODD_TEXTS, REFUSED

DOCS = Path(__file__).parents[2] / "docs"
MADE_BY = "<!-- Made by `python -m tests.support.docs`; change the source it names, then run that. -->"
UNITS_MS = ((86_400_000, "day"), (3_600_000, "hour"), (60_000, "minute"))


TOPICS_INTRO = (
    "Made from `schemas/topics.yaml` and `schemas/*.avsc`. `embedding-processor topics create` makes the topics; "
    "`topics check` and every start compare them with this. Names get EMBEDDING_TOPIC_PREFIX put before them. "
    "How a record begins on the wire, and how schemas change: [schemas/README.md](../schemas/README.md)."
)
KEYS = (
    "A partition is Java's murmur2 of the key, `& 0x7fffffff`, `% partitions`: a topic with keys must not grow. "
    'A key of several ids is a JSON array of strings and nulls without blanks: `["acme",null,"doc-1"]`.'
)
METRICS_INTRO = (
    "Made from `processor/metrics.py`. Every worker and aggregator serves them on its internal port "
    "(EMBEDDING_HTTP_PORT) at `/metrics`. No label holds an id, a tenant or a text. Counters are read by rate; nothing "
    "resets them but a restart. The words in the labels: [words.md](words.md)."
)
BAD_INPUT_INTRO = (
    "Each kind of bad input has one outcome. It never stops the stream and never touches its neighbours: the tests "
    "named here send it beside good ones. The client library refuses most of it before anything is sent. "
    "Made from the cases of `tests/unit/test_bad_input.py`; what the codes and classes mean: [words.md](words.md)."
)
REFUSED_INTRO = (
    "One error result with chunk_index -1 stands for all chunks of the request; its message names field and fix. "
    "Nothing is embedded. A request of an embedding action has a usage event of zero. "
    "Test: `tests/unit/test_bad_input.py::test_a_refused_request_names_code_and_field_and_spares_its_neighbours`."
)
DEAD_INTRO = (
    "The record goes to `embedding-requests-dlq` with its key and bytes untouched, and headers that say what was wrong "
    "and where it stood; one over EMBEDDING_MAX_RECORD_BYTES goes without its bytes. Nobody can be answered: whoever "
    "awaits a reply times out. Test: "
    "`tests/unit/test_bad_input.py::test_what_is_no_request_becomes_a_dead_letter_and_spares_its_neighbours`."
)
CHUNK_INTRO = (
    "The chunk has an error result of its own and counts as failed on the usage event; the other chunks of the request "
    "are answered. Test: `tests/unit/test_bad_input.py::test_a_bad_chunk_fails_alone`."
)
ODD_INTRO = (
    "These are embedded as they are. Test: `tests/unit/test_bad_input.py::test_odd_texts_are_texts_like_any_other`."
)
LONE_SURROGATE = (
    "A lone surrogate is no UTF-8: the client library refuses it, and on the wire it is `undecodable` (above). "
    "Tests: `tests/unit/test_avro_frames.py::test_lone_surrogates_are_no_text`."
)
ELSEWHERE = (
    (
        "a request that ends every process that reads it",
        "`lethal`: a dead letter without its bytes, uncharged",
        "tests/unit/test_pipeline.py::test_a_lethal_record_is_buried_unread_and_uncharged",
    ),
    (
        "a schema that would crash a decoder: recursive, zero-width `fixed`, `array<null>`, a huge decimal",
        "`unknown_schema`: only our own schemas, known by fingerprint, are ever used",
        "tests/unit/test_avro_frames.py::test_records_of_crashing_schemas_end_as_unknown_schema",
    ),
    (
        "a list that claims more items than there are bytes",
        "`undecodable`, and nothing is allocated",
        "tests/unit/test_avro_frames.py::test_a_huge_count_allocates_nothing",
    ),
    (
        "any random bytes, any flipped bit",
        "a dead letter or another valid request; never an exception",
        "tests/unit/test_avro_frames.py::test_a_flipped_bit_never_raises",
    ),
    (
        "a batch, a delete or a manifest on the query topic",
        "`wrong_lane`, field `action`",
        "tests/unit/test_bad_input.py::test_the_interactive_lane_refuses_what_is_not_interactive",
    ),
    (
        "a delete or a manifest where EMBEDDING_SINK_VIEW is off",
        "`sink_view_off`, field `action`",
        "tests/unit/test_bad_input.py::test_a_delete_without_a_sink_view_says_so",
    ),
)


def pages() -> Mapping[str, str]:
    """File name in docs/ -> its text."""
    return {
        "topics.md": _page("Topics and their fields", *_topics()),
        "metrics.md": _page("Metrics", METRICS_INTRO, _metrics()),
        "bad-input.md": _page("Bad input", *_bad_input()),
    }


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", MADE_BY, *parts]) + "\n"


def _topics() -> Iterator[str]:
    described = topics().values()
    yield TOPICS_INTRO
    overview = [
        (f"[`{topic.name}`](#{topic.name})", topic.key, _linked(topic.value), topic.partitions, kept(topic))
        for topic in described
    ]
    yield table(("topic", "key", "value", "partitions", "kept"), overview)
    yield KEYS
    for topic in described:
        settings = ", ".join(f"`{name}={value}`" for name, value in topic.config.items())
        yield f"## {topic.name}"
        yield topic.doc
        yield f"Written by: {topic.owner}. Read by: {', '.join(readers(topic))}. Value: {_linked(topic.value)}."
        yield f"Set: {settings}."
    for path in sorted(schema_directory().glob("*.v*.avsc"), key=_version):
        schema = json.loads(path.read_text(encoding="utf-8"))
        if path == newest(schema["name"]):
            rows = [(f"`{name}`", type_, default, doc) for name, type_, default, doc in fields(schema)]
            yield f"## {schema['name']}"
            yield schema["doc"]
            yield table(("field", "type", "default", "meaning"), rows)


def _metrics() -> str:
    rows = [
        (
            f"`embedding_{metric.name}{'_total' if metric.kind == 'counter' else ''}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.help,
        )
        for metric in METRICS
    ]
    return table(("metric", "kind", "labels", "meaning"), rows)


def _bad_input() -> Iterator[str]:
    yield BAD_INPUT_INTRO
    yield "## Refused as a whole"
    yield REFUSED_INTRO
    refused = [(name, f"`{code}`", f"`{field}`") for name, (_, code, field) in REFUSED.items()]
    yield table(("input", "error code", "field"), refused)
    yield "## No request at all"
    yield DEAD_INTRO
    yield table(("input", "class"), [(name, f"`{reason}`") for name, (_, reason) in DEAD.items()])
    yield "## One chunk"
    yield CHUNK_INTRO
    yield table(("input", "error code"), [(name, f"`{code}`") for name, _, _, code in BAD_CHUNKS])
    yield "## Texts like any other"
    yield ODD_INTRO
    yield ", ".join(f"`{text!a}`" for text in ODD_TEXTS) + "."
    yield LONE_SURROGATE
    yield "## Elsewhere"
    yield table(("input", "outcome", "test"), [(what, outcome, f"`{test}`") for what, outcome, test in ELSEWHERE])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def kept(topic: Topic) -> str:
    """How long a record stays, in words."""
    if topic.config["cleanup.policy"] == "compact":
        lag = topic.config.get("min.compaction.lag.ms")
        return "newest of each key" + (f"; the others {duration(int(lag))} at least" if lag else "")
    return duration(int(topic.config["retention.ms"]))


def duration(milliseconds: int) -> str:
    unit_ms, unit = next(each for each in UNITS_MS if milliseconds % each[0] == 0)
    count = milliseconds // unit_ms
    return f"{count} {unit}{'' if count == 1 else 's'}"


def readers(topic: Topic) -> list[str]:
    if topic.id in REQUEST_TOPICS:
        return ["worker"]
    return [
        *(["worker"] if topic.id == "budgets" else []),
        *(["aggregator"] if topic.id in {"usage", "calls", "documents", "totals", "budgets"} else []),
        "yours",
    ]


def newest(name: str) -> Path:
    return max(schema_directory().glob(f"{name}.v*.avsc"), key=_version)


def fields(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, doc) of every field, those of nested records after their holder."""
    for field in record["fields"]:
        name = prefix + field["name"]
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        yield name, type_of(field["type"]), default, field["doc"]
        inner, mark = field["type"], ""
        if isinstance(inner, list):
            inner = next(branch for branch in inner if branch != "null")
        if isinstance(inner, dict) and inner["type"] == "array":
            inner, mark = inner["items"], "[]"
        if isinstance(inner, dict) and inner["type"] == "record":
            yield from fields(inner, f"{name}{mark}.")


def type_of(schema: Any) -> str:
    if isinstance(schema, list):
        return " or ".join(type_of(branch) for branch in schema if branch != "null") + " or null"
    if isinstance(schema, str):
        return schema
    match schema["type"]:
        case "array":
            return f"array of {type_of(schema['items'])}"
        case "map":
            return f"map of {type_of(schema['values'])}"
        case "record":
            return str(schema["name"])
        case other:
            return type_of(other)


def _version(path: Path) -> tuple[str, int]:
    name, version, _ = path.name.split(".")
    return name, int(version.removeprefix("v"))


def _linked(value: str) -> str:
    name = value.split(",", maxsplit=1)[0]
    return f"[`{name}`](#{name.lower()}){value[len(name) :]}" if name.isidentifier() else value


if __name__ == "__main__":
    for file_name, text in pages().items():
        (DOCS / file_name).write_text(text, encoding="utf-8")
