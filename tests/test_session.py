import random
import signal
import subprocess
import sys
import time

import pytest
import stub_session
from stub_session import TRACE, StubBuilder, StubRunner, make_choices, make_info, run_stub, true_us

from convt_tvm import session
from convt_tvm.errors import TuningError
from convt_tvm.records import Result, SessionInfo, Trial
from convt_tvm.store import TRIALS, read_records
from convt_tvm.trials import Measured, raced
from convt_tvm.workers import Answer

BEST = min((candidate for candidate, _ in make_choices()), key=true_us)


def test_a_session_finds_the_best_and_says_by_how_much(tmp_path):
    outcome, _ = run_stub(tmp_path, trials=40)
    assert (outcome.stopped, outcome.trials, outcome.measured) == ("trials", 40, 40)
    result = outcome.result
    assert result.candidate == BEST and result.tuned
    assert result.median_us == true_us(BEST)
    assert result.default_us == true_us(make_choices()[0][0])
    assert [finalist.median_us for finalist in result.finalists] == sorted(f.median_us for f in result.finalists)
    assert read_records(tmp_path / "log", Result).records == (result,)


def test_a_finished_session_is_not_run_again(tmp_path):
    first, _ = run_stub(tmp_path, trials=20)
    again, runner = run_stub(tmp_path, trials=20)
    assert (again.measured, again.result, runner.ran) == (0, first.result, [])


def test_a_session_goes_on_without_measuring_anything_twice(tmp_path):
    run_stub(tmp_path, trials=10)
    outcome, runner = run_stub(tmp_path, trials=60)
    assert (outcome.trials, outcome.measured, len(runner.ran)) == (60, 50, 50)
    trials = read_records(tmp_path / "log", Trial).records
    assert len({trial.candidate.key for trial in trials}) == len(trials) == 60
    assert outcome.result.trials == 60


def test_all_candidates_measured_ends_a_session(tmp_path):
    outcome, _ = run_stub(tmp_path, trials=1000)
    assert (outcome.stopped, outcome.trials) == ("candidates", 60)


def test_the_budget_ends_a_session(tmp_path):
    outcome, _ = run_stub(tmp_path, trials=60, secs=0.05, budget_secs=0.3)
    assert outcome.stopped == "budget" and 0 < outcome.trials < 20
    assert outcome.result is not None


def test_other_contexts_and_other_code_do_not_count(tmp_path):
    run_stub(tmp_path, trials=10)
    other = stub_session.Context("llvm:x86_64", "bbbbbbbb", 1)
    assert run_stub(tmp_path, trials=10, context=other)[0].measured == 10
    two = stub_session.Context("llvm:x86_64", "aaaaaaaa", 2)
    assert run_stub(tmp_path, trials=10, context=two)[0].measured == 10
    outcome, _ = run_stub(tmp_path, trials=10, source="1" * 12)
    assert outcome.measured == 10
    assert outcome.notes == ("10 earlier trials are of code that has changed since; they do not count",)


def test_a_wrong_candidate_never_wins_and_is_recorded_with_its_trace(tmp_path):
    outcome, _ = run_stub(tmp_path, trials=60, wrong=lambda candidate: candidate == BEST)
    assert outcome.result.candidate != BEST
    assert outcome.failures == {"wrong": 1}
    (wrong,) = [trial for trial in read_records(tmp_path / "log", Trial).records if trial.status == "wrong"]
    assert wrong.candidate == BEST and wrong.wrong_trace == TRACE and wrong.samples_us == ()
    assert wrong.error == "3 of 8 outputs are wrong on integers"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer("crashed", error="signal 11"), "signal 11"),
        (Answer("ok", {"wrong": "3 of 64 outputs are off", "samples_us": []}), "3 of 64 outputs are off"),
    ],
)
def test_finalists_that_cannot_be_raced_end_the_session(answer, why):
    with pytest.raises(TuningError, match=f"the finalists could not be measured again: {why}; run the session again"):
        raced(answer)


def test_the_best_of_the_first_trials_is_raced_too(tmp_path, monkeypatch):
    class Improving(StubRunner):
        def run(self, built, best_us):
            self.ran.append(built.candidate)
            return Measured("ok", samples_us=(100.0 - len(self.ran),))

    monkeypatch.setattr(session, "EARLY", 10)
    outcome, runner = run_stub(tmp_path, trials=40, runner=Improving())
    expected = [runner.ran[place] for place in (0, 9, 36, 37, 38, 39)]
    finalists = [finalist.candidate.key for finalist in outcome.result.finalists]
    assert sorted(finalists) == sorted(candidate.key for candidate in expected)


def test_within_the_noise_the_default_stays(tmp_path):
    class Noisy(StubRunner):
        def race(self, built, rounds):
            *samples, copy = super().race(built, rounds)
            return [*samples, tuple(3 * sample for sample in copy)]

    outcome, _ = run_stub(tmp_path, trials=40, runner=Noisy())
    result = outcome.result
    assert not result.tuned and result.candidate == make_info().default
    assert result.median_us == result.default_us
    assert result.finalists[0].candidate == BEST


def test_an_interrupt_keeps_the_best_so_far(tmp_path):
    class Interrupted(StubRunner):
        def run(self, built, best_us):
            if len(self.ran) == 5:
                raise KeyboardInterrupt
            return super().run(built, best_us)

    outcome, _ = run_stub(tmp_path, trials=60, runner=Interrupted())
    assert (outcome.stopped, outcome.trials) == ("interrupted", 5)
    assert outcome.result is not None
    assert read_records(tmp_path / "log", Result).records == (outcome.result,)


def test_files_of_candidates_that_cannot_win_are_deleted(tmp_path):
    builder = StubBuilder(tmp_path / "scratch")
    run_stub(tmp_path, trials=48, builder=builder)
    assert len(builder.built) == 48
    assert len(list((tmp_path / "scratch").iterdir())) <= 6


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_session_keeps_every_finished_trial(tmp_path, seed):
    script = [sys.executable, stub_session.__file__, str(tmp_path), "60", "0.01"]
    trials = tmp_path / "log" / TRIALS
    with subprocess.Popen(script) as session:
        while not trials.exists():
            time.sleep(0.005)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        session.send_signal(signal.SIGKILL)
    finished = trials.read_text().count("\n")
    outcome, runner = run_stub(tmp_path, trials=60)
    assert outcome.trials == 60 and outcome.result.candidate == BEST
    assert len(runner.ran) == outcome.measured == 60 - finished
    stored = read_records(tmp_path / "log", Trial)
    assert len(stored.records) == 60 and not stored.problems
    assert len(read_records(tmp_path / "log", SessionInfo).records) == 2
