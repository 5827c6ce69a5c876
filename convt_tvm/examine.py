"""The numerics lab: every stage, on every data set, for every implementation of one spec.

exactness
    Integers, dense and small enough that nothing rounds: every output must be that of an int64 oracle, bit for bit.
    This finds wrong indices, which a tolerance may hide.
rounding
    Real numbers of several distributions: every output must lie within its own error bound of float64. This finds sums
    kept in too narrow a type and values flushed to zero.
special
    NaN, infinities, signed zeros, overflow: they go where the definition says.
determinism
    The same bits on every run, for any number of threads, anywhere in a batch, loaded and freshly built.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from convt_tvm.check import Operator, bits, mismatch
from convt_tvm.determinism import RUNS, compare_repeats
from convt_tvm.distributions import DISTRIBUTIONS, telling_integers
from convt_tvm.errormap import find_worst, phase_map
from convt_tvm.errors import ConvTError
from convt_tvm.findings import STAGES, Examination, Finding, Stage, Status
from convt_tvm.implementations import Implementation, RefusedError
from convt_tvm.machine import machine, package_versions
from convt_tvm.peers import DISTRIBUTIONS as PACKAGES
from convt_tvm.reference import expect, integer_reference
from convt_tvm.rounding import measure_rounding
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.special import judge_special, special_inputs
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

__all__ = ["ANY_BATCH", "examine", "examine_emulated", "examine_workload", "first_failure"]

ANY_BATCH = 3
"""Images that kernels for any batch size are examined with."""


def examine(
    spec: ConvTranspose2dSpec,
    compared: Sequence[Implementation],
    *,
    seed: int = 0,
    stages: Sequence[Stage] = STAGES,
    distributions: Sequence[str] = tuple(DISTRIBUTIONS),
    threads: Sequence[int] = (1,),
    runs: int = RUNS,
) -> Iterator[Finding]:
    """Findings as they are made; what an implementation raises is its finding.

    Where the spec is for any batch size, our kernels are those for any, and all are examined with `ANY_BATCH` images.

    Parameters
    ----------
    compared
        Each is given the same data.
    seed
        Of the data.
    stages, distributions
        Which to go through, by name.
    threads, runs
        For determinism, which only our implementations are examined for; see `compare_repeats`.

    Raises
    ------
    SpecError, InputsError
        if no integer inputs are exact, or none tell, for the spec.
    """
    asked = spec
    if spec.n is None:
        spec = spec.with_batch(ANY_BATCH)
        compared = [each.for_any_batch() if each.is_ours else each for each in compared]
    for stage in stages:
        for finding in _examine_stage(spec, compared, stage, distributions, seed=seed, threads=threads, runs=runs):
            yield replace(finding, spec=asked.name)


def _examine_stage(
    spec: ConvTranspose2dSpec,
    compared: Sequence[Implementation],
    stage: Stage,
    distributions: Sequence[str],
    *,
    seed: int,
    threads: Sequence[int],
    runs: int,
) -> Iterator[Finding]:
    if stage == "exactness":
        yield from _exactness(spec, compared, seed)
    elif stage == "rounding":
        for name in distributions:
            yield from _rounding(spec, compared, seed, name)
    elif stage == "special":
        yield from _special(spec, compared, seed)
    else:
        for implementation in compared:
            if implementation.is_ours:
                yield from _determinism(spec, implementation, seed, threads, runs)


def examine_workload(
    workload: Workload,
    target: Target,
    compared: Sequence[Implementation],
    *,
    seed: int,
    threads: Sequence[int],
    runs: int,
    commit: str | None,
) -> Examination:
    """Every stage for one workload, with what a reader needs to repeat it."""
    found = examine(workload.spec, compared, seed=seed, threads=threads, runs=runs)
    return _examination(workload, target, found, seed=seed, threads=threads, runs=runs, commit=commit)


def examine_emulated(
    workload: Workload, target: Target, emulated: Implementation, *, seed: int, commit: str | None
) -> Examination:
    """Exactness of a GPU's kernel on the emulator, for a single image of a batch, which is what its time allows."""
    batch = workload.spec.n
    if batch is not None and batch > 1:
        workload = replace(workload, spec=workload.spec.with_batch(1))
    reason = "" if workload.spec.n == batch else f"batch of 1 in place of {batch}"
    found = [
        replace(finding, reason=finding.reason or reason)
        for finding in examine(workload.spec, [emulated], seed=seed, stages=("exactness",))
    ]
    return _examination(workload, target, found, seed=seed, threads=(1,), runs=1, commit=commit)


def _examination(
    workload: Workload,
    target: Target,
    findings: Iterable[Finding],
    *,
    seed: int,
    threads: Sequence[int],
    runs: int,
    commit: str | None,
) -> Examination:
    here = machine()
    return Examination(
        workload=workload.name,
        spec=workload.spec.name,
        target=target.for_dtype(workload.spec.dtype).name,
        seed=seed,
        threads=tuple(threads),
        runs=runs,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        machine={name: value for name, value in here.to_json().items() if name != "versions"},
        versions={**here.versions, **package_versions(PACKAGES)},
        findings=tuple(findings),
    )


