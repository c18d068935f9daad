"""Cuts text into chunks: paragraphs while they fit, then sentences, then words. Simple on purpose; bring your own."""

from __future__ import annotations

import re
from collections.abc import Iterator

PARAGRAPH_END = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")
BLANKS = re.compile(r"\s+")


def split_text(text: str, *, max_characters: int, overlap_characters: int = 0) -> list[str]:
    """Chunks of at most `max_characters` with single blanks inside, in order; blank text gives none.

    With an overlap each chunk but the first begins with the last whole words of the one before, up to that many
    characters; the overlap must stay below half of `max_characters`.
    """
    if not 0 <= 2 * overlap_characters < max_characters:
        raise ValueError("overlap_characters: must not be negative and stay below half of max_characters")
    room = max_characters - overlap_characters - bool(overlap_characters)
    bodies: list[str] = []
    for piece, starts_paragraph in _pieces(text, room):
        joined = f"{bodies[-1]} {piece}" if bodies else piece
        if bodies and len(joined) <= room and not (starts_paragraph and len(bodies[-1]) > room // 2):
            bodies[-1] = joined
        else:
            bodies.append(piece)
    if not bodies or not overlap_characters:
        return bodies
    overlaps = ["", *(_last_words(body, overlap_characters) for body in bodies[:-1])]
    return [f"{overlap} {body}".strip() for overlap, body in zip(overlaps, bodies, strict=True)]


def _pieces(text: str, room: int) -> Iterator[tuple[str, bool]]:
    """Paragraphs that fit, sentences of those that don't, words of longer ones; and whether a paragraph starts."""
    for paragraph in PARAGRAPH_END.split(text):
        whole = BLANKS.sub(" ", paragraph).strip()
        pieces = [whole] if len(whole) <= room else [p for s in SENTENCE_END.split(whole) for p in _words(s, room)]
        for place, piece in enumerate(filter(None, pieces)):
            yield piece, place == 0


def _words(sentence: str, room: int) -> Iterator[str]:
    while len(sentence) > room:
        cut = sentence.rfind(" ", 0, room + 1)
        cut = cut if cut > 0 else room
        yield sentence[:cut].rstrip()
        sentence = sentence[cut:].lstrip()
    yield sentence


def _last_words(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    tail = text[-characters:]
    if text[-characters - 1] != " ":
        _, _, tail = tail.partition(" ")
    return tail.strip()
