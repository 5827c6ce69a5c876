"""The files of one workload's tuning log: locked, repaired after a crash, appended to a line at a time.

| file | holds |
|---|---|
| ``sessions.jsonl`` | a `SessionInfo` for each run |
| ``trials.jsonl`` | a `Trial` for each candidate measured |
| ``results.jsonl`` | a `Result` for each finished session; what `build` reads |
| ``database_workload.json``, ``database_tuning_record.json`` | winners as MetaSchedule's `JSONDatabase` keeps them |

A process that is killed while it writes leaves at most a torn last line, which the next writer cuts off and readers
skip. MetaSchedule's second file names lines of its first by their number; a record whose workload is gone goes too.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from filelock import FileLock, Timeout

from convt_tvm.errors import TuningError, TuningLogError
from convt_tvm.records import Record, Result, SessionInfo, Trial

__all__ = ["DATABASE_FILES", "RESULTS", "SESSIONS", "TRIALS", "R", "Read", "Store", "read_records", "repair"]

SESSIONS, TRIALS, RESULTS = "sessions.jsonl", "trials.jsonl", "results.jsonl"
WORKLOADS, TUNING_RECORDS = DATABASE_FILES = "database_workload.json", "database_tuning_record.json"
LOCK_FILE = ".lock"

_FILE_OF: dict[type[Record], str] = {SessionInfo: SESSIONS, Trial: TRIALS, Result: RESULTS}

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Read(Generic[R]):
    """Records in the order in which they were written, and a line on each that could not be read."""

    records: tuple[R, ...]
    problems: tuple[str, ...]


def _lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Number, value and complaint of each line that is not empty; a missing file has none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line), ""
            except ValueError as error:
                yield number, None, f"{path.name}, line {number}, was skipped: it is no JSON ({error})"


def read_records(directory: Path, kind: type[R]) -> Read[R]:
    """The records of one kind in a log, which may be written to meanwhile; those of another version are problems."""
    path = directory / _FILE_OF[kind]
    records, problems = [], []
    for number, value, complaint in _lines(path):
        if not complaint:
            try:
                records.append(kind.from_json(value))
                continue
            except TuningLogError as error:
                complaint = f"{path.name}, line {number}, was skipped: {error}"
        problems.append(complaint)
    return Read(tuple(records), tuple(problems))


def repair(directory: Path) -> list[str]:
    """Cut torn last lines off every file of a log, so that what is appended stands on lines of its own.

    Returns a line on each file that was changed. What stands before a torn line is never touched, except that
    MetaSchedule's files, which it refuses to open otherwise, lose whatever is unreadable in them.
    """
    changed = []
    for name in (SESSIONS, TRIALS, RESULTS, *DATABASE_FILES):
        path = directory / name
        if path.exists() and (cut := _cut_torn_line(path)):
            changed.append(f"{name} ended in a torn line of {cut} bytes, which was cut off")
    return changed + _repair_database(directory)


def _cut_torn_line(path: Path) -> int:
    """Bytes dropped from the end; a last line that is whole but for its line feed gets one."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if not tail:
        return 0
    try:
        whole = isinstance(json.loads(tail), dict | list)
    except ValueError:
        whole = False
    if whole:
        with path.open("ab") as file:
            file.write(b"\n")
        return 0
    os.truncate(path, end)
    return len(tail)


def _repair_database(directory: Path) -> list[str]:
    workloads, tuning_records = (directory / name for name in DATABASE_FILES)
    if not tuning_records.exists():
        return []
    known = [value for _, value, _ in _lines(workloads)]
    # A workload that cannot be read takes its number with it: those behind it would be counted wrongly.
    usable = next((index for index, value in enumerate(known) if value is None), len(known))
    if usable < len(known):
        _rewrite(workloads, known[:usable])
    values = [value for _, value, _ in _lines(tuning_records)]
    kept = [
        value for value in values if isinstance(value, list) and value and type(value[0]) is int and value[0] < usable
    ]
    if len(kept) == len(values):
        return []
    _rewrite(tuning_records, kept)
    return [f"{TUNING_RECORDS} lost {len(values) - len(kept)} records whose workload is unreadable or gone"]


def _rewrite(path: Path, values: Sequence[Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    temporary.replace(path)


class Store:
    """A log that this process alone writes to; made by `open`."""

    def __init__(self, directory: Path, repaired: Sequence[str]) -> None:
        self.directory = directory
        self.repaired = tuple(repaired)

    @classmethod
    @contextmanager
    def open(cls, directory: Path, *, wait_secs: float = 0) -> Iterator[Self]:
        """Lock a log, making its directory if it is not there, and repair it.

        The lock goes with the process that holds it, however that ends.

        Raises
        ------
        TuningError
            If another process still holds the lock after `wait_secs`; the message names it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK_FILE)
        try:
            lock.acquire(timeout=wait_secs)
        except Timeout:
            sessions = read_records(directory, SessionInfo).records
            holder = f" (process {sessions[-1].pid} on {sessions[-1].host})" if sessions else ""
            raise TuningError(
                f"another session{holder} is writing to {directory}; wait for it, stop it, or name another directory "
                f"with --logs."
            ) from None
        try:
            yield cls(directory, repair(directory))
        finally:
            lock.release()

    def append(self, record: Record) -> None:
        """Write a record, which outlives this process from then on."""
        self._append_line(_FILE_OF[type(record)], record.to_json())

    def append_raw(self, name: str, lines: Sequence[Any]) -> None:
        """Write values that came from a file of the same name."""
        for line in lines:
            self._append_line(name, line)

    def _append_line(self, name: str, value: Any) -> None:
        line = json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with (self.directory / name).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self, kind: type[R]) -> Read[R]:
        """What the log holds of one kind."""
        return read_records(self.directory, kind)

    def raw_lines(self, name: str) -> list[Any]:
        """The readable lines of a file as JSON values."""
        return [value for _, value, complaint in _lines(self.directory / name) if not complaint]
