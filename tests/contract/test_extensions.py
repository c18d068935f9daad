"""The compiled parts of faust and aiokafka: in use where the tests run, and missed when they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHOW = "import json; from processor.adapters.faust_engine import extensions; print(json.dumps(extensions.loaded()))"


def loaded(**environment: str) -> dict[str, bool]:
    """As a new process with these variables sees it."""
    own = {name: value for name, value in os.environ.items() if name not in {"NO_CYTHON", "AIOKAFKA_NO_EXTENSIONS"}}
    run = subprocess.run([sys.executable, "-c", SHOW], env=own | environment, capture_output=True, check=True)
    found: dict[str, bool] = json.loads(run.stdout)
    return found


def test_every_compiled_part_is_in_use() -> None:
    """A wheel without them, or a release that names them otherwise, is noticed before a worker is slow."""
    assert set(loaded().values()) == {True}


@pytest.mark.parametrize("variable, prefix", [("NO_CYTHON", "faust_"), ("AIOKAFKA_NO_EXTENSIONS", "aiokafka_")])
def test_a_part_that_falls_back_to_python_is_told(variable: str, prefix: str) -> None:
    """Exactly those of the library whose extensions are switched off."""
    slow = {name for name, there in loaded(**{variable: "1"}).items() if not there}
    assert slow
    assert slow == {name for name in loaded() if name.startswith(prefix)}