def first_failure(findings: Sequence[Finding]) -> Finding | None:
    """The first failure in the order of `STAGES`: the one that names the fault; None if all passed."""
    failed = [finding for finding in findings if finding.status == "fail"]
    return min(failed, key=lambda finding: STAGES.index(finding.stage), default=None)


def _attempt(blank: Finding, work: Callable[[], Finding]) -> Finding:
    """What `work` finds; what it raises becomes the finding."""
    try:
        return work()
    except RefusedError as error:
        return replace(blank, status=error.refusal.status, reason=error.refusal.reason)
    except Exception as error:  # recorded as this implementation's status, so that the others are still examined
        text = " ".join(str(error).split())
        return replace(blank, reason=text if isinstance(error, ConvTError) else f"{type(error).__name__}: {text}")


def _judge(
    spec: ConvTranspose2dSpec,
    compared: Sequence[Implementation],
    blank: Finding,
    judge: Callable[[Finding, Operator], Finding],
) -> Iterator[Finding]:
    """One finding for each implementation."""
    for implementation in compared:
        start = replace(blank, implementation=implementation.name)

        def work(implementation: Implementation = implementation, start: Finding = start) -> Finding:
            return judge(start, implementation.make(spec))

        with torch.inference_mode():
            found = _attempt(start, work)
        yield found


def _exactness(spec: ConvTranspose2dSpec, compared: Sequence[Implementation], seed: int) -> Iterator[Finding]:
    inputs = telling_integers(spec, seed) if spec.n else None
    if inputs is None:
        return
    exact = integer_reference(spec, *inputs)
    wanted = bits(exact.to(inputs[0].dtype))

    def judge(start: Finding, operator: Operator) -> Finding:
        output = operator(*inputs)
        if problem := mismatch(spec, output):
            return replace(start, reason=problem)
        wrong = bits(output) != wanted
        if not wrong.any():
            return replace(start, status="pass")
        distance = torch.where(wrong, (output.double() - exact).abs().nan_to_num(nan=torch.inf) + 1, 0.0)
        worst = find_worst(spec, output, exact, distance)
        reason = f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong; {worst}"
        return replace(start, reason=reason, worst=worst, phases=phase_map(spec, wrong.double()))

    blank = Finding(spec.name, "", "exactness", "integers", "fail", seed=seed)
    yield from _judge(spec, compared, blank, judge)


def _rounding(spec: ConvTranspose2dSpec, compared: Sequence[Implementation], seed: int, name: str) -> Iterator[Finding]:
    inputs = DISTRIBUTIONS[name](spec, seed)
    expected = expect(spec, *inputs)

    def judge(start: Finding, operator: Operator) -> Finding:
        output = operator(*inputs)
        if problem := mismatch(spec, output):
            return replace(start, reason=problem)
        measured, ratio = measure_rounding(spec, expected, output), expected.ratio(output)
        worst = find_worst(spec, output, expected.exact, ratio)
        outside = int((ratio > 1).sum())
        reason = f"{outside} of {ratio.numel()} outputs are beyond their error bound; {worst}" if outside else ""
        return replace(
            start,
            status="fail" if outside else "pass",
            reason=reason,
            rounding=measured,
            worst=worst,
            phases=phase_map(spec, ratio),
        )

    blank = Finding(spec.name, "", "rounding", name, "fail", seed=seed)
    yield from _judge(spec, compared, blank, judge)


def _special(spec: ConvTranspose2dSpec, compared: Sequence[Implementation], seed: int) -> Iterator[Finding]:
    for case, inputs in special_inputs(spec, seed):

        def judge(start: Finding, operator: Operator, case: Any = case, inputs: Any = inputs) -> Finding:
            found = judge_special(spec, case, inputs, operator)
            status: Status = "fail" if found.wrong else "limitation" if found.border else "pass"
            return replace(start, status=status, reason=found.reason)

        blank = Finding(spec.name, "", "special", case.name, "fail", seed=seed)
        yield from _judge(spec, compared, blank, judge)


def _determinism(
    spec: ConvTranspose2dSpec, implementation: Implementation, seed: int, threads: Sequence[int], runs: int
) -> Iterator[Finding]:
    blank = Finding(spec.name, implementation.name, "determinism", "runs", "fail", seed=seed)
    try:
        with torch.inference_mode():
            for data, problem in compare_repeats(spec, implementation.make, seed=seed, threads=threads, runs=runs):
                yield replace(blank, data=data, status="fail" if problem else "pass", reason=problem)
    except RefusedError as error:
        yield replace(blank, status=error.refusal.status, reason=error.refusal.reason)
    except Exception as error:  # recorded as this implementation's status, so that the others are still examined
        yield replace(blank, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
