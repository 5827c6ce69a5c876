import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from convt_tvm import check as check_module
from convt_tvm import doctor as doctor_module
from convt_tvm import terminal
from convt_tvm.check import CheckRow
from convt_tvm.doctor import Finding
from convt_tvm.workloads import resolve

ROOT = Path(__file__).parents[1]
TINY = "n1_ci4_ih3_iw3_co2_k3x3_s2x2_p1x1_op1x1_d1x1_g1_bias_float32"


def row_for(workload, **changes):
    values = {
        "schedule": "llvm_channels",
        "build_secs": 0.5,
        "exact": True,
        "max_error": 5.8e-6,
        "max_error_torch": 2.9e-6,
        "error_over_bound": 0.0059,
        "latency_us": 617.0,
        "torch_latency_us": 2400.0,
        "verdict": "good",
    }
    spec = workload.spec
    return CheckRow(workload.name, spec.name, spec.output_shape, "llvm:x86_64", 2, 0, **(values | changes))


@pytest.fixture
def checking(monkeypatch):
    """Makes `check` give rows without building; `changes` by workload name, an exception is raised."""

    def use(changes=None):
        calls = []

        def fake(workload, target, **options):
            calls.append((workload.name, target.name, options))
            change = (changes or {}).get(workload.name, {})
            if isinstance(change, BaseException):
                raise change
            return row_for(workload, **change)

        monkeypatch.setattr(check_module, "check", fake)
        return calls

    return use


