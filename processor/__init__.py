"""Embedding stream processor: Avro chunk events in, vectors and an exact bill out.

Reading map: `pipeline.py` first (the eight steps of a record), then `domain.py` (the nouns), `ports.py` (what the steps
need from outside), `adapters/` (who provides it) and `app.py` (how they are put together). `client/` is what other
services import.
"""
