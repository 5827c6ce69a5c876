"""Checking, timing and tuning on a GPU: what is said of it is true of any, so the emulated one will do."""

import json
from dataclasses import replace

import pytest
import torch
from test_gpu_kernel import needs_emulator

from convt_tvm import bench as bench_module
from convt_tvm import gpu, roofline_torch
from convt_tvm.bench import Tolerance, bench, measure_target_limits, target_loops
from convt_tvm.check import check, operand_unit
from convt_tvm.compiler import build_artifact
from convt_tvm.database import find_result
from convt_tvm.emulated_torch import emulated_gpu, launches
from convt_tvm.errors import TargetError
from convt_tvm.gpu import Driver, Gpu, describe_gpu
from convt_tvm.machine import machine_key
from convt_tvm.measure import interleaved
from convt_tvm.peers import GPU_PEERS, PEERS
from convt_tvm.place import GRAPH_CALLS, GpuStopwatch, Place
from convt_tvm.records import Candidate, Context, Result
from convt_tvm.reference import normal_inputs
from convt_tvm.rows import COPY, OURS, Row, latest_runs
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import Store
from convt_tvm.target import Target
from convt_tvm.trials import Built, LocalRunner
from convt_tvm.workloads import Workload

SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=2)
WORKLOAD = Workload(name="tiny", source="", spec=SPEC)
FAST = {"rounds": 2, "min_sample_secs": 0.0}


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setitem(roofline_torch.SIDES, "cuda", 16)
    monkeypatch.setattr(roofline_torch, "GPU_WORKING_SETS", (1 << 8, 1 << 10, 1 << 12))
    with emulated_gpu():
        yield


@needs_emulator
def test_check_compares_both_ways_of_calling_on_the_gpu(emulated):
    before = launches()
    row = check(WORKLOAD, "cuda", quick=True)
    assert (row.verdict, row.exact, row.target, row.reason) == ("good", True, "cuda:sm_90", "")
    assert launches() > before


@needs_emulator
def test_bench_times_ours_and_torch_on_the_gpu_and_names_it(emulated):
    ours, copy, torchs = bench(WORKLOAD, "cuda", peers=["torch"], **FAST)
    assert [row.status for row in (ours, copy, torchs)] == ["ok"] * 3
    assert ours.machine["gpu"]["name"] == "emulated" and ours.machine["gpu"]["arch"] == "sm_90"
    assert (ours.target, ours.cold, len(torchs.samples_us)) == ("cuda:sm_90", False, 2)
    assert ours.threads == 1 and ours.peak_gflops > 0 and ours.bandwidth_gbs > 0
    assert Row.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@needs_emulator
def test_a_wrong_answer_on_the_gpu_is_not_timed(emulated, monkeypatch):
    contender = bench_module._contender
    monkeypatch.setattr(bench_module, "_contender", lambda *both: lambda: contender(*both)() * 1.001)
    ours, *_ = bench(WORKLOAD, "cuda", peers=["torch"], **FAST)
    assert (ours.status, ours.median_us) == ("wrong", None)


@needs_emulator
def test_limits_of_the_gpu_come_from_products_and_copies_there(emulated, monkeypatch):
    found = []

    def watched(*asked):
        found.append((torch.backends.cuda.matmul.allow_tf32, target_loops(*asked)))
        return found[-1][1]

    monkeypatch.setattr(bench_module, "target_loops", watched)
    limits = measure_target_limits(SPEC, Target.parse("cuda"), 4)
    assert (limits.threads, limits.dtype) == (1, "float32")
    assert limits.flops_per_sec > 0 and limits.bytes_per_sec > 0
    assert measure_target_limits(SPEC, Target.parse("cuda:sm_90+tf32"), 1).flops_per_sec > 0
    assert [tf32 for tf32, _ in found] == [False, True]
    loops = found[0][1]
    (copy,) = loops.moves
    assert loops.multiply_adds.amount == 2 * 16**3
    assert (SPEC.size_bytes, copy.amount) == (1160, 1 << 12)
    assert all(tensor.is_cuda for tensor in (*loops.multiply_adds.run.args, *copy.run.args))


@needs_emulator
@pytest.mark.parametrize("cold", [False, True])
def test_the_stopwatch_captures_once_or_times_each_call(emulated, cold):
    calls, stopwatch = [], GpuStopwatch(cold=cold)

    def function():
        calls.append(torch.cuda.current_stream().cuda_stream)

    assert stopwatch(function, 3) >= 0
    # Once before the graph, then three times within it; or three times.
    assert len(calls) == (3 if cold else 4)
    stopwatch(function, 3)
    assert len(calls) == (6 if cold else 4)
    assert len(set(calls)) == (1 if cold else 2)
    stopwatch(function, 5 * GRAPH_CALLS)
    assert len(calls) <= 6 + 1 + GRAPH_CALLS


