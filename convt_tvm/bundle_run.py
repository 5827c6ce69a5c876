"""What a bundle does on the machine that it was carried to: checks, compares with torch, tunes, and leaves the results.

Each step of each entry is a job of a process of its own, so that a kernel that crashes or hangs costs itself and no
more. What is written down is not done again: the same command goes on after a budget or an interrupt. TVM's compiler is
not needed; where it is, tuning uses it.

| in the results | is |
|---|---|
| ``check.jsonl`` | a `convt_tvm.check.CheckRow` for each entry: integers bit for bit, real numbers within their bound |
| ``bench.jsonl`` | rows for `convt-tvm report` |
| ``tuning_logs/`` | logs for `convt-tvm tune --merge` |
| ``log.txt`` | what was printed |
| ``results.zip`` | all of them in one file |
"""

import argparse
import importlib.util
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convt_tvm.bundle import Bundle, Carried, Entry
from convt_tvm.errors import ConvTError, IncompatibleMachineError
from convt_tvm.json_lines import append_values, read_lines
from convt_tvm.machine import machine, machine_key
from convt_tvm.records import OWN, SOURCE_DIGITS, Candidate, Context, SessionInfo
from convt_tvm.search import Proposal
from convt_tvm.session import Outcome, run_session
from convt_tvm.store import Store
from convt_tvm.trials import Built, LocalRunner, runner_process
from convt_tvm.workers import Worker, serve

__all__ = ["main"]

STEPS = ("check", "bench", "tune")
CHECK, BENCH, LOGS, PRINTED, PACKED = "check.jsonl", "bench.jsonl", "tuning_logs", "log.txt", "results.zip"
TIMEOUT_SECS = 900
FAILED, USAGE = 1, 2


