"""The stream engine on Faust: the only part that knows faust and mode. Read engine.py, consumer.py, thread.py."""

from processor.adapters.faust_engine.engine import Engine

__all__ = ["Engine"]
