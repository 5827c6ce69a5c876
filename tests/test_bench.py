import json
import math
import re
import subprocess
import weakref
from dataclasses import replace

import pytest
import torch
from test_database import write_tuned

from convt_tvm import bench as bench_module
from convt_tvm import roofline, runtime
from convt_tvm.bench import Tolerance, bench, current_commit
from convt_tvm.check import torch_eager
from convt_tvm.machine import machine
from convt_tvm.measure import noise_floor
from convt_tvm.peers import PEERS
from convt_tvm.reference import normal_inputs
from convt_tvm.roofline import Loop, Loops
from convt_tvm.rows import COPY, OURS, OURS_DEFAULT, OURS_LAST, OURS_ONE_THREAD, Row
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

SPEC = ConvTranspose2dSpec(n=1, ci=4, ih=3, iw=3, co=2, kernel_size=3, stride=2, padding=1, output_padding=1)
WORKLOAD = Workload("tiny", "a test", SPEC)
FAST = {"threads": 1, "rounds": 2, "settle_secs": 0.0, "min_sample_secs": 1e-4}


@pytest.fixture(scope="module")
def rows():
    return {row.implementation: row for row in bench(WORKLOAD, peers=["torch"], **FAST)}


def limits_of(row):
    return row.bound_us, row.bound_by, row.peak_gflops, row.bandwidth_gbs


def test_a_tiny_bench_with_torch(rows):
    assert list(rows) == [OURS, COPY, "torch"]
    for row in rows.values():
        assert (row.status, row.reason, row.workload, row.spec) == ("ok", "", "tiny", SPEC.name)
        assert (row.threads, row.rounds, len(row.samples_us)) == (1, 2, 2)
        assert row.median_us > 0 and row.mad_us >= 0 and row.noise_floor >= 1
        assert row.gflops == pytest.approx(2 * SPEC.multiply_adds / row.median_us / 1e3)
        assert row.share_of_peak == pytest.approx(row.gflops / row.peak_gflops)
        assert row.share_of_bound == pytest.approx(row.bound_us / row.median_us)
        assert row.peak_gflops > 0.1 and row.bandwidth_gbs > 0.01
        assert 0 <= row.error_over_bound <= 1
        assert row.versions["torch"] == torch.__version__ and "versions" not in row.machine
        assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert rows[OURS].schedule == rows[COPY].schedule and rows[OURS].layout
    assert rows["torch"].schedule is None
    assert len({row.date for row in rows.values()}) == 1


def test_limits_are_medians_of_the_rounds_that_the_kernels_take_turns_in(monkeypatch):
    """On a machine that halves its speed now and then, limits of another moment would be no denominator."""
    samples = {"flops": [2.0, 9.0, 1.0], "one": [4.0, 8.0, 9.0], "other": [9.0, 5.0, 1.0], OURS: [1.0, 8.0, 2.0]}
    rounds, taken, loops = [], [], []

    def loop(name):
        def run():
            taken.append(name)

        return run

    def target_loops(spec, target, threads):
        loops.append((spec, threads, torch.get_num_threads(), runtime.get_num_threads()))
        ways = Loop(loop("one"), 60e3), Loop(loop("other"), 60e3)
        return Loops(threads, "float32", Loop(loop("flops"), 200e3), ways)

    def interleaved(functions, **options):
        found = {}
        for name, function in functions.items():
            taken.clear()
            function()
            found[name] = samples[taken[0] if taken else OURS]
        rounds.append((list(functions), options["rounds"]))
        return found

    monkeypatch.setattr(bench_module, "target_loops", target_loops)
    monkeypatch.setattr(bench_module, "interleaved", interleaved)
    rows = bench(WORKLOAD, peers=["torch"], threads=1, rounds=3)
    assert loops == [(SPEC, 1, 1, 1)]
    ((names, count),) = rounds
    assert count == 3 and names[:3] == [OURS, COPY, "torch"] and len(names) == 6
    assert [row.implementation for row in rows] == [OURS, COPY, "torch"]
    for row in rows:
        # 200,000 operations in 2 us; 60,000 bytes in 5 us, the faster of both ways.
        assert (row.peak_gflops, row.bandwidth_gbs) == (pytest.approx(100), pytest.approx(12))
        assert row.bound_us == pytest.approx(max(2 * SPEC.multiply_adds / 100e3, SPEC.size_bytes / 12e3))
        assert (row.median_us, row.bound_by) == (2.0, "memory")
        assert row.share_of_peak == pytest.approx(2 * SPEC.multiply_adds / 2.0 / 100e3)
        assert row.share_of_bound == pytest.approx(row.bound_us / 2.0)


