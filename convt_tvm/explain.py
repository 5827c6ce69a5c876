"""What a workload asks for, what the machine allows, and which schedule would run it."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from convt_tvm.records import Result
from convt_tvm.roofline import Bound, Limits, bound
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

__all__ = ["AxisPhase", "Candidate", "Explanation", "explain"]


@dataclass(frozen=True, slots=True)
class AxisPhase:
    """Outputs of one axis that differ by multiples of the stride, and the kernel taps that reach them."""

    residue: int
    count: int
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule and layout that applies, and the cycles of one core that the cost rule expects."""

    schedule: str
    layout: dict[str, Any]
    cycles: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found.

    Attributes
    ----------
    rows, columns
        Phases of the two axes.
    useful_multiplications
        Those of an input value and a weight that reach the output.
    textbook_multiplications
        Those of the form that dilates and pads the input with zeros and gathers every kernel tap.
    bound
        The roofline.
    candidates
        Every layout considered, the cheapest by the cost rule first, which runs where no stored result says otherwise.
    stored
        The stored tuning result that `build` would use, if any.
    ignored
        Why other stored results do not apply.
    """

    workload: Workload
    target: Target
    rows: tuple[AxisPhase, ...]
    columns: tuple[AxisPhase, ...]
    useful_multiplications: int
    textbook_multiplications: int
    bound: Bound
    threads: int
    candidates: tuple[Candidate, ...]
    stored: Result | None = None
    ignored: tuple[str, ...] = ()

    @property
    def zero_multiplications(self) -> int:
        """What the textbook form multiplies in vain: zeros between input points and beyond the border."""
        return self.textbook_multiplications - self.useful_multiplications

    @property
    def reason(self) -> str:
        """Why the first candidate would run."""
        if not self.candidates:
            return "no schedule applies"
        first = self.candidates[0]
        others = [candidate for candidate in self.candidates if candidate.schedule != first.schedule]
        text = f"{first.schedule} has the fewest estimated cycles of {len(self.candidates)} layouts"
        if self.stored is not None and self.stored.tuned:
            winner = self.stored.candidate
            decided = ", ".join(f"{name}={value}" for name, value in winner.layout.items())
            gain = self.stored.default_us / self.stored.median_us
            text = (
                f"{winner.schedule} ({decided}), which a session found {gain:.2f} times as fast as the default; {text}"
            )
        if not others:
            return text
        return f"{text}; {others[0].schedule} needs {others[0].cycles / first.cycles:.2f} times as many at its best"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "workload": self.workload.name,
            "source": self.workload.source,
            "spec": self.workload.spec.name,
            "output_shape": list(self.workload.spec.sized.output_shape),
            "target": self.target.name,
            "threads": self.threads,
            "rows": [asdict(phase) | {"taps": list(phase.taps)} for phase in self.rows],
            "columns": [asdict(phase) | {"taps": list(phase.taps)} for phase in self.columns],
            "useful_multiplications": self.useful_multiplications,
            "textbook_multiplications": self.textbook_multiplications,
            "zero_multiplications": self.zero_multiplications,
            "bound": {
                "by": self.bound.by,
                "us": self.bound.secs * 1e6,
                "compute_us": self.bound.compute_secs * 1e6,
                "memory_us": self.bound.memory_secs * 1e6,
                "flops": self.bound.flops,
                "size_bytes": self.bound.size_bytes,
                "peak_gflops": self.bound.flops_per_sec / 1e9,
                "bandwidth_gbs": self.bound.bytes_per_sec / 1e9,
            },
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "stored": None if self.stored is None else self.stored.summary(),
            "ignored": list(self.ignored),
            "reason": self.reason,
        }


def _phases(spec: ConvTranspose2dSpec, axis: int) -> tuple[AxisPhase, ...]:
    return tuple(AxisPhase(phase.residue, phase.count, tuple(phase.kernel_indices)) for phase in spec.axes[axis].phases)


def explain(workload: Workload, target: str | Target = "llvm", *, limits: Limits) -> Explanation:
    """Explain one workload; lowers a stored schedule and compiles nothing, but imports the compiler.

    Parameters
    ----------
    limits
        This machine's, for the workload's spec.

    Raises
    ------
    TargetError
        if the target is a string that names none.
    """
    from convt_tvm.compiler import Stored, find_stored
    from convt_tvm.space import ranked_choices

    spec = workload.spec.sized
    resolved = Target.parse(target).for_dtype(spec.dtype)
    stored = Stored() if workload.spec.n is None else find_stored(spec, resolved, threads=limits.threads)
    return Explanation(
        workload=workload,
        target=resolved,
        rows=_phases(spec, 0),
        columns=_phases(spec, 1),
        useful_multiplications=spec.multiply_adds,
        textbook_multiplications=prod(spec.output_shape) * (spec.ci // spec.groups) * prod(spec.kernel_size),
        bound=bound(spec, limits),
        threads=limits.threads,
        candidates=tuple(
            Candidate(choice.space.name, choice.layout.to_json(), choice.cycles)
            for choice in ranked_choices(workload.spec, resolved)
        ),
        stored=stored.result,
        ignored=stored.ignored,
    )