def main(directory: str, arguments: Sequence[str]) -> int:
    """Run the bundle unpacked in `directory`; returns 0, or 1 where something failed, or 2 for what is no usage."""
    bundle = Bundle.from_json(json.loads(Path(directory, "bundle.json").read_text(encoding="utf-8")))
    options = _parse(arguments)
    with ExitStack() as stack:
        if bundle.emulated:
            from convt_tvm.emulated_torch import emulated_gpu

            stack.enter_context(emulated_gpu())
        try:
            _require(bundle)
        except ConvTError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        options.output.mkdir(parents=True, exist_ok=True)
        return _Run(bundle, Path(directory), options).run()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 BUNDLE", description="Check, time and tune the kernels of this bundle on this machine."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("convt-tvm-results"), help="directory of the results (%(default)s)"
    )
    parser.add_argument(
        "--steps", default=",".join(STEPS), type=_steps, metavar="STEP,...", help="of %(default)s, in this order"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument(
        "--peers", default="", metavar="NAME,...", help="what to compare with; by default all there are"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of each contender (%(default)s)")
    parser.add_argument("--cold", action="store_true", help="overwrite a GPU's second cache before each call")
    parser.add_argument("--list", action="store_true", help="print what is in the bundle, and do nothing")
    return parser.parse_args(list(arguments))


def _steps(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"there is no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    return [name for name in STEPS if name in wanted]


def _require(bundle: Bundle) -> None:
    """Raise IncompatibleMachineError unless this machine runs what the bundle holds."""
    for target in {entry.target for entry in bundle.entries}:
        target.require_host()
    if any(entry.target.kind == "cuda" for entry in bundle.entries):
        import torch

        if not torch.cuda.is_available():
            raise IncompatibleMachineError(
                f"torch {torch.__version__} sees no GPU, though the driver does; install a build for CUDA 13."
            )


class _Run:
    def __init__(self, bundle: Bundle, root: Path, options: argparse.Namespace) -> None:
        self.bundle, self.root, self.options = bundle, root, options
        self.output: Path = options.output
        self.deadline = time.monotonic() + 60 * options.minutes
        self.failures = 0

    def run(self) -> int:
        steps = [(step, entry) for step in self.options.steps for entry in self.bundle.entries]
        if self.options.list:
            for entry in self.bundle.entries:
                print(f"{entry.workload}  {entry.spec.name}  {entry.target.name}  {len(entry.candidates)} candidates")
            return 0
        worker = Worker("convt_tvm.bundle_run", ["--emulate"] if self.bundle.emulated else [])
        self.timer = runner_process()
        left = 0
        try:
            for number, (step, entry) in enumerate(steps, 1):
                if self._is_done(step, entry):
                    continue
                if time.monotonic() >= self.deadline:
                    left += 1
                    continue
                begun = time.monotonic()
                said = getattr(self, f"_{step}")(worker, entry)
                self._say(f"{number}/{len(steps)} {step} {entry.workload} ({entry.target.key}): {said}", begun)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
        finally:
            worker.kill()
            self.timer.kill()
            self._pack()
        if left:
            self._say(f"{left} steps are left; the same command goes on")
        self._say(f"the results are in {self.output / PACKED}")
        return FAILED if self.failures else 0

    def _say(self, line: str, begun: float | None = None) -> None:
        if begun is not None:
            line += f" ({time.monotonic() - begun:.1f} s)"
        print(line, flush=True)
        with (self.output / PRINTED).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n")

    def _is_done(self, step: str, entry: Entry) -> bool:
        if step == "tune":
            return False
        rows = _read(self.output / (CHECK if step == "check" else BENCH))
        wanted = (*entry.key, False if step == "check" else self.options.cold)
        return any((row["spec"], row["target"], row.get("cold", False)) == wanted for row in rows)

    def _job(self, step: str, entry: Entry) -> dict[str, Any]:
        return {
            "step": step,
            "entry": entry.to_json(),
            "root": str(self.root),
            "peers": [name for name in self.options.peers.split(",") if name],
            "rounds": self.options.rounds,
            "cold": self.options.cold,
            "commit": self.bundle.commit,
        }

    def _check(self, worker: Worker, entry: Entry) -> str:
        answer = worker.ask(self._job("check", entry), TIMEOUT_SECS)
        row = answer.value
        if row is None:
            row = _unchecked(entry, f"{answer.status}: {answer.error}")
        append_values(self.output / CHECK, [row])
        self.failures += row["verdict"] != "good"
        if row["verdict"] != "good":
            # What a kernel has broken on a GPU stays broken in its process.
            worker.kill()
        return f"{row['verdict']}{': ' * bool(row['reason'])}{row['reason']}"

    def _bench(self, worker: Worker, entry: Entry) -> str:
        checked = [row for row in _read(self.output / CHECK) if (row["spec"], row["target"]) == entry.key]
        if any(row["verdict"] != "good" for row in checked):
            return "not timed, its answers are wrong"
        answer = worker.ask(self._job("bench", entry), TIMEOUT_SECS)
        if answer.status != "ok":
            self.failures += 1
            worker.kill()
            return f"{answer.status}: {answer.error}"
        append_values(self.output / BENCH, answer.value)
        times = [f"{row['implementation']} {_time_or_status(row)}" for row in answer.value]
        self.failures += answer.value[0]["status"] != "ok"
        return ", ".join(times)

    def _tune(self, worker: Worker, entry: Entry) -> str:
        # Its process holds the GPU's memory, and would run beside the one that times.
        worker.kill()
        logs = self.output / LOGS
        try:
            outcome = self._search(entry, logs)
        except ConvTError as error:
            self.failures += 1
            return f"failed: {error}"
        if outcome is None:
            return "no candidates in the bundle, and no compiler here"
        self.failures += outcome.result is None
        found = outcome.result
        if found is None:
            return f"nothing could be timed: {dict(outcome.failures)}"
        which = str(found.candidate) if found.tuned else "the default"
        return (
            f"{outcome.trials} trials, {outcome.stopped}: {which} {found.median_us:.4g} us, default "
            f"{found.default_us:.4g} us"
        )

    def _search(self, entry: Entry, logs: Path) -> Outcome | None:
        budget_secs = max(60.0, min(600.0, self.deadline - time.monotonic()))
        if _has_compiler(entry):
            from convt_tvm.tune import EFFORTS, Budget, tune
            from convt_tvm.workloads import Workload

            workload = Workload(entry.workload, "", entry.spec)
            budget = Budget(EFFORTS["normal"].trials, budget_secs / 60)
            return tune(workload, entry.target, budget=budget, effort="normal", threads=_threads(entry), logs=logs)
        if not entry.candidates:
            return None
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="convt-tvm-tune-")))
            store = stack.enter_context(Store.open(logs / entry.target.key / entry.spec.name))
            device = "cuda" if entry.target.kind == "cuda" else "cpu"
            runner = LocalRunner(entry.spec, scratch, _threads(entry), device=device, worker=self.timer)
            builder = _CarriedBuilder(entry.candidates, self.root, scratch)
            info = self._session_info(entry, budget_secs)
            return run_session(info, store, _InOrder(entry.candidates), builder, runner)

    def _session_info(self, entry: Entry, budget_secs: float) -> SessionInfo:
        from convt_tvm.place import Place

        here = machine()
        return SessionInfo(
            context=Context(entry.target.name, machine_key(entry.target) or here.key, _threads(entry)),
            source=self.bundle.source[:SOURCE_DIGITS],
            session=secrets.token_hex(4),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            workload=entry.workload,
            spec=entry.spec.name,
            space=OWN,
            candidates=len(entry.candidates),
            default=entry.candidates[0].candidate,
            trials=len(entry.candidates),
            budget_secs=budget_secs,
            seed=0,
            effort="normal",
            command="a bundle",
            machine_info={**here.to_json(), **Place.of(entry.target).describe()},
            commit=self.bundle.commit,
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def _pack(self) -> None:
        files = [
            path for path in sorted(self.output.rglob("*")) if path.is_file() and path.name not in (PACKED, ".lock")
        ]
        with zipfile.ZipFile(self.output / PACKED, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, path.relative_to(self.output))


class _InOrder:
    """A search that proposes what the bundle carries, in its order."""

    def __init__(self, candidates: Sequence[Carried]) -> None:
        self._candidates = candidates

    def propose(self, measured: Mapping[str, float | None], count: int) -> list[Proposal]:
        """The first `count` that were not measured."""
        left = [each for each in self._candidates if each.candidate.key not in measured]
        return [Proposal(each.candidate, each.cycles, None, "rule") for each in left[:count]]


class _CarriedBuilder:
    """A builder that finds candidates in the bundle; the session may delete the copies that it gives."""

    def __init__(self, candidates: Sequence[Carried], root: Path, scratch: Path) -> None:
        self._carried = {each.candidate.key: each for each in candidates}
        self._root, self._scratch = root, scratch

    def build(self, candidates: Sequence[Candidate]) -> Iterator[Built]:
        """Copies of what was compiled beforehand."""
        from convt_tvm.artifact import read_manifest

        for candidate in candidates:
            carried = self._carried[candidate.key]
            directory = self._scratch / Path(carried.directory).name
            shutil.copytree(self._root / carried.directory, directory, dirs_exist_ok=True)
            trace = tuple(read_manifest(directory).trace)
            yield Built(candidate, "ok", directory=directory, digest=carried.digest, trace=trace)

    def close(self) -> None:
        """Nothing runs."""


def _has_compiler(entry: Entry) -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("tvm", "xgboost")):
        return False
    if entry.target.kind != "cuda":
        return True
    from convt_tvm.cuda_toolkit import find_toolkit
    from convt_tvm.errors import BuildError

    try:
        find_toolkit()
    except BuildError:
        return False
    return True