def test_the_memory_of_the_loops_is_freed(monkeypatch):
    target_loops, alive = bench_module.target_loops, []
    roofline._library.cache_clear()

    def watched(spec, target, threads):
        loops = target_loops(spec, target, threads)
        alive.extend(
            weakref.ref(argument) for argument in loops.moves[0].run.args if isinstance(argument, torch.Tensor)
        )
        return loops

    monkeypatch.setattr(bench_module, "target_loops", watched)
    bench(WORKLOAD, peers=[], **FAST)
    assert len(alive) == 2 and [each() for each in alive] == [None, None]


@pytest.mark.parametrize(
    ("spec", "target", "products", "moves"),
    [
        (SPEC, "llvm:x86-64-v4", "plain float32", "plain"),
        (replace(SPEC, dtype="float64"), "llvm:x86-64-v4", "plain float64", "plain"),
        (replace(SPEC, dtype="float16"), "llvm:x86-64-v4", "plain float32", "plain"),
        (replace(SPEC, dtype="bfloat16"), "llvm:x86-64-v4", "plain float32", "plain"),
        (replace(SPEC, dtype="bfloat16"), "llvm:x86_64+avx512bf16+avx512vl", "plain bfloat16", "plain"),
        (replace(SPEC, dtype="bfloat16"), "llvm:x86_64+amx-bf16", "torch bfloat16", "plain"),
        (replace(SPEC, dtype="bfloat16"), "cuda:sm_90", "torch bfloat16", "torch"),
    ],
)
def test_the_loops_are_of_what_a_target_multiplies_with(monkeypatch, spec, target, products, moves):
    def made(kind):
        return lambda dtype, threads: Loops(threads, dtype, Loop(f"{kind} {dtype}", 1), (kind,))

    plain, torchs = made("plain"), made("torch")
    monkeypatch.setattr(bench_module, "processor_loops", lambda spec, dtype, n: plain(dtype, n))
    monkeypatch.setattr(bench_module, "torch_loops", lambda spec, _, dtype, n: torchs(dtype, n))
    monkeypatch.setattr(bench_module, "multiply_matrices", lambda _, dtype: Loop(f"torch {dtype}", 1))
    dtype = products.split()[1]
    expected = Loops(1, dtype, Loop(products, 1), (moves,))
    assert bench_module.target_loops(spec, Target.parse(target), 1) == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    dtype = dtype if products.startswith("torch") else spec.accumulator_dtype
    expected = Loops(1, dtype, Loop(f"torch {dtype}", 1), ("torch",))
    assert bench_module.target_loops(spec, Target.parse(target), 1) == expected


def test_beside_torch_in_channels_last_is_ours():
    rows = bench(WORKLOAD, peers=["torch_channels_last"], **FAST)
    found = {row.implementation: row for row in rows}
    assert list(found) == [OURS, COPY, OURS_LAST, "torch_channels_last"]
    assert {(row.status, row.reason, row.spec) for row in rows} == {("ok", "", SPEC.name)}
    assert found[OURS_LAST].median_us > 0


@pytest.mark.skipif(machine().cores < 2, reason="needs two cores")
def test_beside_ours_with_several_threads_is_what_one_would_run(monkeypatch):
    """By turns: with a table of another time each, the machine's other tenants would be compared as well."""
    load, contender, built, ran = bench_module._load_twice, bench_module._contender, [], []

    def load_twice(*arguments, **options):
        built.append((runtime.get_num_threads(), torch.get_num_threads()))
        return load(*arguments, **options)

    def watched(kernel, inputs):
        run = contender(kernel, inputs)

        def watch():
            ran.append(runtime.get_num_threads())
            return run()

        return watch

    monkeypatch.setattr(bench_module, "_load_twice", load_twice)
    monkeypatch.setattr(bench_module, "_contender", watched)
    rows = bench(WORKLOAD, peers=["torch"], **FAST | {"threads": 2})
    assert [row.implementation for row in rows] == [OURS, COPY, OURS_ONE_THREAD, "torch"]
    assert {(row.status, row.threads, len(row.samples_us)) for row in rows} == {("ok", 2, 2)}
    # A tuning log is asked for what is best with so many.
    assert built == [(2, 2), (1, 1)]
    turns = [threads for threads, before in zip(ran, [None, *ran], strict=False) if threads != before]
    # Checked, its loop found, and timed: in the second round it comes before the others.
    assert turns == [2, 1, 2, 1, 2, 1, 2]


