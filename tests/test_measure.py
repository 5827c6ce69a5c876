import gc
from contextlib import contextmanager

import pytest

from convt_tvm.measure import interleaved, medians


class Machine:
    """A clock, and functions that take a known time on it."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def clock(self):
        return self.now

    def function(self, name, secs):
        def call():
            self.calls.append(name)
            self.now += secs() if callable(secs) else secs

        return call


def turns(calls):
    return [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]


def test_samples_are_microseconds_per_call():
    machine = Machine()
    functions = {"slow": machine.function("slow", 3e-3), "fast": machine.function("fast", 2e-6)}
    samples = interleaved(functions, rounds=4, clock=machine.clock)
    assert samples == {"slow": pytest.approx([3000.0] * 4), "fast": pytest.approx([2.0] * 4)}
    assert medians(samples) == {"slow": pytest.approx(3000), "fast": pytest.approx(2)}


def test_order_reverses_each_round():
    machine = Machine()
    functions = {name: machine.function(name, 1.0) for name in "abc"}
    interleaved(functions, rounds=3, clock=machine.clock)
    finding_loops = ["a", "b", "c"]
    assert turns([*finding_loops, "|", *machine.calls[6:]]) == [*finding_loops, "|", "a", "b", "c", "b", "a", "b", "c"]
    assert machine.calls[6:] == [
        "a",
        "a",
        "b",
        "b",
        "c",
        "c",
        "c",
        "c",
        "b",
        "b",
        "a",
        "a",
        "a",
        "a",
        "b",
        "b",
        "c",
        "c",
    ]


def test_a_loop_lasts_the_minimum_and_a_slow_call_runs_once():
    machine = Machine()
    interleaved({"f": machine.function("f", 1e-5)}, rounds=1, min_sample_secs=0.01, settle_secs=0, clock=machine.clock)
    before = len(machine.calls)
    assert 1000 <= before <= 1 + 1111 + 1 + 1001
    slow = Machine()
    interleaved({"f": slow.function("f", 1.0)}, rounds=5, clock=slow.clock)
    assert len(slow.calls) == 2 + 5 * 2


def test_each_sample_is_preceded_by_untimed_calls():
    machine = Machine()
    cold = [True]

    def secs():
        took = 0.5 if cold[0] else 0.001
        cold[0] = False
        return took

    def other():
        cold[0] = True
        machine.now += 0.001

    samples = interleaved({"f": machine.function("f", secs), "other": other}, rounds=3, clock=machine.clock)
    assert samples["f"] == pytest.approx([1000.0] * 3)


def test_each_sample_and_the_calls_before_it_are_taken_in_what_is_asked_for():
    machine = Machine()
    functions = {name: machine.function(name, 1.0) for name in "ab"}

    @contextmanager
    def around(name):
        machine.calls.append(f"<{name}")
        try:
            yield
        finally:
            machine.calls.append(">")

    interleaved(functions, rounds=2, clock=machine.clock, around=around)
    finding_loops, samples = ["<a", "a", ">", "<b", "b", ">"], ["<a", "a", ">", "<b", "b", ">", "<b", "b", ">"]
    assert turns(machine.calls) == [*finding_loops, *samples, "<a", "a", ">"]


def test_the_median_ignores_an_outlier():
    assert medians({"f": [1.0, 1.0, 900.0]}) == {"f": 1.0}


def test_garbage_collection_is_off_while_timing_and_restored_after_an_error():
    seen = []

    def fail():
        seen.append(gc.isenabled())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleaved({"f": fail}, rounds=1)
    assert seen == [False]
    assert gc.isenabled()


def test_the_real_clock():
    samples = interleaved({"f": lambda: sum(range(1000))}, rounds=2, min_sample_secs=1e-4, settle_secs=0)
    assert len(samples["f"]) == 2
    assert all(0.5 < sample < 1e5 for sample in samples["f"])


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        interleaved({}, rounds=0)
