import json
from dataclasses import replace

import pytest
import stub_session
from stub_session import SPEC, make_info, run_stub

from convt_tvm import tune as tune_module
from convt_tvm.errors import TuningError
from convt_tvm.session import Outcome
from convt_tvm.threads import get_num_threads

OTHER = "n1_ci4_ih3_iw3_co2_k3x3_s2x2_p1x1_op1x1_d1x1_g1_bias_float32"


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Makes `tune` run stub sessions, or raise or return what `ends` holds for a workload; returns the requests."""

    def use(ends=None):
        calls = []

        def fake(workload, target, *, budget, threads, observe, **options):
            calls.append({"workload": workload.name, "budget": budget, "threads": threads, **options})
            end = (ends or {}).get(workload.name)
            if isinstance(end, BaseException):
                raise end
            context = stub_session.Context(target.name, "aaaaaaaa", threads)
            changes = {"workload": workload.name, "context": context, "trials": budget.trials}
            if end is not None:
                return replace(end, info=make_info(**changes))
            return run_stub(tmp_path / workload.name, **changes)[0]

        monkeypatch.setattr(tune_module, "tune", fake)
        return calls

    return use


NOTHING_TIMED = Outcome(make_info(), None, 3, 3, "trials", {"crashed": 2, "wrong": 1}, 1.0, ("a [note]",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one workload, for example dcgan/4, or all"),
        (["nothing"], "nothing"),
        (["dcgan/99"], "dcgan/99"),
        ([SPEC.name, "--target", "sparc"], "target 'sparc'"),
        ([SPEC.name, "--effort", "huge"], "there is no effort 'huge'; there are quick, normal, full"),
        ([SPEC.name, "--space", "ours"], "there is no space 'ours'; there are own and generic"),
        ([SPEC.name, "--threads", "one"], "--threads 'one' is no list of numbers such as 1,2"),
        ([SPEC.name, "--threads", "1,0"], "--threads '1,0' is no list of numbers"),
        ([SPEC.name, "--threads", "100000"], "100000 threads are more than the"),
        ([SPEC.name, "--trials", "0"], "trials"),
        ([SPEC.name, "--rpc", "host:9190"], "--rpc and --key go together"),
        ([SPEC.name, "--key", "board"], "--rpc and --key go together"),
        ([SPEC.name, "--target", "cuda:sm_90", "--threads", "2"], "--threads and --rpc are for processors"),
    ],
)
def test_mistakes_exit_with_2_before_any_work(run, tuning, tmp_path, arguments, message):
    calls = tuning()
    code, out, err = run("tune", "--logs", tmp_path / "logs", *arguments)
    assert (code, out, calls) == (2, "", [])
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "logs").exists()


def test_a_session_exits_with_0_and_tells_what_it_found(run, tuning, tmp_path):
    calls = tuning()
    code, out, _ = run("tune", SPEC.name, "--threads", "1", "--trials", "40", "--logs", tmp_path / "logs")
    assert code == 0
    assert calls == [
        {
            "workload": SPEC.name,
            "budget": tune_module.Budget(40, 10),
            "effort": "normal",
            "threads": 1,
            "logs": tmp_path / "logs",
            "seed": 0,
            "space": "own",
            "wait_secs": 0,
            "rpc": None,
        }
    ]
    # By the stub's own times the default takes 22 us and the best 11.
    assert SPEC.name in out and "40" in out and "2.00x" in out


def test_other_types_and_memory_formats_are_tuned(run, monkeypatch):
    specs = []

    def fake(workload, target, **options):
        specs.append(workload.spec)
        return NOTHING_TIMED

    monkeypatch.setattr(tune_module, "tune", fake)
    run("tune", SPEC.name, "--dtype", "bfloat16", "--channels-last", "--threads", "1")
    assert specs == [replace(SPEC, dtype="bfloat16", memory_format="channels_last")]


def test_json_has_a_line_a_session_and_nothing_else(run, tuning):
    tuning({OTHER: NOTHING_TIMED})
    code, out, _ = run("tune", SPEC.name, OTHER, "--threads", "1", "--trials", "20", "--json")
    found, nothing = map(json.loads, out.splitlines())
    assert code == 1
    assert (found["workload"], found["trials"], found["measured"]) == (SPEC.name, 20, 20)
    assert found["result"]["layout"] == {"rows": 1, "columns": 1, "color": "green"}
    assert (found["result"]["median_us"], found["result"]["default_us"]) == (11.0, 22.0)
    assert found["session"]["threads"] == 1 and found["stopped"] == "trials"
    assert (nothing["workload"], nothing["result"]) == (OTHER, None)
    assert nothing["failures"] == {"crashed": 2, "wrong": 1} and nothing["notes"] == ["a [note]"]


def test_json_of_sessions_that_found_something_exits_with_0(run, tuning):
    tuning()
    code, out, err = run("tune", SPEC.name, "--threads", "1", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["trials"] == 60  # normal effort asks for 64, but there are 60 candidates


def test_a_session_that_times_nothing_fails_and_says_what_happened(run, tuning):
    tuning({SPEC.name: NOTHING_TIMED})
    code, out, _ = run("tune", SPEC.name, "--threads", "1")
    assert code == 1
    assert f"{SPEC.name}: 2 crashed, 1 wrong" in out and f"{SPEC.name}: a [note]" in out


def test_a_session_that_fails_leaves_the_others_their_turn(run, tuning):
    calls = tuning({SPEC.name: TuningError("another session is\nwriting to it")})
    code, out, err = run("tune", SPEC.name, OTHER, "--threads", "1")
    assert code == 1
    assert [call["workload"] for call in calls] == [SPEC.name, OTHER]
    assert f"error: {SPEC.name}: another session is writing to it" in err
    assert OTHER in out and SPEC.name not in out


def test_an_interrupt_ends_all_with_what_was_found(run, tuning):
    interrupted = replace(NOTHING_TIMED, stopped="interrupted")
    calls = tuning({SPEC.name: interrupted})
    code, out, err = run("tune", OTHER, SPEC.name, "dcgan/2", "--threads", "1")
    assert code == 130 and len(calls) == 2
    assert "interrupted: 1 of 3 sessions done; the same command goes on" in err
    assert OTHER in out


def test_effort_budget_and_threads_reach_the_engine(run, tuning, monkeypatch):
    calls = tuning()
    monkeypatch.setattr("convt_tvm.cli_options.require_cores", lambda threads: None)
    arguments = ["--effort", "quick", "--budget", "2", "--threads", "2,1,2", "--seed", "7", "--wait", "3"]
    assert run("tune", SPEC.name, *arguments)[0] == 0
    assert [call["threads"] for call in calls] == [2, 1]
    for call in calls:
        assert (call["budget"], call["effort"]) == (tune_module.Budget(32, 2), "quick")
        assert (call["seed"], call["wait_secs"]) == (7, 3)
    assert run("tune", SPEC.name)[0] == 0
    assert calls[-1]["threads"] == get_num_threads()


def test_other_cores_than_these_time_over_rpc(run, tuning):
    calls = tuning()
    assert run("tune", SPEC.name, "--rpc", "host:9190", "--key", "board", "--threads", "100000")[0] == 0
    assert (calls[0]["rpc"], calls[0]["threads"]) == (("host:9190", "board"), 100000)


@pytest.fixture
def log(tmp_path):
    """A finished session in which some candidates gave wrong answers, below a directory of logs."""
    run_stub(tmp_path, trials=20, wrong=lambda candidate: candidate.layout["color"] == "green")
    log = tmp_path / "logs" / "key" / SPEC.name
    log.parent.mkdir(parents=True)
    return (tmp_path / "log").rename(log)


def test_merge_brings_logs_in_once_and_tunes_nothing(run, tuning, log, tmp_path):
    calls = tuning()
    merge = ("tune", "--merge", tmp_path / "logs", "--logs", tmp_path / "ours")
    code, out, _ = run(*merge)
    assert (code, calls) == (0, [])
    assert out == f"{SPEC.name}: 1 lines of sessions.jsonl, 20 lines of trials.jsonl, 1 lines of results.jsonl\n"
    code, out, _ = run(*merge, "--json")
    assert code == 0
    assert json.loads(out) == {
        "spec": SPEC.name,
        "added": {"sessions.jsonl": 0, "trials.jsonl": 0, "results.jsonl": 0},
    }
    code, out, err = run("tune", "--merge", tmp_path / "nowhere", "--logs", tmp_path / "ours")
    assert (code, out) == (1, "") and "nowhere holds no tuning logs" in err


def test_report_of_a_session(run, log):
    code, out, err = run("report", "--session", log)
    assert (code, err) == (0, "")
    assert "stub, 1 thread, machine aaaaaaaa" in out and "3 of 8 outputs are wrong on integers" in out
    assert "is no candidate of this version" in out
    wrong = sum(line.startswith("wrong ") for line in out.splitlines())
    code, out, _ = run("report", "--session", log, "--session", log, "--json")
    assert code == 0
    assert wrong > 0 and [json.loads(line)["failures"] for line in out.splitlines()] == 2 * [{"wrong": wrong}]


def test_report_writes_a_page_and_a_picture_and_prints_nothing(run, log, tmp_path):
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    code, out, err = run("report", "--session", log, "--html", page, "--plot", picture)
    assert (code, out, err) == (0, "", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3 of 8 outputs are wrong on integers" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--session", "{tmp}"], 1, "holds no trials; name the log of a workload, <logs>/<target key>/<spec name>"),
        (["--session", "{tmp}/nowhere"], 1, "nowhere holds no trials"),
        (["--session", "{tmp}", "rows.jsonl"], 2, "name either a file of rows or, with --session"),
        (["--session", "{tmp}", "--markdown", "-"], 2, "sessions have --html and --plot"),
        (["rows.jsonl", "--html", "{tmp}/page.html"], 2, "--html is for sessions"),
    ],
)
def test_mistakes_of_report(run, tmp_path, arguments, code, message):
    found, out, err = run("report", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (found, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())