def test_beside_a_tuned_kernel_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVT_TVM_TUNING_LOGS", str(tmp_path))
    target = Target.parse("llvm").for_dtype("float32")
    tuned = write_tuned(tmp_path, SPEC, target, 1)
    found = {row.implementation: row for row in bench(WORKLOAD, peers=[], **FAST)}
    assert list(found) == [OURS, COPY, OURS_DEFAULT]
    assert found[OURS].layout == tuned.layout.to_json() != found[OURS_DEFAULT].layout
    assert found[OURS_DEFAULT].median_us > 0


def peer(change):
    def prepare(spec, inputs, threads):
        eager = torch_eager(spec)
        return lambda: change(eager(*inputs))

    return prepare


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: output + 1e-3, r"72 of 72 outputs are farther .* the worst [\d.e+]+ times as far"),
        (lambda output: output.index_fill(3, torch.tensor([0]), math.nan), "12 of 72 outputs .* the worst inf times"),
        (lambda output: output[..., :-1], r"shape \(1, 2, 6, 5\) instead of \(1, 2, 6, 6\)"),
    ],
)
def test_a_wrong_answer_is_reported_and_not_timed(monkeypatch, change, reason):
    monkeypatch.setitem(PEERS, "wrong", peer(change))
    rows = bench(WORKLOAD, peers=["wrong", "torch"], **FAST)
    found = {row.implementation: row for row in rows}
    assert found["wrong"].status == "wrong"
    assert re.search(reason, found["wrong"].reason)
    assert (found["wrong"].median_us, found["wrong"].samples_us, found["wrong"].gflops) == (None, (), None)
    assert found["torch"].status == found[OURS].status == "ok"


def test_a_peer_that_raises_later_has_failed(monkeypatch):
    def prepare(spec, inputs, threads):
        calls = []

        def run():
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError("out of\nluck")
            return torch_eager(spec)(*inputs)

        return run

    monkeypatch.setitem(PEERS, "late", prepare)
    row = bench(WORKLOAD, peers=["late"], **FAST)[-1]
    assert (row.status, row.reason) == ("failed", "MemoryError: out of luck")


def test_an_exception_while_timing_is_no_crash(monkeypatch):
    def interleaved(functions, **options):
        raise RuntimeError("gone")

    monkeypatch.setattr(bench_module, "interleaved", interleaved)
    rows = bench(WORKLOAD, peers=["torch"], **FAST)
    assert {(row.status, row.reason, row.median_us) for row in rows} == {
        ("failed", "while being timed: RuntimeError: gone", None)
    }
    assert {(row.threads, *limits_of(row)) for row in rows} == {(1, None, None, None, None)}


def test_an_unknown_peer_is_an_error():
    with pytest.raises(KeyError, match="cudnn"):
        bench(WORKLOAD, peers=["cudnn"], **FAST)


def test_refusals_become_rows(monkeypatch):
    def prepare(spec, inputs, threads):
        raise ImportError("No module named 'onnx'")

    monkeypatch.setitem(PEERS, "absent", prepare)
    row = bench(WORKLOAD, peers=["absent"], **FAST)[-1]
    assert row.status == "unavailable" and "No module named 'onnx'" in row.reason


def test_our_own_failure_is_a_row_and_peers_are_left_out(monkeypatch):
    def build(spec, target, artifact, directory, *, tuned):
        raise RuntimeError("no\nlinker")

    monkeypatch.setattr(bench_module, "_load_twice", build)
    ours, copy = bench(WORKLOAD, peers=["torch"], **FAST)
    assert (ours.status, ours.reason, ours.noise_floor) == ("failed", "RuntimeError: no linker", None)
    assert copy.status == "failed"
    assert (ours.threads, *limits_of(ours)) == (1, None, None, None, None)


