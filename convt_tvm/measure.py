"""Timing functions against each other in one process."""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import TypeAlias

__all__ = ["TimeCalls", "interleaved", "medians", "noise_floor", "ratio"]

TimeCalls: TypeAlias = Callable[[Callable[[], object], int], float]
"""Calls a function so many times and returns the seconds that all of it took."""

_LONGEST_LOOP = 1_000_000


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    min_sample_secs: float = 0.005,
    settle_secs: float = 0.005,
    clock: Callable[[], float] = perf_counter,
    time_calls: TimeCalls | None = None,
    around: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, list[float]]:
    """Microseconds per call of each function: `rounds` raw samples each, taken by turns.

    Every round visits all functions once, in the opposite order of the round before, so that a drift of the machine
    falls on all of them alike. A sample is the mean over a loop of calls.

    Parameters
    ----------
    functions
        Called without arguments; the results are dropped.
    rounds
        At least 1.
    min_sample_secs
        Each loop makes as many calls as fill this time, found out beforehand; a longer call is a loop of one.
    settle_secs
        Before each sample the function runs untimed for this long, at least once: its thread pool wakes up, its data
        returns to the caches, and the workers of the function before it, which spin for a few milliseconds waiting for
        more, have gone to sleep.
    clock
        Seconds, for tests.
    time_calls
        Takes the time instead, of what a device still computes when the call has returned.
    around
        What each sample of the function so named is taken in, with the calls before it.

    Raises
    ------
    ValueError
        if `rounds` is below 1.
    Exception
        whatever a function raises.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")

    def run(function: Callable[[], object], calls: int) -> float:
        if time_calls is not None:
            return time_calls(function, calls)
        start = clock()
        for _ in range(calls):
            function()
        return clock() - start

    def settle(function: Callable[[], object]) -> None:
        start = clock()
        function()
        while clock() - start < settle_secs:
            function()

    def loop_length(name: str) -> int:
        with around(name):
            settle(functions[name])
            calls = 1
            while (elapsed := run(functions[name], calls)) < min_sample_secs and calls < _LONGEST_LOOP:
                # Past a tenth of the goal the estimate is good enough to be the last one.
                sure = elapsed > min_sample_secs / 10
                wanted = int(calls * min_sample_secs / elapsed) + 1 if sure else calls * 10
                calls = min(wanted, _LONGEST_LOOP)
                if sure:
                    break
            return calls

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        loops = {name: loop_length(name) for name in functions}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        order = list(functions)
        for _ in range(rounds):
            for name in order:
                with around(name):
                    settle(functions[name])
                    samples[name].append(run(functions[name], loops[name]) / loops[name] * 1e6)
            order.reverse()
        return samples
    finally:
        if was_enabled:
            gc.enable()


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each list of `interleaved`."""
    return {name: median(values) for name, values in samples.items()}


def ratio(samples: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long the first took as the others: the median of the ratios in each round of `interleaved`.

    On a machine that is slow for seconds or minutes samples fall into two groups, and a median is in either by chance:
    two medians may compare slow rounds with fast ones. Samples of one round are close together in time.
    """
    return median(one / other for one, other in zip(samples, others, strict=True))


def noise_floor(ours: Sequence[float], copy: Sequence[float]) -> float:
    """By what ratio, at least 1, two copies of one kernel differed.

    The larger of the ratio of their medians and the median of the ratios in each round: the second is rarely close to 1
    by chance, as the first may be.
    """

    def above_one(ratio: float) -> float:
        return max(ratio, 1 / ratio)

    return max(
        above_one(median(ours) / median(copy)),
        median(above_one(mine / other) for mine, other in zip(ours, copy, strict=True)),
    )
