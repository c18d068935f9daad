"""What an error and the log may not tell."""

from __future__ import annotations

import traceback

import pytest


def assert_untold(secret: str, error: BaseException, log: pytest.LogCaptureFixture) -> None:
    """Neither the error, its traceback and attributes, nor the log quotes it, and no other error hangs on."""
    assert (error.__cause__, error.__context__) == (None, None)
    assert secret not in "".join(traceback.format_exception(error)) + repr(vars(error)) + log.text
