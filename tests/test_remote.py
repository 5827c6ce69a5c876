"""Checking and timing on servers of TVM's RPC tracker, on this machine by its loopback address."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from convt_tvm.errors import TuningError
from convt_tvm.machine import machine
from convt_tvm.records import Candidate, Result, SessionInfo, Trial
from convt_tvm.remote import RemoteRunner
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import RESULTS, SESSIONS, TRIALS, read_records
from convt_tvm.trials import Built
from convt_tvm.tune import Budget, tune
from convt_tvm.workers import Answer
from convt_tvm.workloads import Workload

LOCAL_LOGS = Path(__file__).parents[1] / "tuning_logs"
SPEC = ConvTranspose2dSpec(n=1, ci=8, ih=6, iw=7, co=20, kernel_size=4, stride=2, padding=1)
KEY = "loopback"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill(process):
    """End a process and all that it started, as a machine that loses its power would."""
    family = [process, *process.children(recursive=True)] if process.is_running() else []
    for each in family:
        each.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)


def wait_for(condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after five minutes"
        time.sleep(0.2)


@pytest.fixture
def tracker(tmp_path):
    """Address of a tracker, and two servers at it by their process ids."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install 'convt-tvm[rpc]'")
    from tvm import rpc

    port = free_port()
    with ExitStack() as stack:

        def start(module, port, *arguments):
            # TVM searches for a free port below 9199 otherwise.
            arguments = ["--port", str(port), "--port-end", str(port + 1), *arguments]
            log = stack.enter_context((tmp_path / f"{module}.log").open("ab"))
            command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", *arguments]
            process = psutil.Process(subprocess.Popen(command, stdout=log, stderr=log).pid)
            stack.callback(kill, process)
            return process

        start("rpc_tracker", port)
        address = f"127.0.0.1:{port}"
        servers = [start("rpc_server", free_port(), "--tracker", address, "--key", KEY) for _ in range(2)]
        wait_for(lambda: listens(port), "tracker")
        queues = rpc.connect_tracker("127.0.0.1", port)
        wait_for(lambda: queues.summary()["queue_info"].get(KEY, {}).get("free") == 2, "two servers")
        yield address, servers


def serves(server):
    """Whether a client holds a session of `server`, which forks its worker for one."""
    return any(child.children() for child in server.children())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.tune
def test_a_session_outlives_a_server_that_is_killed(tracker, tmp_path):
    address, servers = tracker
    killed = []

    def kill_the_busy_one(progress):
        if progress.trials == 4 and not killed:
            killed.extend(server for server in servers if serves(server))
            kill(killed[0])

    outcome = tune(
        Workload("tiny", "", SPEC),
        budget=Budget(8, 10),
        effort="quick",
        threads=1,
        logs=tmp_path / "logs",
        rpc=(address, KEY),
        observe=kill_the_busy_one,
    )
    assert len(killed) == 1 and not killed[0].is_running()
    assert (outcome.trials, outcome.measured, outcome.stopped, dict(outcome.failures)) == (8, 8, "trials", {})
    # The servers' machine is this one.
    assert outcome.info.context.machine == machine().key
    # The best four and the default, which may be one of them.
    assert len(outcome.result.finalists) in (4, 5)

    (log,) = (tmp_path / "logs").glob("*/*/")
    local = next(path.parent for path in sorted(LOCAL_LOGS.glob("*/*/results.jsonl")))
    for kind, name, count in ((SessionInfo, SESSIONS, 1), (Trial, TRIALS, 8), (Result, RESULTS, 1)):
        read = read_records(log, kind)
        assert (len(read.records), read.problems) == (count, ())
        # Committed by a session that timed on the machine it ran on.
        assert lines(log / name)[0].keys() == lines(local / name)[0].keys()
    assert all(len(trial.samples_us) in (1, 5) and trial.run_secs for trial in read_records(log, Trial).records)


def test_a_session_ends_where_no_server_is_left(tmp_path, monkeypatch):
    runner = RemoteRunner(SPEC, tmp_path, 1, "127.0.0.1:1", KEY)
    answers = [Answer("ok", {"wrong": "", "samples_us": [[1.0]]}), *2 * [Answer("crashed", error="gone")]]
    monkeypatch.setattr(runner, "_ask", lambda job, timeout_secs: answers.pop(0))
    built = Built(Candidate("stub", {}), "ok", directory=tmp_path)
    assert runner.run(built, 1.0).status == "ok"
    # This one may be to blame, and is written down; the next is not.
    assert runner.run(built, 1.0).status == "crashed"
    with pytest.raises(TuningError, match=r"no server with the key 'loopback' answered at 127\.0\.0\.1:1: gone; look"):
        runner.run(built, 1.0)


def test_an_address_without_a_port_is_refused(tmp_path):
    why = r"the tracker's address 'localhost' is no HOST:PORT such as 127\.0\.0\.1:9190"
    with pytest.raises(TuningError, match=why):
        RemoteRunner(SPEC, tmp_path, 1, "localhost", KEY)
