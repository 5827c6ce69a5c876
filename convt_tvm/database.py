"""Where tuning logs are, which record a build uses, and how logs of other machines come in. Imports no compiler."""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from convt_tvm.errors import TuningLogError
from convt_tvm.gpu import EMULATED
from convt_tvm.machine import machine_key
from convt_tvm.records import OWN, Context, Result, Trial
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import DATABASE_FILES, RESULTS, SESSIONS, TRIALS, Store, read_records
from convt_tvm.target import Target

__all__ = ["Found", "Merged", "find_result", "log_directory", "logs_directory", "merge", "relatives"]


def logs_directory() -> Path:
    """Where tuning logs are: ``$CONVT_TVM_TUNING_LOGS``, or else the package `convt_tvm.tuning_logs`.

    The variable is read at each call; nothing is created.
    """
    if override := os.environ.get("CONVT_TVM_TUNING_LOGS"):
        return Path(override).expanduser().absolute()
    found = importlib.util.find_spec("convt_tvm.tuning_logs")
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    return Path(__file__).parent.parent / "tuning_logs"


def log_directory(logs: Path, spec: ConvTranspose2dSpec, target: Target) -> Path:
    """The log of one workload: ``<logs>/<target key>/<spec name>``."""
    return logs / target.key / spec.name


@dataclass(frozen=True, slots=True)
class Found:
    """The result that a build should use, if there is one, and why those that there are do not apply."""

    result: Result | None
    ignored: tuple[str, ...] = ()


def find_result(
    spec: ConvTranspose2dSpec, target: Target, *, threads: int | None = None, logs: Path | None = None
) -> Found:
    """The newest result for a workload on this machine.

    One for `threads` if there is one, else for the nearest number of threads. Results of another target or another
    machine never count, whatever directory they lie in. Whether the schedule it names is still the same code is for
    the compiler to find out, by `Result.digest`.

    Parameters
    ----------
    threads
        By default what kernels will use in this process: `convt_tvm.threads.get_num_threads`.
    logs
        `logs_directory` by default.
    """
    directory = log_directory(logs or logs_directory(), spec, target)
    if not (directory / RESULTS).exists():
        return Found(None)
    stored = read_records(directory, Result)
    here = machine_key(target)
    if threads is None:
        from convt_tvm.threads import get_num_threads

        threads = get_num_threads()
    ignored, usable = list(stored.problems), {}
    # By date: `merge` appends what may be older.
    for result in sorted(stored.records, key=lambda result: result.date):
        context = result.context
        if context.target != target.name:
            ignored.append(f"the result of session {result.session} is for the target {context.target}")
        elif result.candidate.space != OWN:
            ignored.append(f"the result of session {result.session} is a baseline, from TVM's own space")
        elif context.machine == EMULATED:
            ignored.append(f"the result of session {result.session} is a rehearsal's, on an emulated GPU")
        elif here is not None and context.machine != here:
            ignored.append(
                f"the result of session {result.session} is from machine {context.machine}, and this one is {here}"
            )
        else:
            usable[context.threads] = result
    best = min(usable, key=lambda count: (abs(count - threads), count), default=None)
    return Found(None if best is None else usable[best], tuple(ignored))


def relatives(logs: Path, spec: ConvTranspose2dSpec, context: Context) -> Iterator[tuple[ConvTranspose2dSpec, Trial]]:
    """Every trial that was timed for another workload in the same context, with that workload's spec."""
    key = Target.parse(context.target).key
    for directory in sorted((logs / key).glob("*/")):
        if directory.name == spec.name:
            continue
        try:
            other = ConvTranspose2dSpec.from_name(directory.name)
        except ValueError:
            continue
        for trial in read_records(directory, Trial).records:
            if trial.context == context and trial.status == "ok":
                yield other, trial


@dataclass(frozen=True, slots=True)
class Merged:
    """How many lines `merge` brought in for one workload, by file."""

    spec: str
    added: dict[str, int]


def merge(source: Path, into: Path) -> list[Merged]:
    """Bring the logs below `source` into those below `into`; lines that are there already are not added again.

    Each destination is locked while it is written to, and merging the same twice changes nothing. Records keep the
    machine they name, so that those of another one never win here.

    Raises
    ------
    TuningLogError
        If there is no log below `source`.
    TuningError
        If a session is writing to one of the destinations.
    """
    directories = sorted({path.parent for name in (SESSIONS, TRIALS, RESULTS) for path in source.glob(f"*/*/{name}")})
    if not directories:
        raise TuningLogError(
            f"{source} holds no tuning logs; name a directory of <target key>/<spec name>/trials.jsonl."
        )
    merged = []
    for directory in directories:
        theirs = Store(directory, ())
        with Store.open(into / directory.parent.name / directory.name) as ours:
            added = {}
            for name in (SESSIONS, TRIALS, RESULTS):
                known = {json.dumps(line) for line in ours.raw_lines(name)}
                new = [line for line in theirs.raw_lines(name) if json.dumps(line) not in known]
                ours.append_raw(name, new)
                added[name] = len(new)
            _merge_database(theirs, ours)
        merged.append(Merged(directory.name, added))
    return merged


def _merge_database(theirs: Store, ours: Store) -> None:
    """Add MetaSchedule's records, with the numbers that their workloads get here."""
    workloads, tuning_records = DATABASE_FILES
    numbers = {json.dumps(line): number for number, line in enumerate(ours.raw_lines(workloads))}
    moved = []
    for line in theirs.raw_lines(workloads):
        text = json.dumps(line)
        if text not in numbers:
            ours.append_raw(workloads, [line])
            numbers[text] = len(numbers)
        moved.append(numbers[text])
    known = {json.dumps(line) for line in ours.raw_lines(tuning_records)}
    for line in theirs.raw_lines(tuning_records):
        if isinstance(line, list) and line and type(line[0]) is int and line[0] < len(moved):
            renumbered = [moved[line[0]], *line[1:]]
            if json.dumps(renumbered) not in known:
                ours.append_raw(tuning_records, [renumbered])
