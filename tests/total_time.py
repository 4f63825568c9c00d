"""A pytest plugin for scripts/test: the last words before pytest's own summary line."""

from __future__ import annotations

import os
import time

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how long all checks took together and which of those before the tests failed."""
    started = os.environ.get("BATON_TEST_STARTED")
    if started:
        terminalreporter.write_line(f"all checks took {time.time() - float(started):.0f} s")
    failed = os.environ.get("BATON_FAILED_CHECKS")
    if failed:
        terminalreporter.write_line(f"FAILED before the tests: {failed}", red=True)
