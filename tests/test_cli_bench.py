import json
import re
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from test_rows import BASE, run_of

from convt_tvm import bench as bench_module
from convt_tvm import terminal
from convt_tvm.json_lines import append_lines
from convt_tvm.roofline import Limits
from convt_tvm.rows import COPY, OURS, OURS_ONE_THREAD, read_rows
from convt_tvm.target import Target
from convt_tvm.workloads import resolve

TINY = "n1_ci4_ih3_iw3_co2_k3x3_s2x2_p1x1_op1x1_d1x1_g1_bias_float32"


@pytest.fixture
def limits(monkeypatch):
    """Makes limits without measuring; returns the requests."""
    asked = []

    def measure(spec, target, threads):
        asked.append((spec.name, target.name, threads))
        return Limits(threads, spec.accumulator_dtype, 100e9, 10e9)

    monkeypatch.setattr(bench_module, "measure_target_limits", measure)
    return asked


@pytest.fixture
def benching(monkeypatch):
    """Makes `bench` give rows without building; times by workload, an exception is raised."""

    def use(times=None):
        calls = []

        def fake(workload, target, *, peers, threads, place, rounds):
            calls.append((workload.name, target.name, tuple(peers), threads, rounds))
            found = (times or {}).get(workload.name, {OURS: 617.0, COPY: 620.0, "torch": 2400.0, "openvino": 806.0})
            if isinstance(found, BaseException):
                raise found
            return run_of(found, workload=workload.name, spec=workload.spec.name, schedule="llvm_channels")

        monkeypatch.setattr(bench_module, "bench", fake)
        return calls

    return use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "Missing argument"),
        (["bench", "nothing"], "nothing"),
        (
            ["bench", "dcgan/2", "--peers", "torch,cudnn"],
            "there is no peer cudnn; there are torch, torch_channels_last",
        ),
        (["bench", "dcgan/2", "--threads", "100000"], "100000 threads are more than"),
        (["bench", "dcgan/2", "--threads", "1,two"], "--threads '1,two' is no list of numbers such as 1,2"),
        (["bench", "dcgan/2", "--threads", "1", "--target", "cuda:sm_90"], "--threads is for processors"),
        (["bench", "dcgan/2", "--dtype", "float32,int8"], "'int8' is not supported; use one of float32"),
        (["bench", "dcgan/2", "--rounds", "0"], "rounds"),
        (["bench", "dcgan/2", "--target", "tpu"], "target 'tpu'"),
        (["explain", "dcgan/9"], "dcgan/9"),
        (["report"], "name either a file of rows or, with --session"),
    ],
)
def test_mistakes_exit_with_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", err).split()))


def test_a_baseline_needs_torch(run, tmp_path):
    append_lines(tmp_path / "old.jsonl", run_of({OURS: 10.0, "torch": 40.0}))
    code, _, err = run("bench", "dcgan/2", "--peers", "openvino", "--baseline", tmp_path / "old.jsonl")
    assert code == 2
    assert "--baseline compares ratios to torch" in " ".join(err.split())


def test_bench_prints_a_table_and_appends_rows(run, benching, tmp_path):
    calls = benching({"dcgan/5": {OURS: 100.0, COPY: 100.0, "torch": 90.0, "openvino": None}})
    path = tmp_path / "rows.jsonl"
    arguments = ["bench", "dcgan/2", "dcgan/5", "--peers", "openvino,torch,torch", "--rounds", 3, "--threads", 1]
    code, out, err = run(*arguments, "-o", path)
    assert (code, err) == (0, "")
    host = calls[0][1]
    assert calls == [(name, host, ("openvino", "torch"), 1, 3) for name in ("dcgan/2", "dcgan/5")]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "bound ours best best/ torch/ of of"
    assert lines[1] == "workload schedule ms ms torch openvino peer ours ours noise peak bound"
    assert lines[3] == "dcgan/2 llvm_channels - 0.617 2.40 0.806 openvino 1.31x 3.89x 2.0% - -"
    assert lines[4] == "dcgan/5 llvm_channels - 0.100 0.0900 rejected torch 0.900x 0.90x 2.0% - -"
    assert lines[5] == "rejected dcgan/5: openvino: not this one"
    assert lines[6] == (
        "1.08x the best peer of each workload, 1.87x torch eager, geometric means of 2 with 1 thread; behind the best "
        "peer by more than the noise on 1"
    )
    assert len(read_rows(path)) == 8
    run(*arguments, "-o", path)
    assert len(read_rows(path)) == 16


