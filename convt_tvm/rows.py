"""Benchmark rows: what one implementation did with one workload, stored as a line of JSON."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Literal, Self, TypeAlias

from convt_tvm.errors import RowsError
from convt_tvm.json_lines import read_lines, require_fields
from convt_tvm.measure import ratio

__all__ = [
    "COPY",
    "OURS",
    "OURS_DEFAULT",
    "OURS_LAST",
    "OURS_ONE_THREAD",
    "PRECISIONS",
    "TORCH",
    "TORCH_LAST",
    "Row",
    "Run",
    "beside_others",
    "by_setting",
    "geometric_means",
    "latest_runs",
    "read_rows",
    "regressions",
    "shares",
]

PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "float64")
"""Dtypes, and float32 multiplied as tf32, which GPUs have tensor cores for."""
OURS, COPY, TORCH = "ours", "ours_again", "torch"
"""The kernel, a second copy of it that gives the noise floor, and the peer that runs are compared by."""
OURS_LAST, TORCH_LAST = "ours_channels_last", "torch_channels_last"
"""The kernel for channels_last, and the peer that computes in that memory format."""
OURS_DEFAULT = "ours_default"
"""The kernel with no search, where `OURS` is one that a tuning log names."""
OURS_ONE_THREAD = "ours_1_thread"
"""What `OURS` would be with one thread, run with one: by turns with it, where that has several."""
LONG_US = 2000
"""Microseconds from which on a kernel shows whether threads share its work: starting them does not count then."""


Setting: TypeAlias = tuple[str, int, bool, int]
"""See `Row.setting`."""
Status: TypeAlias = Literal["ok", "wrong", "rejected", "unavailable", "failed"]


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation of one workload in one run. What was not measured is None.

    Attributes
    ----------
    workload, spec
        The workload's name and its spec's canonical name.
    implementation
        `OURS`, `COPY`, `OURS_LAST`, `OURS_DEFAULT`, `OURS_ONE_THREAD`, or a name of `convt_tvm.peers.PEERS`.
    status
        ``ok``; ``wrong`` if an answer was outside its tolerance, ``rejected`` if the implementation refuses the spec,
        ``unavailable`` if it is not installed, ``failed`` if it raised while running. Only ``ok`` rows have times.
    reason
        Why the status is not ``ok``; otherwise empty.
    threads, rounds, target, date
        How it was run: size of every thread pool (but for `OURS_ONE_THREAD`), samples taken, what our kernel was
        compiled for, when (UTC; the same for all rows of a run).
    error_over_bound
        Largest ratio of an output's distance from float64 to its own `convt_tvm.reference.error_bound`.
    median_us, mad_us
        Median of the samples and their median absolute deviation from it, microseconds a call.
    samples_us
        Every sample, to four digits.
    noise_floor
        Ratio, at least 1, by which two copies of one kernel differed in this run. The same in all its rows.
    gflops
        Useful multiplications and additions, in units of 1e9 a second.
    share_of_peak
        Those over ``peak_gflops``.
    share_of_bound
        The roofline's time over the median.
    bound_us, bound_by
        The time below which this machine cannot compute the workload, and which limit that is.
    peak_gflops, bandwidth_gbs
        Those limits, medians of loops that took turns with the implementations: multiply-adds as two operations, bytes
        read or written where there are as many as the workload's.
    schedule, layout
        Of our kernel.
    cold
        Whether a GPU's second cache was overwritten before each call.
    machine, versions, commit
        Where it ran, and with what; the commit is None outside a checkout and ends in ``+`` where files were changed.
    """

    workload: str
    spec: str
    implementation: str
    status: Status
    threads: int
    rounds: int
    target: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    commit: str | None
    reason: str = ""
    error_over_bound: float | None = None
    median_us: float | None = None
    mad_us: float | None = None
    samples_us: tuple[float, ...] = ()
    noise_floor: float | None = None
    gflops: float | None = None
    share_of_peak: float | None = None
    share_of_bound: float | None = None
    bound_us: float | None = None
    bound_by: Literal["compute", "memory"] | None = None
    peak_gflops: float | None = None
    bandwidth_gbs: float | None = None
    schedule: str | None = None
    layout: Mapping[str, Any] | None = None
    cold: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether this is a kernel of ours."""
        return self.implementation in (OURS, COPY, OURS_LAST, OURS_DEFAULT, OURS_ONE_THREAD)

    @property
    def precision(self) -> str:
        """The dtype, or tf32 where float32 may be rounded to that."""
        if self.target.endswith("+tf32"):
            return "tf32"
        return next((name for name in PRECISIONS[2:] if name in self.spec.split("_")), "float32")

    @property
    def setting(self) -> Setting:
        """What rows have in common that may stand in one table: GPU, place in `PRECISIONS`, caches and threads."""
        gpu = self.machine.get("gpu")
        precision = PRECISIONS.index(self.precision)
        return "" if gpu is None else str(gpu.get("name", "GPU")), precision, self.cold, self.threads

    @property
    def layer(self) -> str:
        """The spec's name with float32 in place of its dtype."""
        return "_".join("float32" if part in PRECISIONS else part for part in self.spec.split("_"))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; infinities and NaN, which JSON lacks, become None."""
        values = asdict(self) | {"samples_us": list(self.samples_us)}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The row that `to_json` wrote; raises RowsError for missing or unknown fields."""
        # Rows of processors are older than the field.
        if isinstance(values, Mapping):
            values = {"cold": False, **values}
        require_fields(cls, values, "a benchmark row", "write rows with `convt-tvm bench -o`")
        return cls(**{**values, "samples_us": tuple(values["samples_us"])})