def test_our_own_wrong_answer_is_not_timed(monkeypatch):
    contender = bench_module._contender

    def wrong(kernel, inputs):
        run = contender(kernel, inputs)
        return lambda: run() * 1.001

    monkeypatch.setattr(bench_module, "_contender", wrong)
    ours, _ = bench(WORKLOAD, peers=["torch"], **FAST)
    assert (ours.status, ours.median_us) == ("wrong", None) and ours.schedule
    assert limits_of(ours) == (None,) * 4


def test_the_two_copies_are_two_libraries(tmp_path):
    first, second = bench_module._load_twice(SPEC, Target.parse("llvm"), None, tmp_path, tuned=True)
    assert first.directory != second.directory and first.manifest == second.manifest
    assert (
        bench_module._load_twice(SPEC, first.target, first.directory, tmp_path / "again", tuned=True)[0].directory
        == first.directory
    )


def test_thread_pools_are_equal_and_restored(monkeypatch):
    seen = []

    def prepare(spec, inputs, threads):
        seen.append((threads, torch.get_num_threads(), runtime.get_num_threads()))
        return lambda: torch_eager(spec)(*inputs)

    monkeypatch.setitem(PEERS, "probe", prepare)
    before = torch.get_num_threads()
    bench(WORKLOAD, peers=["probe"], **FAST)
    assert seen == [(1, 1, 1)]
    assert torch.get_num_threads() == before


def test_several_threads_settle_longer(monkeypatch):
    """Spinning workers of the contender before would otherwise take the CPUs of the next."""
    seen = []

    def interleaved(functions, *, rounds, settle_secs, **options):
        seen.append(settle_secs)
        return {name: [1.0] * rounds for name in functions}

    monkeypatch.setattr(bench_module, "interleaved", interleaved)
    bench(WORKLOAD, peers=[], threads=1, rounds=2)
    assert seen == [0.005] and bench_module.SETTLE_SECS[True] >= 0.1


def test_peers_get_slack_and_we_do_not():
    tolerance = Tolerance(SPEC, normal_inputs(SPEC, 0))
    output = tolerance.exact + 2 * tolerance.bound
    assert tolerance.judge(output, peer=True)[1] == ""
    worst, problem = tolerance.judge(output, peer=False)
    assert worst == pytest.approx(2) and "the worst 2 times as far" in problem


def test_peers_may_add_up_taps_in_the_narrow_type():
    spec = ConvTranspose2dSpec(n=1, ci=8, ih=6, iw=6, co=2, kernel_size=5, stride=1, dtype="float16")
    inputs = normal_inputs(spec, 0)
    output = torch_eager(spec)(*inputs)
    assert Tolerance(spec, inputs).judge(output, peer=True)[1] == ""


@pytest.mark.parametrize(
    ("ours", "copy", "expected"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], 1.1),
        ([1.1, 1.1, 1.1], [1.0, 1.0, 1.0], 1.1),
        ([0.9, 1.0, 1.1], [1.1, 1.0, 0.9], 1.1 / 0.9),
    ],
)
def test_the_noise_floor_is_not_fooled_by_equal_medians(ours, copy, expected):
    assert noise_floor(ours, copy) == pytest.approx(expected)


def test_the_commit_is_that_of_this_checkout(monkeypatch, tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "convt_tvm" / "bench.py"
    module.parent.mkdir()
    module.write_text("1")
    monkeypatch.setattr(bench_module, "__file__", str(module))
    assert current_commit() is None
    git("init", "-q")
    rows = module.parent.parent / "tuning_logs" / "bench" / "here.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("")
    git("add", ".")
    git("commit", "-qm", "First")
    rows.write_text("a row")
    assert current_commit() == git("rev-parse", "HEAD")
    module.write_text("2")
    assert current_commit() == git("rev-parse", "HEAD") + "+"
    inside = tmp_path / "site-packages" / "convt_tvm" / "bench.py"
    monkeypatch.setattr(bench_module, "__file__", str(inside))
    inside.parent.mkdir(parents=True)
    assert current_commit() is None
