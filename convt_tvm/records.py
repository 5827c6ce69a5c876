"""What a tuning session writes down: the session itself, each trial, and the result; a line of JSON each.

Every line stands alone: it names the machine, the number of threads, the target and the code it was made by, so that a
file cut short, or merged from two machines, loses nothing but the lines that are gone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any, Literal, Self, TypeAlias

from convt_tvm.digests import sha256
from convt_tvm.errors import TuningLogError

__all__ = [
    "EARLY",
    "GENERIC",
    "OWN",
    "SOURCE_DIGITS",
    "Candidate",
    "Context",
    "Record",
    "Result",
    "SessionInfo",
    "Status",
    "Trial",
    "failures_text",
    "mad",
]

Status: TypeAlias = Literal["ok", "wrong", "build_failed", "run_failed", "crashed", "timed_out"]
"""``wrong``: an answer differed from the exact one. ``crashed`` and ``timed_out``: the process that built or ran it."""


SOURCE_DIGITS = 12
"""Of `convt_tvm.fingerprint.source_fingerprint`, those that records keep."""
OWN, GENERIC = "own", "generic"
"""What a session searches: the files of ``schedules/``, or, as a baseline, TVM's own post-order-apply."""

EARLY = 64
"""Trials that should find at least 95 % of what any number finds."""


def failures_text(failures: Mapping[str, int]) -> str:
    """How many trials failed for each cause, in words."""
    return ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(failures.items()))


