"""One trial: a candidate is built in one process, then checked and timed in another.

Builder and runner are processes of their own that stay alive: a candidate that crashes or hangs costs a trial and
never the session, and TVM is imported once. Neither imports ``tvm.s_tir.tensor_intrin``, as MetaSchedule's own workers
do, for 25 to 45 s. The runner needs no compiler at all. Building and timing alternate, so that nothing else runs while
a candidate is timed.

Run as ``python -m convt_tvm.trials build|run`` this module is such a process.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from convt_tvm.errors import TuningError
from convt_tvm.records import Candidate, Status
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workers import Answer, Worker, serve, work_through

__all__ = [
    "BUILD_TIMEOUT_SECS",
    "Builder",
    "Builders",
    "Built",
    "LocalRunner",
    "Measured",
    "Runner",
    "answer_build",
    "build_job",
    "builder_processes",
    "exact_inputs",
    "runner_process",
    "wrong_answer",
]

BUILD_TIMEOUT_SECS = 60
"""A hundred times what a usual candidate takes; those with very large bodies would take minutes."""
RUN_TIMEOUT_SECS = 60
RACE_TIMEOUT_SECS = 600
SAMPLES = 5
SAMPLE_SECS = 0.01
SETTLE_SECS = 0.005
HOPELESS = 2.5
"""How many times slower than the best a candidate's first sample is for there to be no other."""
INPUTS_FILE = "inputs.pt"


@dataclass(frozen=True, slots=True)
class Built:
    """A candidate with its code, or why there is none: then ``status`` is not ``ok``."""

    candidate: Candidate
    status: Status
    error: str = ""
    directory: Path | None = None
    digest: str = ""
    trace: tuple[Any, ...] = ()
    secs: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What checking and timing gave; ``status`` is ``ok`` only if the answer was exact."""

    status: Status
    error: str = ""
    samples_us: tuple[float, ...] = ()
    secs: float = 0.0


class Builder(Protocol):
    """What a session needs for building."""

    def build(self, candidates: Sequence[Candidate]) -> Iterator[Built]:
        """Build candidates, each to a directory of its own, in any order."""

    def close(self) -> None:
        """End what runs, at once."""


class Runner(Protocol):
    """What a session needs for checking and timing."""

    def run(self, built: Built, best_us: float) -> Measured:
        """Check one candidate and time it; `best_us` is the fastest so far, or infinity."""

    def race(self, built: Sequence[Built], rounds: int) -> list[tuple[float, ...]]:
        """Time candidates by turns, so many samples each; raises TuningError if that fails."""

    def close(self) -> None:
        """End what runs, at once."""


def builder_processes(count: int) -> list[Worker]:
    """So many processes that answer builders' jobs."""
    return [Worker("convt_tvm.trials", ["build", *_emulate()]) for _ in range(count)]


class Builders:
    """Local builder processes."""

    def __init__(self, spec: ConvTranspose2dSpec, target: Target, directory: Path, processes: int) -> None:
        self._workers = builder_processes(processes)
        self._spec, self._target = spec, target
        self._directory = directory
        self._count = 0

    def build(self, candidates: Sequence[Candidate]) -> Iterator[Built]:
        """Build candidates; those that fail come back with the cause."""
        directories, jobs = [], []
        for candidate in candidates:
            self._count += 1
            directories.append(self._directory / f"candidate{self._count}")
            jobs.append(build_job(self._spec, self._target, candidate, directories[-1]))
        for number, answer in work_through(self._workers, jobs, BUILD_TIMEOUT_SECS):
            candidate = candidates[number]
            if answer.status == "ok":
                values = answer.value
                yield Built(
                    candidate,
                    "ok",
                    directory=directories[number],
                    digest=values["digest"],
                    trace=tuple(values["trace"]),
                    secs=values["secs"],
                )
            else:
                status: Status = "build_failed" if answer.status == "failed" else answer.status
                yield Built(candidate, status, error=f"building: {answer.error}")

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()


def _emulate() -> list[str]:
    """What tells a process of this module to see the emulated GPU, if this process does."""
    from convt_tvm.emulator import shows_gpu

    return ["--emulate"] if shows_gpu() else []


def runner_process() -> Worker:
    """A process that answers runners' jobs."""
    return Worker("convt_tvm.trials", ["run", *_emulate()])


class LocalRunner:
    """A process on this machine that checks and times, with `threads` threads or on its GPU.

    It may be one `runner_process` for several runners that follow each other: starting one takes longer than a trial.
    """

    def __init__(
        self,
        spec: ConvTranspose2dSpec,
        directory: Path,
        threads: int,
        seed: int = 0,
        device: str = "cpu",
        worker: Worker | None = None,
    ) -> None:
        import torch

        path = directory / INPUTS_FILE
        torch.save(exact_inputs(spec, seed), path)
        self._worker = worker or runner_process()
        self._job = {"inputs": str(path), "threads": threads, "device": device}

    def run(self, built: Built, best_us: float) -> Measured:
        """Check one candidate and time it, in the process that all of them share while none of them ends it."""
        start = perf_counter()
        limit = HOPELESS * best_us if math.isfinite(best_us) else None
        job = {**self._job, "directories": [str(built.directory)], "rounds": SAMPLES, "limit_us": limit}
        return measured(self._worker.ask(job, RUN_TIMEOUT_SECS), perf_counter() - start)

    def race(self, built: Sequence[Built], rounds: int) -> list[tuple[float, ...]]:
        """Time candidates by turns in one process."""
        directories = [str(each.directory) for each in built]
        job = {**self._job, "directories": directories, "rounds": rounds, "limit_us": None}
        return raced(self._worker.ask(job, RACE_TIMEOUT_SECS))

    def close(self) -> None:
        """End the process."""
        self._worker.kill()


