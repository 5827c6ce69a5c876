"""`convt-tvm check --report`, `--conformance` and `--replay`, as typed."""

import json
import sys

import pytest

from convt_tvm import cases, conformance
from convt_tvm.conformance import read_tallies
from convt_tvm.implementations import Implementation
from convt_tvm.reference import reference

TINY = "n1_ci4_ih3_iw3_co2_k3x3_s2x2_p1x1_op1x1_d1x1_g1_bias_float32"


def without_bias(spec):
    return lambda input, weight, bias: reference(spec, input, weight, None).to(input.dtype)


@pytest.fixture
def fuzz_alone(monkeypatch):
    """Leaves fuzzed cases alone to be tried, and gives them to what the test wants."""
    monkeypatch.setattr(cases, "FAMILIES", {})
    monkeypatch.setattr(conformance, "FAMILIES", {})

    def use(*compared):
        monkeypatch.setattr(conformance, "_implementations", lambda target, peers, emulate: list(compared))
        made = {each.name: each for each in compared}
        monkeypatch.setattr("convt_tvm.replay.find_implementation", lambda name, target: made[name])

    return use


def test_a_report_is_a_page_its_rows_and_a_verdict(run, tmp_path):
    pytest.importorskip("matplotlib")
    directory = tmp_path / "report"
    code, out, err = run("check", TINY, "--report", directory, "--no-peers", "--runs", 2)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"the report is {directory / 'index.html'}"
    page = (directory / "index.html").read_text()
    assert TINY in page and "data:image/" in page and 'src="http' not in page
    (row,) = map(json.loads, (directory / "rows.jsonl").read_text().splitlines())
    assert (row["spec"], row["runs"]) == (TINY, 2)
    assert {finding["status"] for finding in row["findings"]} <= {"pass", "differs"}


def test_a_report_without_matplotlib_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("check", TINY, "--report", tmp_path / "report")
    assert (code, out) == (1, "")
    assert "pip install 'convt-tvm[plot]'" in err
    assert list(tmp_path.iterdir()) == []


def test_conformance_goes_on_where_it_stopped(run, tmp_path, fuzz_alone):
    fuzz_alone(Implementation("ours/a", lambda spec: lambda *inputs: reference(spec, *inputs).to(inputs[0].dtype)))
    rows = tmp_path / "rows.jsonl"
    arguments = "check", "--conformance", "--no-peers", "--jobs", 1, "-o", rows, "--fuzz"
    code, out, err = run(*arguments, 3)
    assert (code, err) == (0, "")
    assert "ours/a" in out
    assert [tally.passed for tally in read_tallies(rows)] == [3]
    code, _, err = run(*arguments, 28)
    assert code == 0
    assert [(tally.block.first, tally.passed) for tally in read_tallies(rows)] == [(0, 3), (0, 25), (25, 3)]
    code, _, err = run(*arguments, 28, "--json")
    assert (code, err) == (0, "2 of 2 blocks were tried with these kernels already\n")


def test_a_failure_leaves_a_file_that_replay_runs(run, tmp_path, fuzz_alone):
    fuzz_alone(Implementation("ours/a", without_bias))
    arguments = "--no-peers", "--jobs", 1, "--fuzz", 4, "--failures", tmp_path
    code, out, err = run("check", "--conformance", *arguments, "--json")
    (tally,) = map(json.loads, out.splitlines())
    assert (code, tally["failed"] > 0, tally["failed"]) == (1, True, err.count("convt-tvm check --replay "))
    file = err.splitlines()[1].split("--replay ")[1]
    code, out, err = run("check", "--replay", file)
    assert (code, err) == (1, "")
    assert "exactness, integers" in out and "fail" in out
    code, out, _ = run("check", "--replay", file, "--json")
    assert (code, json.loads(out)["finding"]["implementation"]) == (1, "ours/a")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dcgan/1", "--conformance"], 2, "name workloads, or give --conformance, or --replay FILE: one of them"),
        (["--replay", "{tmp}/none.json"], 1, "none.json"),
        (["--conformance", "--fuzz", "-1"], 2, "greater than or equal to 0"),
        (["dcgan/one", "--report", "{tmp}/report"], 2, "dcgan/one"),
    ],
)
def test_mistakes_are_named_before_any_work(run, tmp_path, arguments, code, message):
    found, out, err = run("check", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
