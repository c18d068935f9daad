"""Reads the YAML files that settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from processor.errors import SettingsError


class _Twice(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice in one mapping, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[tuple[str, str]] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode):
                if (name.tag, name.value) in names:
                    raise _Twice(problem=f"has {name.value} twice", problem_mark=name.start_mark)
                names.add((name.tag, name.value))
        return node


def read_yaml(path: Path, setting: str) -> Any:
    """The file's content. SettingsError by `setting` and path when it can't be read or is no YAML."""
    try:
        with path.open("rb") as file:
            content = yaml.load(file, _Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise SettingsError(f"{setting}: {path}: can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 31st of February, 5,000 digits
        what = error.problem if isinstance(error, _Twice) else "is no YAML"
        mark = getattr(error, "problem_mark", None)
        raise SettingsError(f"{setting}: {path}: {what}{f', line {mark.line + 1}' if mark else ''}") from None
    return content
