"""`./run bench NAME [--json]`: run one benchmark of this folder; the last line on standard output is its figures."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import pkgutil
import sys

from tests import benchmarks


def main() -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__")
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("name", choices=names)
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else on standard output")
    arguments = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a topic just made has no leader yet: it tries again
    module = importlib.import_module(f"tests.benchmarks.{arguments.name}")
    figures = asyncio.run(module.run(lambda line: print(line, file=sys.stderr, flush=True)))
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:32} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