def test_threads_and_types_have_tables_of_their_own_beside_each_other(run, benching, monkeypatch):
    calls = benching()
    monkeypatch.setattr("convt_tvm.cli_options.require_cores", lambda threads: None)

    def slower(workload, target, *, threads, **options):
        whole = 4000.0 if workload.spec.dtype == "float32" else 1000.0
        calls.append((workload.name, workload.spec.dtype, threads))
        alone = {OURS_ONE_THREAD: whole} if threads > 1 else {}
        times = {OURS: whole / threads**0.5, **alone, "torch": 9000.0}
        rows = run_of(times, spec=workload.spec.name, threads=threads)
        return [replace(row, workload=workload.name, bound_by="compute") for row in rows]

    monkeypatch.setattr(bench_module, "bench", slower)
    code, out, err = run("bench", "dcgan/2", "dcgan/3", "--threads", "1,4", "--dtype", "float32,bfloat16")
    assert (code, err) == (0, "")
    settings = [("float32", 1), ("float32", 4), ("bfloat16", 1), ("bfloat16", 4)]
    assert calls == [(name, *setting) for name in ("dcgan/2", "dcgan/3") for setting in settings]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    titles = ["1 thread", "4 threads", "1 thread, bfloat16", "4 threads, bfloat16"]
    assert [line for line in lines if line in titles] == titles
    assert [line.split()[-2:] for line in lines if line.startswith("dcgan/3")] == [
        ["-", "-"],
        ["-", "0.50"],
        ["-", "0.25"],
        ["0.50", "0.25"],
    ]
    assert [line for line in lines if line.startswith("Where")] == [
        "Where computing is the bound ours take 0.50 of the time with 1 thread (2 ms and more).",
        "Where computing is the bound ours take 0.25 of the time in float32.",
        "Where computing is the bound ours take 0.25 of the time in float32.",
    ]