def mad(samples: "tuple[float, ...] | list[float]") -> float:
    """Median absolute deviation from the median."""
    middle = median(samples)
    return median(abs(sample - middle) for sample in samples)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule space and the layout to declare for it: everything that decides the code of a kernel.

    In TVM's own space ``trace`` holds the instructions and decisions of one schedule; in ours schedule and layout imply
    them, and it is None.
    """

    schedule: str
    layout: Mapping[str, Any]
    trace: tuple[Any, ...] | None = None

    @property
    def key(self) -> str:
        """Equal for equal candidates, whatever the order of the layout's fields."""
        text = f"{self.schedule} {json.dumps(dict(self.layout), sort_keys=True)}"
        return text if self.trace is None else f"{text} {self._trace_digest}"

    @property
    def space(self) -> str:
        """Of `OWN` and `GENERIC`, that which holds it."""
        return OWN if self.trace is None else GENERIC

    @property
    def _trace_digest(self) -> str:
        return sha256(json.dumps(self.trace).encode())[:16]

    def __str__(self) -> str:
        layout = ", ".join(f"{name}={value}" for name, value in self.layout.items())
        return f"{self.schedule} ({layout})" + ("" if self.trace is None else f" {self._trace_digest}")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values: dict[str, Any] = {"schedule": self.schedule, "layout": dict(self.layout)}
        return values if self.trace is None else {**values, "trace": list(self.trace)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The candidate that `to_json` wrote."""
        trace = values.get("trace")
        return cls(str(values["schedule"]), dict(values["layout"]), None if trace is None else tuple(trace))


@dataclass(frozen=True, slots=True)
class Context:
    """What a measurement depends on besides the candidate; records of different contexts are never compared.

    Attributes
    ----------
    target
        `convt_tvm.target.Target.name`.
    machine
        `convt_tvm.machine.Machine.key` of where it ran.
    threads
        Threads of the kernel.
    """

    target: str
    machine: str
    threads: int


@dataclass(frozen=True, slots=True)
class Record:
    """What every line has.

    Attributes
    ----------
    context
        Target, machine and threads.
    source
        First digits of `convt_tvm.fingerprint.source_fingerprint`, the fingerprint of all schedule spaces and of what
        compiles them.
    session
        Of the run that wrote it.
    date
        UTC, to the second.
    """

    context: Context
    source: str
    session: str
    date: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, one level deep."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "context":
                values |= asdict(value)
            elif isinstance(value, Candidate):
                values |= value.to_json() if item.name == "candidate" else {item.name: value.to_json()}
            elif item.name == "finalists":
                values[item.name] = [finalist.to_json() for finalist in value]
            else:
                values[item.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_json(cls, values: object) -> Self:
        """The record that `to_json` wrote; raises TuningLogError saying which fields are missing or unknown."""
        if not isinstance(values, Mapping):
            raise TuningLogError(f"a tuning record is a JSON object; found {type(values).__name__}.")
        known = {item.name for item in fields(cls)}
        given: dict[str, Any] = dict(values)
        try:
            given["context"] = Context(**{item.name: given.pop(item.name) for item in fields(Context)})
            if "candidate" in known:
                given["candidate"] = Candidate.from_json(given)
                for name in ("schedule", "layout", "trace"):
                    given.pop(name, None)
            if "default" in known:
                given["default"] = Candidate.from_json(given["default"])
            if "finalists" in known:
                given["finalists"] = tuple(Finalist.from_json(each) for each in given["finalists"])
        except (KeyError, TypeError, AttributeError) as error:
            raise TuningLogError(f"a {cls.__name__.lower()} record lacks a field: {error}.") from error
        if set(given) != known:
            raise TuningLogError(
                f"a {cls.__name__.lower()} record lacks the fields {sorted(known - set(given))} and has the unknown "
                f"ones {sorted(set(given) - known)}; it was written by another version."
            )
        flat: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        return cls(**flat)


@dataclass(frozen=True, slots=True)
class SessionInfo(Record):
    """One run of ``convt-tvm tune`` on one workload.

    Attributes
    ----------
    workload, spec
        Its name and its spec's canonical name.
    space
        What it searched: `OWN` or `GENERIC`.
    candidates
        How many there were to choose from; 0 where they are generated.
    default
        What its best have to beat: what runs when nothing was tuned; for TVM's own space what `build` took at the time.
    trials, budget_secs, seed, effort, command
        As asked for.
    machine_info, versions, commit, host, pid
        Where and with what it ran.
    peak_gflops, torch_us
        Measured at its beginning: multiply-adds as two operations, and torch eager; None over RPC.
    """

    workload: str
    spec: str
    space: str
    candidates: int
    default: Candidate
    trials: int
    budget_secs: float
    seed: int
    effort: str
    command: str
    machine_info: Mapping[str, Any]
    commit: str | None
    host: str
    pid: int
    peak_gflops: float | None = None
    torch_us: float | None = None


@dataclass(frozen=True, slots=True)
class Trial(Record):
    """One candidate, built, checked and timed, or what became of it.

    Attributes
    ----------
    digest
        Of the lowered code; empty if it was not built.
    status, error
        Why it has no times; the error is empty if it has.
    cycles, predicted_us
        What the cost rule, and the model of the session at that time, expected; None where they said nothing.
    samples_us
        Microseconds a call, each sample the mean of a loop. One sample alone: it was far from the best.
    build_secs, run_secs
        What building, and checking and timing, took.
    origin
        What proposed it: ``default``, ``rule``, ``diverse``, ``relative``, ``model``, ``neighbour``, ``random``, or
        ``evolution`` for TVM's own search.
    wrong_trace
        Instructions and decisions of a schedule that gave wrong answers.
    """

    candidate: Candidate
    digest: str
    status: Status
    error: str = ""
    cycles: float | None = None
    predicted_us: float | None = None
    samples_us: tuple[float, ...] = ()
    build_secs: float = 0.0
    run_secs: float = 0.0
    origin: str = ""
    wrong_trace: tuple[Any, ...] | None = None

    @property
    def best_us(self) -> float | None:
        """The smallest sample: what else ran on the machine can only add time."""
        return min(self.samples_us, default=None)


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate measured again at the end of a session, by turns with the others."""

    candidate: Candidate
    digest: str
    samples_us: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """The median sample."""
        return median(self.samples_us)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**self.candidate.to_json(), "digest": self.digest, "samples_us": list(self.samples_us)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The finalist that `to_json` wrote."""
        return cls(Candidate.from_json(values), str(values["digest"]), tuple(values["samples_us"]))


@dataclass(frozen=True, slots=True)
class Result(Record):
    """What a session concluded.

    Attributes
    ----------
    candidate, digest
        The winner: the fastest of the finalists if it beats the default by more than the noise, else the default. Of
        TVM's own space always its fastest.
    tuned
        Whether the fastest beats the default by more than the noise.
    median_us, mad_us
        Of the winner, when the finalists were measured again.
    default_us
        The default's median in the same rounds.
    noise_floor
        Ratio, at least 1, by which two copies of the default differed in these rounds.
    finalists
        All that were measured again, the fastest first, the default among them.
    trials
        How many there had been for this context.
    """

    candidate: Candidate
    digest: str
    tuned: bool
    median_us: float
    mad_us: float
    default_us: float
    noise_floor: float
    trials: int
    finalists: tuple[Finalist, ...] = field(default=())

    def summary(self) -> dict[str, Any]:
        """What an artifact says about the result that chose its schedule."""
        context = asdict(self.context)
        return {
            **{name: context[name] for name in ("machine", "threads")},
            "session": self.session,
            "date": self.date,
            "tuned": self.tuned,
            "median_us": self.median_us,
            "default_us": self.default_us,
        }
