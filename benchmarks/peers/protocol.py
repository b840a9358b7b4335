"""A side of the comparison is a process that answers commands, one at a time, in lines of JSON. Standard library only.

So both sides keep their models and whatever they have warmed up, and take turns: only one of them computes at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Answer = dict[str, Any]

LINES_OF_AN_ERROR = 15


def serve(handlers: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer commands from standard input until it ends. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            command = json.loads(line)
            answer = handlers[command.pop("do")](**command)
            print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The process of one side. It ends with the `with` block."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """log: gets what the process prints."""
        self.name, self._log = name, log
        with open(log, "w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=dict(environment), text=True
            )

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Raises SystemExit with the end of its log if the process has ended."""
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-LINES_OF_AN_ERROR:])
            raise SystemExit(f"{self.name} ended at {do!r} with exit code {code}; {self._log} ends with:\n{end}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
