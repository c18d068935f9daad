"""Reads the YAML files that settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from processor.errors import SettingsError


def read_yaml(path: Path, setting: str) -> Any:
    """The file's content. SettingsError by `setting` and path when it can't be read or is no YAML."""
    try:
        with path.open("rb") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise SettingsError(f"{setting}: {path}: can't be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SettingsError(f"{setting}: {path}: is no YAML{f', line {mark.line + 1}' if mark else ''}") from None
    return content
