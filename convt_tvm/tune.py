"""What an autotuning session is made of: candidates of a workload, this machine, its log, processes for trials."""

import itertools
import os
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from convt_tvm.bench import current_commit, measure_target_limits
from convt_tvm.database import log_directory, relatives
from convt_tvm.errors import BuildError, TuningError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.machine import machine, machine_key
from convt_tvm.measure import interleaved
from convt_tvm.place import Place
from convt_tvm.records import GENERIC, OWN, SOURCE_DIGITS, Context, SessionInfo, Trial
from convt_tvm.search import Known, Search
from convt_tvm.session import Outcome, Progress, Proposer, run_session
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import Store
from convt_tvm.target import Target
from convt_tvm.trials import Builders, LocalRunner, Runner
from convt_tvm.workloads import Workload

__all__ = ["EFFORTS", "Budget", "tune"]


@dataclass(frozen=True, slots=True)
class Budget:
    """After how many trials, those of earlier runs included, and after how many minutes of this run a session ends."""

    trials: int
    minutes: float


EFFORTS: Mapping[str, Budget] = MappingProxyType(
    {"quick": Budget(32, 5), "normal": Budget(64, 10), "full": Budget(512, 60)}
)
"""What ``--effort`` means: a first look, what finds at least 95 % of the best, and about everything."""

MAX_LESSONS = 400
"""Trials of other workloads that a search learns from, the most similar workloads first."""


def tune(
    workload: Workload,
    target: str | Target = "llvm",
    *,
    budget: Budget,
    effort: str,
    threads: int,
    logs: Path,
    seed: int = 0,
    space: str = OWN,
    wait_secs: float = 0,
    rpc: tuple[str, str] | None = None,
    observe: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Tune one workload on this machine, going on from what its log holds.

    Parameters
    ----------
    budget
        When to stop. A run that finds its trials done measures nothing.
    threads
        Of the kernel. What is found for one number says nothing about another.
    logs
        Where the log is or will be, and those of other workloads to learn from.
    space
        What to search: `convt_tvm.records.OWN` or ``GENERIC``.
    wait_secs
        How long to wait for another session that is writing to the same log.
    rpc
        Address of a TVM RPC tracker, and the key of the servers that check and time; this machine then only builds.
    observe
        Called after each trial.

    Raises
    ------
    BuildError
        If no schedule space applies, or the default cannot be built.
    IncompatibleMachineError
        If this machine lacks a feature of `target`.
    TuningError
        If another session is writing to the log, or the best could not be measured again.
    """
    from convt_tvm.compiler import best_choice
    from convt_tvm.space import choices

    spec = workload.spec
    resolved = Target.parse(target).for_dtype(spec.dtype)
    if space == GENERIC and resolved.kind != "llvm":
        raise TuningError(f"TVM's own space is searched with its rules for llvm only, not for {resolved.name}.")
    if not spec.n:
        raise TuningError(f"{spec.name} has no batch to time; tune the workload with n=1 or another batch size.")
    if rpc is None:
        resolved.require_host()
    found = choices(spec, resolved)
    if not found:
        raise BuildError(f"no schedule space applies to {spec.name} on {resolved.name}; there is nothing to tune.")
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(log_directory(logs, spec, resolved), wait_secs=wait_secs))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="convt-tvm-tune-")))
        builders = Builders(spec, resolved, scratch, min(machine().cores, 4))
        stack.callback(builders.close)
        runner: Runner
        peak_gflops = torch_time = None
        place, there_key = Place.of(resolved), None
        if rpc is None:
            there, there_key = machine(), machine_key(resolved)
            peak_gflops = measure_target_limits(spec, resolved, threads).flops_per_sec / 1e9
            torch_time = torch_us(spec, place, threads, seed)
            runner = LocalRunner(spec, scratch, threads, seed, place.device)
            stack.callback(runner.close)
        else:
            from convt_tvm.remote import RemoteRunner

            runner = RemoteRunner(spec, scratch, threads, *rpc, seed)
            stack.callback(runner.close)
            there = runner.require(resolved)
        context = Context(resolved.name, there_key or there.key, threads)
        default = found[0]
        search: Proposer
        if space == OWN:
            known = [(choice.candidate, choice.cycles) for choice in found]
            search = Search(spec, known, seed=seed, elsewhere=lessons(logs, spec, context))
        else:
            from convt_tvm.generic import GenericSearch

            earlier = [trial.candidate for trial in store.read(Trial).records if trial.candidate.space == GENERIC]
            search = GenericSearch(spec, resolved, threads=threads, seed=seed, earlier=earlier)
            default = best_choice(spec, resolved, threads=threads, logs=logs)
        info = SessionInfo(
            context=context,
            source=source_fingerprint()[:SOURCE_DIGITS],
            session=secrets.token_hex(4),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            workload=workload.name,
            spec=spec.name,
            space=space,
            candidates=len(found) if space == OWN else 0,
            default=default.candidate,
            trials=budget.trials,
            budget_secs=budget.minutes * 60,
            seed=seed,
            effort=effort,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            machine_info={**there.to_json(), **place.describe()},
            commit=current_commit(),
            host=socket.gethostname(),
            pid=os.getpid(),
            peak_gflops=peak_gflops,
            torch_us=torch_time,
        )
        outcome = run_session(
            info,
            store,
            search,
            builders,
            runner,
            observe=observe,
            still_applies=lambda trial: is_same_code(spec, resolved, trial),
        )
        if outcome.result is not None and outcome.result.session == info.session:
            from convt_tvm.metaschedule import commit

            commit(store, spec, resolved, outcome.result)
        return outcome


def torch_us(spec: ConvTranspose2dSpec, place: Place, threads: int, seed: int) -> float:
    """Microseconds that torch eager takes, for the progress display; `bench` compares properly."""
    import torch

    from convt_tvm.check import torch_eager
    from convt_tvm.reference import normal_inputs

    torch.set_num_threads(threads)
    inputs, run = place.put(normal_inputs(spec, seed)), torch_eager(spec)
    with torch.inference_mode():
        functions = {"torch": lambda: run(*inputs)}
        settle_secs = place.settle_secs(0.005)
        samples = interleaved(
            functions, rounds=3, min_sample_secs=0.01, settle_secs=settle_secs, time_calls=place.time_calls()
        )
    return float(f"{min(samples['torch']):.5g}")


def lessons(logs: Path, spec: ConvTranspose2dSpec, context: Context) -> list[Known]:
    """What trials of other workloads teach, the most similar workloads first."""
    from convt_tvm.search import spec_distance

    known = [
        Known(other, trial.candidate, trial.cycles, trial.best_us)
        for other, trial in relatives(logs, spec, context)
        if trial.cycles and trial.best_us and trial.candidate.space == OWN
    ]
    known.sort(key=lambda each: spec_distance(each.spec, spec))
    return list(itertools.islice(known, MAX_LESSONS))


def is_same_code(spec: ConvTranspose2dSpec, target: Target, trial: Trial) -> bool:
    """Whether a stored trial's candidate still lowers to the code that was measured; failed ones have none."""
    from convt_tvm.compiler import lower_choice
    from convt_tvm.space import find_choice

    # A trace need not apply to a declaration that has changed; and two lowerings of one hash to different digests.
    if trial.candidate.space != OWN:
        return False
    choice = find_choice(spec, target, trial.candidate) if trial.digest else None
    return choice is not None and lower_choice(spec, target, choice).code == trial.digest