def _threads(entry: Entry) -> int:
    return 1 if entry.target.kind == "cuda" else machine().cores


def _time_or_status(row: Mapping[str, Any]) -> str:
    return str(row["status"]) if row["median_us"] is None else f"{row['median_us']:.4g} us"


def _read(path: Path) -> list[dict[str, Any]]:
    return read_lines(path, dict[str, Any]) if path.exists() else []


# Within the process that does the steps.


def _unchecked(entry: Entry, reason: str) -> dict[str, Any]:
    from convt_tvm.check import CheckRow

    shape, target = entry.spec.output_shape, entry.target.name
    return CheckRow(entry.workload, entry.spec.name, shape, target, _threads(entry), 0, reason=reason).to_json()


def _do(job: dict[str, Any]) -> Any:
    entry = Entry.from_json(job["entry"])
    steps: dict[str, Callable[..., Any]] = {"check": _do_check, "bench": _do_bench}
    return steps[job["step"]](entry, Path(job["root"]) / entry.directory, job)


def _do_check(entry: Entry, artifact: Path, job: dict[str, Any]) -> dict[str, Any]:
    from convt_tvm import runtime
    from convt_tvm.check import CheckRow, compare_kernel

    kernel = runtime.load(artifact)
    found = compare_kernel(kernel)
    row = CheckRow(
        entry.workload,
        entry.spec.name,
        entry.spec.output_shape,
        entry.target.name,
        _threads(entry),
        0,
        schedule=kernel.manifest.schedule,
        verdict="bad" if found.reason else "good",
        **asdict(found),
    )
    return row.to_json()


def _do_bench(entry: Entry, artifact: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    from convt_tvm.bench import bench
    from convt_tvm.peers import GPU_PEERS, PEERS
    from convt_tvm.place import Place
    from convt_tvm.workloads import Workload

    place = Place.of(entry.target, cold=job["cold"])
    rows = bench(
        Workload(entry.workload, "", entry.spec),
        entry.target,
        peers=job["peers"] or (GPU_PEERS if place.device == "cuda" else tuple(PEERS)),
        threads=_threads(entry),
        place=place,
        rounds=job["rounds"],
        artifact=artifact,
        default=None if entry.default is None else Path(job["root"]) / entry.default,
    )
    return [replace(row, commit=job["commit"]).to_json() for row in rows]


if __name__ == "__main__":
    with ExitStack() as emulating:
        if "--emulate" in sys.argv:
            from convt_tvm.emulated_torch import emulated_gpu

            emulating.enter_context(emulated_gpu())
        serve(_do)