def test_bench_prints_json_lines(run, benching):
    benching()
    code, out, err = run("bench", "dcgan/2", "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["implementation"] for row in rows] == [OURS, COPY, "torch", "openvino"]


def test_all_peers_are_the_default(run, benching):
    calls = benching()
    run("bench", "dcgan/2")
    assert calls[0][2] == ("torch", "torch_channels_last", "torch_compile", "onnxruntime", "openvino")


def test_our_failure_exits_with_1_and_is_told(run, benching):
    benching({"dcgan/2": {OURS: None, COPY: None}})
    code, out, _ = run("bench", "dcgan/2", "dcgan/3")
    assert code == 1
    assert "rejected  dcgan/2: ours: not this one\n" in out
    assert "geometric means of 1 with" in out


def test_an_interrupt_keeps_what_is_finished(run, benching, tmp_path):
    benching({"dcgan/3": KeyboardInterrupt()})
    code, out, err = run("bench", "dcgan", "-o", tmp_path / "rows.jsonl")
    assert code == 130
    assert "dcgan/2" in out and err == "interrupted: 2 of 5 runs done\n"
    assert len(read_rows(tmp_path / "rows.jsonl")) == 8


@pytest.mark.parametrize(("time", "code"), [(640.0, 0), (660.0, 3)])
def test_a_regression_exits_with_3(run, benching, tmp_path, time, code):
    benching()
    run("bench", "dcgan/2", "-o", tmp_path / "old.jsonl")
    benching({"dcgan/2": {OURS: time, COPY: time, "torch": 2400.0}})
    found, _, err = run("bench", "dcgan/2", "--baseline", tmp_path / "old.jsonl", "--json")
    assert found == code
    assert bool(re.fullmatch(r"regression: dcgan/2: 3.64x torch, formerly 3.89x; slower by 7.0%.*\n", err)) is (
        code == 3
    )


def test_a_baseline_of_other_workloads_is_one_error_line(run, benching, tmp_path):
    benching()
    run("bench", "dcgan/3", "-o", tmp_path / "old.jsonl")
    code, _, err = run("bench", "dcgan/2", "--baseline", tmp_path / "old.jsonl")
    assert code == 1
    assert re.fullmatch(r"error: the baseline and these rows have no workload in common .*\n", err)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_terminal_keeps_ours_and_the_ratio(run, benching, monkeypatch, width):
    monkeypatch.setattr(
        terminal,
        "stdout_console",
        lambda: Console(file=sys.stdout, width=width, force_terminal=True, color_system=None),
    )
    peers = ["torch", "torch_channels_last", "torch_compile", "onnxruntime", "openvino"]
    benching({"bilinear/depthwise": dict.fromkeys([OURS, COPY, *peers], 123456.0)})
    _, out, _ = run("bench", "bilinear/depthwise")
    table = out.split("not shown in")[0].splitlines()
    assert max(len(line) for line in table if "geometric" not in line) <= width
    assert "…" not in out
    (line,) = [line for line in table if line.startswith("bilinear/depthwise")]
    assert " 123 " in line and "1.00x" in line
    assert ("not shown in" in out) is (width < 140)


def test_bench_for_real(run):
    code, out, err = run("bench", TINY, "--peers", "torch", "--rounds", 1, "--threads", 1, "--json")
    assert (code, err) == (0, "")
    ours, copy, eager = map(json.loads, out.splitlines())
    assert [row["implementation"] for row in (ours, copy, eager)] == [OURS, COPY, "torch"]
    assert all(row["status"] == "ok" and row["median_us"] > 0 and row["spec"] == TINY for row in (ours, copy, eager))


def test_bench_in_another_dtype(run, benching):
    calls = benching()
    code, out, err = run(
        "bench", "dcgan/2", "--dtype", "bfloat16", "--target", "llvm:x86-64-v3", "--threads", 1, "--json"
    )
    assert (code, err, len(calls)) == (0, "", 1)
    assert all(json.loads(line)["spec"].endswith("_bfloat16") for line in out.splitlines())
    code, _, err = run("bench", "dcgan/2", "--dtype", "int8")
    assert code != 0 and "int8" in err


def test_peers_of_another_dtype_answer_or_refuse(run):
    code, out, err = run("bench", TINY, "--dtype", "float16", "--peers", "torch,onnxruntime", "--rounds", 1, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row["spec"] == TINY.replace("float32", "float16") for row in rows)
    assert {row["status"] for row in rows} <= {"ok", "unavailable", "rejected"}


def test_report_writes_everything_asked_for(run, tmp_path):
    rows, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    append_lines(rows, run_of({OURS: 10.0, "torch": 40.0}))
    readme.write_text("<!-- results -->\n<!-- /results -->\n")
    code, out, err = run("report", rows)
    assert (code, err) == (0, "")
    assert "| dcgan/2 | - | 0.0100 | **0.0400** | 4.00 | 4.00 | 2.0% |" in out
    assert run("report", rows, "--markdown", "-") == (0, out, "")
    assert run("report", rows, "--markdown", tmp_path / "table.md", "--readme", readme) == (0, "", "")
    assert (tmp_path / "table.md").read_text() == out
    assert readme.read_text() == f"<!-- results -->\n{out}<!-- /results -->\n"


def test_report_plots(run, tmp_path):
    pytest.importorskip("matplotlib")
    append_lines(tmp_path / "rows.jsonl", run_of({OURS: 10.0, "torch": 40.0}))
    assert run("report", tmp_path / "rows.jsonl", "--plot", tmp_path / "ratios.svg") == (0, "", "")
    assert "<svg" in (tmp_path / "ratios.svg").read_text()


def test_report_prints_the_last_rows_as_json(run, tmp_path):
    newer = replace(BASE, date="2027", median_us=5.0)
    append_lines(tmp_path / "rows.jsonl", [BASE, newer])
    code, out, _ = run("report", tmp_path / "rows.jsonl", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [newer.to_json()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"(?<=error: )No such file or directory: '.*rows\.jsonl'"),
        ("", "no row of our kernels"),
        ("nonsense\n", "line 1: Expecting"),
    ],
)
def test_report_of_nothing_is_one_error_line(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    code, out, err = run("report", tmp_path / "rows.jsonl")
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", err)


def test_explain(run, limits, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVT_TVM_TUNING_LOGS", str(tmp_path))
    code, out, err = run("explain", "dcgan/5", "--target", "llvm:x86-64-v3", "--threads", 1)
    assert (code, err, limits) == (0, "", [(resolve(["dcgan/5"])[0].spec.name, Target.parse("llvm").name, 1)])
    assert re.search(r"^rows, stride 2 +32 outputs from 0: taps 1 3\n +32 outputs from 1: taps 0 2$", out, re.MULTILINE)
    assert "3,048,192 useful; the text-book form makes 12,582,912, 4.13 times as many: 9,534,720 by zeros" in out
    assert "0.0610 ms, bound by compute: 0.006096 GFLOP at 100 GFLOP/s" in out
    assert re.search(r"^runs +llvm_\w+ has the fewest estimated cycles of \d+ layouts; llvm_", out, re.MULTILINE)
    assert re.search(r"^llvm_\w+ +lanes=\w+, co_block=.* +1\.00$", out, re.MULTILINE)
    assert {"llvm_channels", "llvm_columns"} <= set(re.findall(r"^llvm_\w+", out, re.MULTILINE))


def test_explain_names_phases_without_taps_and_cuts_long_lists(run, limits):
    code, out, _ = run("explain", "n1_ci2_ih3_iw3_co2_k1x1_s12x2_p0x0_op0x0_d1x1_g1_nobias_float32")
    assert code == 0
    assert "2 outputs from 1: no taps, the bias alone\n" in out
    assert re.search(r"^ +and 4 more$", out, re.MULTILINE)


def test_explain_takes_other_types_and_memory_formats(run, limits):
    code, out, _ = run(
        "explain", "dcgan/5", "--dtype", "bfloat16", "--channels-last", "--target", "llvm:x86-64-v3", "--json"
    )
    found = json.loads(out)
    assert (code, limits[0][0]) == (0, found["spec"])
    assert found["spec"] == resolve(["dcgan/5"])[0].spec.name.replace("float32", "bfloat16_channels_last")


def test_explain_prints_json_lines(run, limits):
    code, out, _ = run("explain", "dcgan/5", "dcgan/1", "--json")
    assert code == 0
    assert [json.loads(line)["workload"] for line in out.splitlines()] == ["dcgan/5", "dcgan/1"]
    assert [name for name, *_ in limits] == [json.loads(line)["spec"] for line in out.splitlines()]
    assert [json.loads(line)["bound"]["bandwidth_gbs"] for line in out.splitlines()] == [10.0, 10.0]
