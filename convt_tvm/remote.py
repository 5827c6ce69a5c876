"""Checking and timing on other machines, over TVM's RPC tracker and servers.

The tracker hands out whichever server with the key is free. A server that dies, or takes a candidate with it, costs
one attempt: the candidate is tried again on the next server, and counts as crashed if that fails too. Where no server
is left after that, the session ends, and the next one goes on. The client runs in a process of its own, ``python -m
convt_tvm.remote``, which is killed where a connection hangs.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from convt_tvm.artifact import read_manifest
from convt_tvm.errors import IncompatibleMachineError, TuningError
from convt_tvm.machine import Machine, machine
from convt_tvm.manifest import KERNEL_FILE
from convt_tvm.processor import host_architecture
from convt_tvm.spec import MEMORY_ORDER, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.trials import (
    HOPELESS,
    INPUTS_FILE,
    RUN_TIMEOUT_SECS,
    SAMPLE_SECS,
    SAMPLES,
    Built,
    Measured,
    exact_inputs,
    measured,
    raced,
    wrong_answer,
)
from convt_tvm.workers import Answer, Worker, serve

__all__ = ["RemoteRunner"]

ATTEMPTS = 3
CONNECT_SECS = 60
"""A server takes 5 to 10 s to register again after each session."""
SESSION_SECS = 10 * RUN_TIMEOUT_SECS
"""After which a server ends a session, and with it a candidate that hangs; the next job gets a new one."""
_BIG_CORES = 1  # ThreadGroup::kBig in TVM's threading_backend.h


class RemoteRunner:
    """Checks and times on servers of a tracker, with `threads` threads.

    Parameters
    ----------
    address
        ``HOST:PORT`` of the tracker.
    key
        Servers of one key are taken to be alike: the same processor.
    """

    def __init__(
        self, spec: ConvTranspose2dSpec, directory: Path, threads: int, address: str, key: str, seed: int = 0
    ) -> None:
        import torch

        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise TuningError(f"the tracker's address {address!r} is no HOST:PORT such as 127.0.0.1:9190.")
        torch.save(exact_inputs(spec, seed), directory / INPUTS_FILE)
        self._worker = Worker("convt_tvm.remote")
        self._lost = False
        self._job = {
            "inputs": str(directory / INPUTS_FILE),
            "threads": threads,
            "host": host,
            "port": int(port),
            "key": key,
        }

    def _ask(self, job: dict[str, Any], timeout_secs: float) -> Answer:
        """An answer, after further attempts where a server was lost."""
        for attempt in range(1, ATTEMPTS + 1):
            answer = self._worker.ask({**self._job, **job}, timeout_secs)
            if answer.status == "ok" or attempt == ATTEMPTS:
                break
            # With the client goes its session; the next attempt asks the tracker for another server.
            self._worker.kill()
        return answer if answer.status != "failed" else Answer("crashed", error=answer.error)

    def machine(self) -> Machine:
        """The machine of the server that answers first, by its /proc/cpuinfo."""
        answer = self._ask({"directories": [], "rounds": 0, "limit_us": None}, CONNECT_SECS + RUN_TIMEOUT_SECS)
        if answer.status != "ok":
            raise TuningError(
                f"no server with the key {self._job['key']!r} answered at {self._job['host']}:{self._job['port']}: "
                f"{answer.error}; look with `python -m tvm.exec.query_rpc_tracker`."
            )
        return machine(answer.value["cpuinfo"])

    def require(self, target: Target) -> Machine:
        """The machine, which has to have all features of `target`."""
        there = self.machine()
        if missing := sorted(set(target.features) - set(there.features)):
            raise IncompatibleMachineError(
                f"the servers' processor, {there.cpu}, lacks {', '.join(missing)}; name another --target, for example "
                f"llvm:x86-64-v3."
            )
        return there

    def run(self, built: Built, best_us: float) -> Measured:
        """Check and time one candidate; raises TuningError if the one before it left no server."""
        if self._lost:
            self.machine()
        start = perf_counter()
        limit = HOPELESS * best_us if math.isfinite(best_us) else None
        job = {"directories": [str(built.directory)], "rounds": SAMPLES, "limit_us": limit}
        answer = self._ask(job, CONNECT_SECS + RUN_TIMEOUT_SECS)
        self._lost = answer.status != "ok"
        return measured(answer, perf_counter() - start)

    def race(self, built: Sequence[Built], rounds: int) -> list[tuple[float, ...]]:
        """Time candidates by turns on one server."""
        job = {"directories": [str(each.directory) for each in built], "rounds": rounds, "limit_us": None}
        return raced(self._ask(job, CONNECT_SECS + 10 * RUN_TIMEOUT_SECS))

    def close(self) -> None:
        """End the client."""
        self._worker.kill()


_numbers = itertools.count()
"""Of the files sent: one that a server has loaded must not be overwritten, or its code would change under it."""
_sessions: list[Any] = []
"""The client's session, if it has one: a server gives its next client nothing before the last one is gone."""


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Answer a job, on the server that the first one was given."""
    import torch
    import tvm
    from tvm import rpc

    from convt_tvm.reference import empty_output

    if not _sessions:
        tracker = rpc.connect_tracker(job["host"], job["port"])
        _sessions.append(tracker.request(job["key"], session_timeout=SESSION_SECS, max_retry=3))
    remote = _sessions[0]
    if not job["directories"]:
        return {"cpuinfo": _read_cpuinfo(remote), "wrong": ""}
    remote.get_function("runtime.config_threadpool")(_BIG_CORES, job["threads"])
    device, inputs = remote.cpu(0), torch.load(job["inputs"])

    def send(tensor: torch.Tensor, axes: str = "") -> Any:
        if axes:
            tensor = tensor.permute(MEMORY_ORDER[axes])
        return tvm.runtime.empty(tensor.shape, str(tensor.dtype).removeprefix("torch."), device).copyfrom(
            tvm.runtime.from_dlpack(tensor)
        )

    timed = []
    for directory in job["directories"]:
        manifest = read_manifest(Path(directory))
        name = f"kernel{next(_numbers)}.so"
        remote.upload(str(Path(directory) / KERNEL_FILE), name)
        module = remote.load_module(name)
        arguments: dict[str, list[Any]] = {}
        for kind in ("integers", "normal"):
            input, weight, bias = inputs[kind]
            packed = tvm.runtime.empty(manifest.packed_shape, manifest.packed_dtype, device)
            module["pack"](send(weight), packed)
            spec = manifest.spec
            out = send(empty_output(spec, input), spec.output_axes)
            arguments[kind] = [send(input, spec.input_axes), packed, *([] if bias is None else [send(bias)]), out]
        module["convt"](*arguments["integers"])
        answer = torch.utils.dlpack.from_dlpack(arguments["integers"][-1].copyto(tvm.cpu()))
        order = MEMORY_ORDER[manifest.spec.output_axes]
        if wrong := wrong_answer(answer.permute([order.index(axis) for axis in range(4)]), inputs["exact"]):
            return {"wrong": wrong}
        timed.append((module.time_evaluator("convt", device, 1, 1, int(SAMPLE_SECS * 1e3)), arguments["normal"]))
    samples = [[_sample_us(evaluator, normal)] for evaluator, normal in timed]
    if job["limit_us"] is None or samples[0][0] <= job["limit_us"]:
        for _ in range(job["rounds"] - 1):
            for (evaluator, normal), times in zip(timed, samples, strict=True):
                times.append(_sample_us(evaluator, normal))
    return {"wrong": "", "samples_us": samples}


def _read_cpuinfo(remote: Any) -> str:
    """The beginning of the server's /proc/cpuinfo, the first processor.

    A server's own download asks for the size of a file first, which one in /proc does not have; so a function of two
    system calls is sent there.
    """
    import tvm
    from tvm.script import tirx as T

    @T.prim_func  # type: ignore[untyped-decorator]
    def read(text: T.Buffer((4096,), "uint8")):  # type: ignore[no-untyped-def, valid-type]  # noqa: ANN202
        T.func_attr({"global_symbol": "read"})
        T.evaluate(
            T.call_extern("int64", "read", T.call_extern("int32", "open", "/proc/cpuinfo", 0), text.data, T.int64(4096))
        )

    target = Target("llvm", host_architecture(), ()).to_tvm()
    with tempfile.TemporaryDirectory(prefix="convt-tvm-") as scratch:
        path = Path(scratch) / "cpuinfo.so"
        tvm.compile(tvm.IRModule({"read": read}), target=target).export_library(str(path))
        remote.upload(str(path))
    text = tvm.runtime.empty((4096,), "uint8", remote.cpu(0))
    remote.load_module("cpuinfo.so")["read"](text)
    return bytes(text.numpy()).rstrip(b"\0").decode(errors="replace")


def _sample_us(evaluator: Any, arguments: Sequence[Any]) -> float:
    return float(f"{evaluator(*arguments).mean * 1e6:.5g}")


if __name__ == "__main__":
    serve(_run)