@dataclass(frozen=True, slots=True)
class Run:
    """The rows of one workload that were timed together, by implementation."""

    rows: Mapping[str, Row]

    @property
    def ours(self) -> Row:
        """Our kernel's row."""
        return self.rows[OURS]

    @property
    def is_overhead(self) -> bool:
        """Whether this is the workload so small that it measures what a call costs, and not the kernel."""
        return self.ours.workload.startswith("overhead/")

    @property
    def peers(self) -> dict[str, Row]:
        """The others' rows."""
        return {name: row for name, row in self.rows.items() if not row.is_ours}

    @property
    def best_peer(self) -> Row | None:
        """Of the peers with right answers the one that is fastest beside ours in its memory format."""
        timed = [row for row in self.peers.values() if row.median_us is not None]
        return min(timed, key=lambda row: self.speedup(row) or row.median_us or math.inf, default=None)

    def ours_for(self, peer: Row) -> Row:
        """Our kernel that reads and writes the memory format of the peer; rows of old have that for NCHW only."""
        return self.rows.get(OURS_LAST, self.ours) if peer.implementation == TORCH_LAST else self.ours

    def speedup(self, peer: Row | None) -> float | None:
        """The peer's time over ours in its memory format (`convt_tvm.measure.ratio`); None if either was not timed."""
        if peer is None or not peer.samples_us:
            return None
        ours = self.ours_for(peer).samples_us
        return ratio(peer.samples_us, ours) if ours else None

    @property
    def over_best(self) -> float | None:
        """Best peer's time over ours in its memory format."""
        return self.speedup(self.best_peer)

    @property
    def over_torch(self) -> float | None:
        """Torch eager's time (NCHW) over ours."""
        return self.speedup(self.rows.get(TORCH))

    @property
    def over_one_thread(self) -> float | None:
        """Our time over that with one thread; None where there is no other."""
        alone = self.rows.get(OURS_ONE_THREAD)
        return None if alone is None or not alone.samples_us else ratio(self.ours.samples_us, alone.samples_us)

    @property
    def by_default(self) -> Self:
        """The same run with the kernel that there is without tuning in the place of ours."""
        default = self.rows.get(OURS_DEFAULT)
        return self if default is None else replace(self, rows={**self.rows, OURS: default})

    @property
    def is_behind(self) -> bool:
        """Whether the best peer is faster by more than the noise floor."""
        return self.over_best is not None and self.over_best * (self.ours.noise_floor or 1) < 1


