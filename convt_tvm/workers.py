"""Processes that stay alive, do one job after the other, and may crash or hang without harm.

A job and its answer are lines of JSON on the process's stdin and stdout. What a worker prints goes to its stderr,
whose end becomes part of the cause when it dies.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Answer", "Worker", "serve", "work_through"]

_PR_SET_PDEATHSIG = 1
_LONGEST_CAUSE = 400


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a job: a value, or why there is none.

    ``failed`` is an exception in the worker, after which it lives on; ``crashed`` and ``timed_out`` are its end, and
    the next job finds a new one.
    """

    status: Literal["ok", "failed", "crashed", "timed_out"]
    value: Any = None
    error: str = ""


class Worker:
    """A process of ``python -m <module> <arguments>`` that runs `serve`.

    It is started by its first job, and again by the next one after its end. It runs in a session of its own, out of
    reach of the terminal's interrupts, and dies with the thread that made it.
    """

    def __init__(
        self, module: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        # It imports this package from where this process did, and never what lies in the current directory.
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        places = str(Path(__file__).parents[1]), self._environment.get("PYTHONPATH", "")
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._received = b""

    def start(self) -> None:
        """Start the process if there is none."""
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- open as long as the process lives
            self._received = b""
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment,
                start_new_session=True,
            )

    def fileno(self) -> int:
        """The descriptor that becomes readable with the answer."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, job: Any) -> None:
        """Give the worker a job; it must not have one already."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        # A worker that has died since its last job shows when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> Answer | None:
        """The answer, or None if it is not complete; call when `fileno` is readable."""
        chunk = os.read(self.fileno(), 1 << 16)
        if not chunk:
            return Answer("crashed", error=self._bury())
        self._received += chunk
        if not self._received.endswith(b"\n"):
            return None
        line, self._received = self._received, b""
        values = json.loads(line)
        return Answer("failed", error=values["error"]) if "error" in values else Answer("ok", values["value"])

    def ask(self, job: Any, timeout_secs: float) -> Answer:
        """Give the worker a job and wait for the answer; a worker that takes longer is killed."""
        return next(work_through([self], [job], timeout_secs))[1]

    def kill(self) -> str:
        """End the process at once, and return the end of what it printed; harmless if there is none."""
        if self._process is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._bury()

    def _bury(self) -> str:
        """Wait for the process's end and describe it."""
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        code = self._process.wait()
        self._process = None
        self._log.seek(0)
        printed = " ".join(self._log.read()[-4 * _LONGEST_CAUSE :].decode(errors="replace").split())[-_LONGEST_CAUSE:]
        self._log.close()
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{end}; {printed}" if printed else end


def work_through(workers: Sequence[Worker], jobs: Sequence[Any], timeout_secs: float) -> Iterator[tuple[int, Answer]]:
    """Number and answer of each job, as they come in; each worker has one job at a time."""
    waiting, idle = deque(enumerate(jobs)), list(workers)
    busy: dict[Worker, tuple[int, float]] = {}
    while waiting or busy:
        while waiting and idle:
            number, job = waiting.popleft()
            worker = idle.pop()
            worker.send(job)
            busy[worker] = number, time.monotonic() + timeout_secs
        next_deadline = min(deadline for _, deadline in busy.values())
        readable, _, _ = select.select(list(busy), [], [], max(0.0, next_deadline - time.monotonic()))
        for worker in list(busy):
            number, deadline = busy[worker]
            answer = worker.receive() if worker in readable else None
            if answer is None and time.monotonic() >= deadline:
                worker.kill()
                answer = Answer("timed_out", error=f"took longer than {timeout_secs:g} s")
            if answer is not None:
                del busy[worker]
                idle.append(worker)
                yield number, answer


def serve(handle: Callable[[Any], Any]) -> None:
    """Answer the jobs on stdin until it ends; what `handle` raises is an answer too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"value": handle(json.loads(line))}
        except Exception as error:  # recorded as the outcome of this job
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:_LONGEST_CAUSE]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