@needs_emulator
def test_a_tuning_runner_checks_and_times_on_the_gpu(emulated, tmp_path):
    build_artifact(SPEC, "cuda", tmp_path / "good")
    runner = LocalRunner(SPEC, tmp_path, 1, device="cuda")
    try:
        found = runner.run(Built(Candidate("cuda_direct", {}), "ok", directory=tmp_path / "good"), float("inf"))
    finally:
        runner.close()
    assert (found.status, found.error) == ("ok", "") and len(found.samples_us) == 5


def test_caches_of_processors_are_never_cold():
    with pytest.raises(TargetError, match=r"caches are emptied on GPUs only, not for llvm:.*; leave out --cold"):
        Place.of(Target.parse("llvm"), cold=True)
    place = Place.of(Target.parse("llvm"))
    assert (place.time_calls(), place.settle_secs(0.5), place.describe()) == (None, 0.5, {})


def test_a_device_takes_its_own_time():
    assert interleaved({"one": lambda: None}, rounds=2, time_calls=lambda function, calls: 2.0 * calls) == {
        "one": [2e6, 2e6]
    }


def test_peers_on_a_gpu_are_torchs():
    assert set(GPU_PEERS) < set(PEERS) and all(name.startswith("torch") for name in GPU_PEERS)


def test_tf32_widens_the_bound_and_nothing_else_does():
    inputs = normal_inputs(SPEC, 0)
    target = Target.parse("cuda:sm_90+tf32")
    ieee, tf32 = Tolerance(SPEC, inputs), Tolerance(SPEC, inputs, unit=operand_unit(SPEC, target))
    assert bool((tf32.bound > 10 * ieee.bound).all()) and bool((tf32.peers > tf32.bound).all())
    assert operand_unit(replace(SPEC, dtype="float16"), target) == operand_unit(SPEC, Target.parse("cuda:sm_90")) == 0


def test_the_driver_tells_name_and_clocks(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "find_driver", lambda: None)
    assert describe_gpu() == {}
    monkeypatch.setattr(gpu, "find_driver", lambda: Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),)))
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '580.1, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_gpu() == {
        **{"name": "NVIDIA H200", "arch": "sm_90", "cuda": "13.0", "driver": "580.1", "memory": "143771 MiB"},
        **{"sm_clock": "345 MHz", "max_sm_clock": "1980 MHz", "memory_clock": "3201 MHz", "power_limit": "700.00 W"},
        "temperature": "31",
    }
    command.write_text("#!/bin/sh\nexit 9\n")
    assert describe_gpu() == {"name": "NVIDIA H200", "arch": "sm_90", "cuda": "13.0"}


def test_runs_on_a_gpu_and_on_its_host_are_apart():
    from test_rows import run_of

    here = run_of({OURS: 1.0, COPY: 1.0})
    there = run_of({OURS: 2.0, COPY: 2.0}, machine={"gpu": {"name": "NVIDIA H200"}}, target="cuda:sm_90")
    cold = [replace(row, cold=True) for row in there]
    assert [run.ours.median_us for run in latest_runs([*here, *there, *cold])] == [1.0, 2.0, 2.0]


def test_results_of_a_gpu_count_there_and_where_there_is_none(monkeypatch, tmp_path):
    target = Target.parse("cuda:sm_90")
    result = Result(
        context=Context(target.name, "NVIDIA-H200", 1),
        source="0" * 12,
        session="5e551011",
        date="2026-01-01T00:00:00+00:00",
        candidate=Candidate("cuda_direct", {}),
        digest="d" * 16,
        tuned=True,
        median_us=1.0,
        mad_us=0.1,
        default_us=2.0,
        noise_floor=1.01,
        trials=3,
    )
    with Store.open(tmp_path / target.key / SPEC.name) as store:
        store.append(result)
    for driver, found in (
        (None, result),
        (Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),)), result),
        (Driver((13, 0), (Gpu("NVIDIA H100 80GB HBM3", (9, 0)),)), None),
    ):
        monkeypatch.setattr("convt_tvm.machine.find_driver", lambda driver=driver: driver)
        assert find_result(SPEC, target, threads=1, logs=tmp_path).result == found
    assert machine_key(target) == "NVIDIA-H100-80GB-HBM3"
    rehearsed = replace(result, context=Context(target.name, "emulated", 1), date="2026-02-02T00:00:00+00:00")
    with Store.open(tmp_path / target.key / SPEC.name) as store:
        store.append(rehearsed)
    monkeypatch.setattr("convt_tvm.machine.find_driver", lambda: None)
    found = find_result(SPEC, target, threads=1, logs=tmp_path)
    assert found.result == result and "is a rehearsal's, on an emulated GPU" in found.ignored[-1]