def geometric_means(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """Of best peer over ours and of torch over ours, each over the runs that have it; None where none has."""
    over_best = [run.over_best for run in runs if run.over_best is not None]
    over_torch = [run.over_torch for run in runs if run.over_torch is not None]
    return (
        geometric_mean(over_best) if over_best else None,
        geometric_mean(over_torch) if over_torch else None,
    )


def shares(runs: Sequence[Run], every: Iterable[Run]) -> dict[str, Callable[[Run], float | None]]:
    """What gives our time over that with one thread, and over that in float32, by what tables call it.

    The first was timed in the same run (`Run.over_one_thread`), float32 in a run among `every` of the same layer,
    processor and commit; None where there is none. Left out is what none of `runs` has.
    """
    found: dict[str, Callable[[Run], float | None]] = {
        "of 1 thread": lambda run: run.over_one_thread,
        "of float32": _over_float32(every),
    }
    return {title: share for title, share in found.items() if any(share(run) is not None for run in runs)}


def _over_float32(every: Iterable[Run]) -> Callable[[Run], float | None]:
    """What gives our time over that in float32; see `shares`."""

    def place(row: Row) -> tuple[str, Any, str | None]:
        return row.layer, row.machine.get("cpu"), row.commit

    known = {(place(run.ours), run.ours.setting): run.ours.median_us for run in every}

    def over(run: Run) -> float | None:
        gpu, _, cold, threads = run.ours.setting
        wide = gpu, PRECISIONS.index("float32"), cold, threads
        ours, other = run.ours.median_us, known.get((place(run.ours), wide))
        return None if ours is None or other is None or wide == run.ours.setting else ours / other

    return over


def beside_others(runs: Sequence[Run], every: Sequence[Run]) -> str:
    """How our times compare with those with one thread and in float32 among `every` run, in words; or nothing."""
    computing = [run for run in runs if run.ours.bound_by == "compute" and not run.is_overhead]
    alone = [(run.ours.median_us or 0, over) for run in computing if (over := run.over_one_thread) is not None]
    long = [over for ours, over in alone if ours >= LONG_US * over]
    narrow = [over for over in map(_over_float32(every), computing) if over is not None]
    found = [f"{_range(long)} of the time with 1 thread ({LONG_US // 1000} ms and more)"] if long else []
    found += [f"{_range(narrow)} of the time in float32"] if narrow else []
    return f"Where computing is the bound ours take {' and '.join(found)}." if found else ""


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that may stand in one table, by its title."""
    settings = sorted({run.ours.setting for run in runs})
    return {_title(each): [run for run in runs if run.ours.setting == each] for each in settings}


def _title(setting: Setting) -> str:
    gpu, precision, cold, threads = setting
    name = PRECISIONS[precision]
    if gpu:
        return f"{gpu}, {name}, {'cold' if cold else 'warm'} caches"
    return f"{threads} thread{'' if threads == 1 else 's'}{'' if name == 'float32' else f', {name}'}"


def read_rows(path: Path) -> list[Row]:
    """The rows in a file; raises RowsError naming the line that is none, OSError if there is no such file."""
    return read_lines(path, Row.from_json)


def latest_runs(rows: Sequence[Row]) -> list[Run]:
    """The last run of each workload and setting, in the order in which those first appear.

    Rows of different runs are never put together: they were not timed against each other.
    """
    newest: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = row.spec, row.setting
        newest[key] = max(newest.get(key, ""), row.date)
    runs: dict[tuple[Any, ...], dict[str, Row]] = {key: {} for key in newest}
    for row in rows:
        key = row.spec, row.setting
        if row.date == newest[key]:
            runs[key][row.implementation] = row
    return [Run(found) for found in runs.values() if OURS in found]


def regressions(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """What became slower from one set of rows to another, in words, one line a workload.

    Times are compared with torch eager's in the same run, so that the machine's own drift cancels. Slower means by
    more than the noise floors of both runs together.

    Raises
    ------
    RowsError
        if no workload was timed against torch in both with the same number of threads.
    """
    before = {(run.ours.spec, run.ours.setting): run for run in latest_runs(old)}
    found, compared = [], 0
    for run in latest_runs(new):
        earlier = before.get((run.ours.spec, run.ours.setting))
        if earlier is None or earlier.over_torch is None or run.over_torch is None:
            continue
        compared += 1
        slowdown = earlier.over_torch / run.over_torch
        noise = (earlier.ours.noise_floor or 1) * (run.ours.noise_floor or 1)
        if slowdown > noise:
            found.append(
                f"{run.ours.workload}: {run.over_torch:.2f}x torch, formerly {earlier.over_torch:.2f}x; slower by "
                f"{slowdown - 1:.1%}, noise {noise - 1:.1%}"
            )
    if not compared:
        raise RowsError(
            "the baseline and these rows have no workload in common that was timed against torch with the same number "
            "of threads; run both with torch among the peers."
        )
    return found