def measured(answer: Answer, secs: float) -> Measured:
    """What a runner's answer about one candidate says."""
    if answer.status != "ok":
        status: Status = "run_failed" if answer.status == "failed" else answer.status
        return Measured(status, f"running: {answer.error}", secs=secs)
    if answer.value["wrong"]:
        return Measured("wrong", answer.value["wrong"], secs=secs)
    return Measured("ok", samples_us=tuple(answer.value["samples_us"][0]), secs=secs)


def raced(answer: Answer) -> list[tuple[float, ...]]:
    """What a runner's answer about several candidates says; raises TuningError if it could not time them all."""
    if answer.status != "ok" or answer.value["wrong"]:
        why = answer.error or answer.value["wrong"]
        raise TuningError(f"the finalists could not be measured again: {why}; run the session again.")
    return [tuple(samples) for samples in answer.value["samples_us"]]


def exact_inputs(spec: ConvTranspose2dSpec, seed: int) -> dict[str, Any]:
    """What a runner needs: integer inputs with their exact answer, and normal ones for timing."""
    from convt_tvm.reference import integer_inputs, normal_inputs, reference

    integers = integer_inputs(spec, seed)
    return {
        "integers": integers,
        "exact": reference(spec, *integers).to(integers[0].dtype),
        "normal": normal_inputs(spec, seed),
    }


def wrong_answer(output: Any, exact: Any) -> str:
    """How many outputs differ from the exact ones; empty if none does."""
    # A NaN, which the output held before, equals nothing.
    differs = output != exact
    count = int(differs.sum())
    if not count:
        return ""
    where = tuple(int(index) for index in differs.nonzero()[0])
    return (
        f"{count} of {differs.numel()} outputs are wrong on integers; at {where} it is {output[where].item():.9g} "
        f"instead of {exact[where].item():.9g}"
    )


def build_job(
    spec: ConvTranspose2dSpec, target: Target, candidate: Candidate | None, directory: Path, *, tuned: bool = True
) -> dict[str, Any]:
    """A job for a builder: a candidate, or what `build` takes, tuned or by the rule, to be built in a directory."""
    chosen = None if candidate is None else candidate.to_json()
    return {
        "spec": spec.to_json(),
        "target": target.to_json(),
        "candidate": chosen,
        "tuned": tuned,
        "directory": str(directory),
    }


def answer_build(job: dict[str, Any]) -> dict[str, Any]:
    """Answer a builder's job; raises BuildError, or TuningError for what is no candidate."""
    from convt_tvm.compiler import build_artifact
    from convt_tvm.space import find_choice

    start = perf_counter()
    spec, target = ConvTranspose2dSpec.from_json(job["spec"]), Target.from_json(job["target"])
    choice = None
    if job["candidate"] is not None:
        candidate = Candidate.from_json(job["candidate"])
        choice = find_choice(spec, target, candidate)
        if choice is None:
            raise TuningError(f"{candidate} is no candidate for {spec.name}")
    manifest = build_artifact(spec, target, Path(job["directory"]), choice=choice, tuned=job["tuned"], lasting=False)
    return {"digest": manifest.tuning["code"], "trace": manifest.trace, "secs": perf_counter() - start}


def _make_run() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that answers a runner's jobs, and keeps the inputs from one to the next."""
    import torch

    from convt_tvm import runtime
    from convt_tvm.measure import interleaved
    from convt_tvm.place import Place
    from convt_tvm.reference import empty_output

    inputs: dict[str, Any] = {}

    def run(job: dict[str, Any]) -> dict[str, Any]:
        place = Place(job["device"])
        if inputs.get("path") != job["inputs"]:
            inputs.clear()
            inputs.update(torch.load(job["inputs"]), path=job["inputs"])
            inputs.update({kind: place.put(inputs[kind]) for kind in ("integers", "normal")})
            runtime.set_num_threads(job["threads"])
        functions: dict[str, Callable[[], object]] = {}
        for number, directory in enumerate(job["directories"]):
            kernel = runtime.load(Path(directory))
            input, weight, bias = inputs["integers"]
            out = empty_output(kernel.spec, input)
            kernel(input, kernel.pack(weight), bias, out=out)
            if wrong := wrong_answer(out.cpu(), inputs["exact"]):
                return {"wrong": wrong}
            input, weight, bias = inputs["normal"]
            functions[str(number)] = _call(kernel, input, kernel.pack(weight), bias, out)
        time = partial(
            interleaved,
            functions,
            min_sample_secs=SAMPLE_SECS,
            settle_secs=place.settle_secs(SETTLE_SECS),
            time_calls=place.time_calls(),
        )
        samples = time(rounds=1)
        if job["limit_us"] is None or samples["0"][0] <= job["limit_us"]:
            more = time(rounds=job["rounds"] - 1)
            samples = {name: first + more[name] for name, first in samples.items()}
        return {"wrong": "", "samples_us": [[float(f"{us:.5g}") for us in each] for each in samples.values()]}

    return run


def _call(kernel: Any, input: Any, packed: Any, bias: Any, out: Any) -> Callable[[], object]:
    return lambda: kernel(input, packed, bias, out=out)


def main(arguments: Sequence[str]) -> None:
    """Be a builder or a runner until stdin ends."""
    with ExitStack() as stack:
        if "--emulate" in arguments:
            from convt_tvm.emulated_torch import emulated_gpu

            stack.enter_context(emulated_gpu())
        serve(answer_build if arguments[0] == "build" else _make_run())


if __name__ == "__main__":
    main(sys.argv[1:])
