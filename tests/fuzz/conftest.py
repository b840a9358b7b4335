from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing import Fuzz, minutes, table


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """Tries the inputs of a strategy on a check; see `Fuzz.__call__`."""
    fuzzers = [item for item in request.session.items if "fuzz" in getattr(item, "fixturenames", ())]
    return Fuzz(request.node.name.removeprefix("test_"), 60 * minutes() / len(fuzzers))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if minutes():
        terminalreporter.write_line("\n".join(["", *table()]))