WRONG = {
    "verdict": "bad",
    "exact": False,
    "latency_us": None,
    "torch_latency_us": None,
    "error_over_bound": float("inf"),
    "reason": "integer inputs: 3 of 12 outputs are wrong; at (0, 0, 1, 1) it is 4 instead of 5",
}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["check", "-h"], ["build", "--help"], ["doctor", "-h"]])
def test_help(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "Usage: convt-tvm" in out
    assert "--help" in out


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["--version"], ["check", "nothing"]])
def test_help_and_mistakes_import_neither_compiler_nor_torch(arguments):
    program = (
        "import sys\nfrom convt_tvm.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: print('loaded:', *sorted({'tvm', 'tvm_ffi', 'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "convt_tvm", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert re.fullmatch(r"convt-tvm \S.* with apache-tvm \S+, apache-tvm-ffi \S+, torch \S+, numpy \S+\n", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: convt-tvm"),
        (["nonsense"], "No such command 'nonsense'"),
        (["check"], "name workloads, or give --conformance, or --replay FILE: one of them"),
        (
            ["check", "dcgn/2"],
            "error: 'dcgn/2' is no suite, no workload and no canonical spec name; did you mean dcgan/2",
        ),
        (["check", TINY.replace("k3x3", "k0x3")], "error: no workload '.*': kernel_size=\\(0, 3\\) must be at least 1"),
        (["check", TINY, "--target", "tpu"], "error: target 'tpu' is not understood"),
        (["check", TINY, "--threads", "0"], "Invalid value for '--threads'"),
        (["check", TINY, "--threads", "many"], "Invalid value for '--threads'"),
        (["check", TINY, "--threads", "100000"], "100000 threads are more than the \\d+ cores"),
        (["check", TINY, "--seed", "-1"], "Invalid value for '--seed'"),
        (["check", TINY, "--slow"], "No such option"),
        (["build", TINY], "Missing option '--output'"),
        (["build", "dcgan/99", "-o", "unused"], "error: 'dcgan/99' is no suite"),
        (["build", TINY, "-o", "unused", "--target", "llvm:z80"], "error: target 'llvm:z80' is not understood"),
        (["inspect"], "Missing argument 'DIR'"),
        (["doctor", "now"], "unexpected extra argument"),
        (
            ["build", "dcgan/5", "-o", "kernels", "--target", "cuda:sm_90", "--channels-last"],
            "leave out --channels-last",
        ),
        (["check", "dcgan/5", "--target", "cuda", "--channels-last", "--emulate"], "read and write NCHW"),
        (["bench", "dcgan/5", "--target", "cuda", "--channels-last"], "read and write NCHW"),
    ],
)
def test_bad_usage_is_exit_code_2_and_a_line_on_stderr(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_check_prints_a_table_of_good_rows(run, checking):
    calls = checking()
    code, out, err = run("check", "dcgan/2", "dcgan/5", "--threads", 1, "--seed", 7, "--target", "llvm:x86-64-v2")
    assert (code, err) == (0, "")
    assert [name for name, _, _ in calls] == ["dcgan/2", "dcgan/5"]
    assert calls[0][1:] == ("llvm:x86_64+popcnt+sse4.2", {"seed": 7, "threads": 1, "quick": False})
    lines = out.splitlines()
    expected = "dcgan/2 1x256x8x8 llvm_channels 5.8e-06 2.9e-06 0.0059 0.617 2.40 3.89x good"
    assert " ".join(lines[3].split()) == expected
    assert lines[-1] == "2 good, 0 bad; 3.89x torch eager, geometric mean of 2 with 2 threads, slower on 0"
    assert not any(line.endswith(" ") for line in lines)


def test_check_exits_with_1_on_a_bad_verdict_and_says_why(run, checking):
    checking({"dcgan/3": WRONG})
    code, out, _ = run("check", "dcgan")
    assert code == 1
    assert re.search(r"dcgan/3 .* inf +- +- +- +bad\n", out)
    assert "bad  dcgan/3: integer inputs: 3 of 12 outputs are wrong; at (0, 0, 1, 1) it is 4 instead of 5\n" in out
    assert "4 good, 1 bad; " in out


def test_check_shows_a_row_that_an_exception_cut_short(run, checking):
    nothing = dict.fromkeys(("schedule", "build_secs", "exact", "max_error", "max_error_torch", "error_over_bound"))
    reason = "no linker [bold]was[/bold] found " + 100 * "x" + 600 * "y"
    checking({"dcgan/1": {**WRONG, **nothing, "reason": reason}})
    code, out, _ = run("check", "dcgan/1", "seed/rect")
    assert code == 1
    assert re.search(r"dcgan/1 +1x512x4x4( +-){7} +bad\n", out)
    assert "bad  dcgan/1: no linker [bold]was[/bold] found xxx" in out
    assert "yyy ...\n" in out


def test_slower_than_torch_is_shown_and_not_bad(run, checking):
    checking({"dcgan/1": {"latency_us": 4800.0}})
    code, out, _ = run("check", "dcgan/1")
    assert code == 0
    assert "0.500x" in out and "slower on 1" in out


def test_noisy_timings_are_pointed_out(run, checking):
    checking({"dcgan/1": {"spread": 2.5}, "dcgan/2": {"spread": 1.9}, "dcgan/3": {"spread": 9.0}})
    code, out, _ = run("check", "dcgan")
    assert code == 0
    assert "slower on 0; 2 timings varied more than 2-fold between rounds, is the machine busy?\n" in out


def test_quick_has_no_time_columns(run, checking):
    calls = checking({"dcgan/1": {"latency_us": None, "torch_latency_us": None}})
    code, out, _ = run("check", "dcgan/1", "--quick")
    assert code == 0
    assert calls[0][2]["quick"] is True
    assert "time" not in out
    assert out.endswith("\n1 good, 0 bad\n")


def test_check_prints_json_lines(run, checking):
    checking({"dcgan/3": WRONG})
    code, out, err = run("check", "dcgan/2", "dcgan/3", "--json")
    assert (code, err) == (1, "")
    good, bad = map(json.loads, out.splitlines())
    assert good == row_for(*resolve(["dcgan/2"])).to_json()
    assert (bad["workload"], bad["verdict"], bad["error_over_bound"]) == ("dcgan/3", "bad", None)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupt_prints_what_is_finished(run, checking, options):
    checking({"dcgan/3": KeyboardInterrupt()})
    code, out, err = run("check", "dcgan", *options)
    assert code == 130
    assert "dcgan/2" in out and "dcgan/3" not in out
    assert err == "interrupted: 2 of 5 workloads done\n"


def test_an_interrupt_before_the_first_row_prints_nothing_else(run, checking):
    checking({"dcgan/1": KeyboardInterrupt()})
    assert run("check", "dcgan") == (130, "", "interrupted: 0 of 5 workloads done\n")


@pytest.mark.parametrize(
    ("width", "hidden"),
    [(120, ""), (100, "schedule"), (80, "output, schedule"), (64, "output, schedule, torch's error, torch's time")],
)
def test_a_narrow_terminal_loses_whole_columns_and_no_text(run, checking, monkeypatch, width, hidden):
    monkeypatch.setattr(
        terminal,
        "stdout_console",
        lambda: Console(file=sys.stdout, width=width, force_terminal=True, color_system=None),
    )
    slow = {"latency_us": 128_000.0, "torch_latency_us": 1_280_000.0, "schedule": "llvm_channels"}
    checking({"dcgan/2": WRONG, "seed/square": slow, "bilinear/depthwise": slow})
    code, out, _ = run("check", "seed", "dcgan", "bilinear/depthwise")
    table = out.split("\nbad ")[0].splitlines()
    assert code == 1
    assert "…" not in out
    assert max(len(line) for line in table if not line.startswith("not shown")) <= width
    for name in ("seed/square", "seed/output_size", "dcgan/1", "bilinear/depthwise"):
        (line,) = [line for line in table if line.startswith(name)]
        assert line.endswith("good")
        assert "5.8e-06" in line and "0.0059" in line
    notes = [line for line in table if line.startswith("not shown")]
    assert notes == ([f"not shown in {width} columns: {hidden}"] if hidden else [])


def test_a_canonical_name_folds_instead_of_being_cut(run, checking, monkeypatch):
    monkeypatch.setattr(
        terminal, "stdout_console", lambda: Console(file=sys.stdout, width=80, force_terminal=True, color_system=None)
    )
    checking()
    _, out, _ = run("check", TINY)
    first_column = "".join(line.split("  ")[0].strip() for line in out.splitlines()[3:-2])
    assert first_column.startswith(TINY)


def test_progress_goes_to_a_terminal_on_stderr_only(run, checking, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "stderr_is_terminal", lambda: True)
    checking()
    _, out, err = run("check", "dcgan/2", "dcgan/3")
    assert "1/2" in err and "dcgan/3" in err
    assert "1/2" not in out


def test_build_inspect_and_a_flipped_byte(run, tmp_path):
    code, out, err = run("build", TINY, "-o", tmp_path / "kernels", "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)
    directory = Path(row["path"])
    assert row["spec"] == TINY
    assert row["error"] is None
    assert directory.parent == tmp_path / "kernels"
    assert re.fullmatch(f"{TINY}-[0-9a-f]{{12}}", directory.name)
    assert row["size_bytes"] == sum(path.stat().st_size for path in directory.iterdir())
    assert row["build_secs"] > 0

    code, out, err = run("inspect", directory)
    assert (code, err) == (0, "")
    assert re.search(r"computes +1x4x3x3 to 1x2x6x6 float32\n", out)
    assert re.search(r"runs here +yes\n", out)
    assert re.search(r"kernel.so +[\d,]+ bytes, verified\n", out)

    code, out, err = run("inspect", directory, "--json")
    assert code == 0
    stored = json.loads(out)
    assert stored["manifest"] == json.loads((directory / "manifest.json").read_text())
    assert stored["runs_here"] is True
    assert set(stored["size_bytes"]) == {"kernel.so", "manifest.json"}

    content = bytearray((directory / "kernel.so").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "kernel.so").write_bytes(content)
    for options in ([], ["--json"]):
        code, out, err = run("inspect", directory, *options)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and "SHA-256" in err
        assert len(err.splitlines()) == 1


def test_build_with_the_runtime_for_another_machine(run, tmp_path):
    code, out, _ = run("build", TINY, "-o", tmp_path, "--target", "llvm:x86-64-v2", "--with-runtime")
    assert code == 0
    (directory,) = tmp_path.iterdir()
    assert out.startswith(f"{directory}  ({TINY}, ")
    assert re.search(r", \d+ KiB, built in \d+\.\d\d s\)\n", out)
    assert {path.name for path in directory.iterdir()} == {"kernel.so", "manifest.json", "libtvm_runtime.so"}
    manifest = json.loads((directory / "manifest.json").read_text())
    assert directory.name.endswith(manifest["digest"][:12])
    assert manifest["target"]["features"] == ["popcnt", "sse4.2"]


def test_inspect_says_when_an_artifact_cannot_run_here(run, tmp_path, monkeypatch):
    _, out, _ = run("build", TINY, "-o", tmp_path, "--json")
    directory = json.loads(out)["path"]
    monkeypatch.setattr("convt_tvm.target.host_features", lambda: frozenset())
    code, out, _ = run("inspect", directory)
    assert code == 0
    assert re.search(r"runs here +no: ", out)
    _, out, _ = run("inspect", directory, "--json")
    assert json.loads(out)["runs_here"] is False


def test_inspect_of_nothing(run, tmp_path):
    code, out, err = run("inspect", tmp_path / "absent")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: there is no artifact at {tmp_path / 'absent'}")


def test_inspect_of_a_tuning_log_says_what_shows_it(run, tmp_path):
    (tmp_path / "sessions.jsonl").touch()
    code, out, err = run("inspect", tmp_path)
    assert (code, out) == (2, "")
    assert "is a tuning log" in err and "report --session" in err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_one_failed_build_does_not_stop_the_others(run, tmp_path, monkeypatch, options):
    import convt_tvm.compiler

    original = convt_tvm.compiler.build_artifact

    def build_artifact(spec, target, directory, **options):
        if spec.n == 2:
            raise IndexError("list index\nout of range")
        return original(spec, target, directory, **options)

    monkeypatch.setattr(convt_tvm.compiler, "build_artifact", build_artifact)
    failing = TINY.replace("n1_", "n2_")
    code, out, err = run("build", failing, TINY, "-o", tmp_path, *options)
    assert code == 1
    assert err == f"error: {failing}: IndexError: list index out of range\n"
    assert len(list(tmp_path.iterdir())) == 1
    if options:
        failed, built = map(json.loads, out.splitlines())
        assert failed["error"] == "IndexError: list index out of range"
        assert built["error"] is None
    else:
        assert len(out.splitlines()) == 1


def test_build_into_a_file_is_one_error_line(run, tmp_path):
    (tmp_path / "taken").touch()
    code, out, err = run("build", TINY, "-o", tmp_path / "taken")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: .*File exists.*\n", err)


def test_check_for_real(run):
    code, out, err = run("check", TINY, "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert (row["verdict"], row["exact"], row["reason"]) == ("good", True, "")
    assert 0 <= row["error_over_bound"] <= 1
    assert row["latency_us"] > 0 and row["torch_latency_us"] > 0
    assert row["schedule"] and row["build_secs"] > 0


def test_a_target_that_does_not_run_here_is_a_bad_verdict(run, monkeypatch):
    monkeypatch.setattr("convt_tvm.target.host_features", lambda: frozenset())
    code, out, _ = run("check", TINY, "--target", "llvm:x86-64-v3", "--quick", "--json")
    row = json.loads(out)
    assert (code, row["verdict"]) == (1, "bad")
    assert "avx2" in row["reason"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("bad", 1)])
def test_doctor(run, monkeypatch, status, code):
    findings = [Finding("python", "ok", "3.11"), Finding("thing", status, "what [was] found", "what to do")]
    monkeypatch.setattr(doctor_module, "diagnose", lambda directory: iter(findings))
    found, out, err = run("doctor")
    assert (found, err) == (code, "")
    assert re.search(rf"^{status} +thing +what \[was\] found\n +what to do$", out, re.MULTILINE)
    found, out, err = run("doctor", "--json")
    assert (found, err) == (code, "")
    stored = json.loads(out)
    assert stored["healthy"] is (code == 0)
    assert stored["findings"][1] == {
        "name": "thing", "status": status, "found": "what [was] found", "advice": "what to do",
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m convt_tvm --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert "Traceback" not in done.stderr
