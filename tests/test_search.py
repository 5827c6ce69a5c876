import itertools
import math
import random

import pytest
import stub_session
from hypothesis import given
from hypothesis import strategies as st

from convt_tvm.records import Candidate
from convt_tvm.search import Known, Search, rank_correlation, spec_distance
from convt_tvm.spec import ConvTranspose2dSpec

SPEC = stub_session.SPEC
NEAR = ConvTranspose2dSpec(n=1, ci=16, ih=8, iw=8, co=8, kernel_size=4, stride=2, padding=1)
FAR = ConvTranspose2dSpec(n=1, ci=512, ih=64, iw=64, co=3, kernel_size=7, stride=4, padding=1)
BATCH = 16


def make_space():
    """432 candidates like those of a CPU schedule, the cheapest by the rule first."""
    found = []
    for co_block, rows, columns, lanes, taps in itertools.product(
        (8, 16, 32, 64), (1, 2, 3, 4), (1, 2, 4, 8, 14, 16, 20, 24, 28), ("co", "ow", "none"), ("inner",)
    ):
        layout = {"co_block": co_block, "row_block": rows, "column_block": columns, "lanes": lanes, "taps": taps}
        tile = rows * columns
        surplus = math.ceil(28 / columns) * columns / 28
        penalty = {"co": 1.0, "ow": 1.1, "none": 1.6}[lanes]
        found.append((Candidate("stub", layout), 1e4 * surplus * penalty * (1 + 6 / tile) * (1 + 4 / co_block)))
    return sorted(found, key=lambda pair: pair[1])


def factor(candidate, spec=SPEC):
    """What the rule does not know, 0.77 to 1.99: smooth in the sizes, with a level for each kind of lanes."""
    layout = candidate.layout
    rows, columns, block = (math.log2(layout[name]) for name in ("row_block", "column_block", "co_block"))
    wave = math.sin(0.8 * rows + 0.2 * math.log2(spec.ci)) + math.cos(0.7 * columns + 0.5 * block)
    return 2 ** (0.4 * wave + {"co": 0.2, "ow": -0.2, "none": 0.0}[layout["lanes"]])


def true_times(choices, spec=SPEC):
    return {candidate.key: cycles / 2700 * factor(candidate, spec) for candidate, cycles in choices}


def run(search, times, trials, measured=None):
    """Measure in batches, as a session does; returns every proposal."""
    measured, made = {} if measured is None else measured, []
    while len(measured) < trials:
        proposals = search.propose(measured, min(BATCH, trials - len(measured)))
        if not proposals:
            break
        made += proposals
        measured |= {proposal.candidate.key: times[proposal.candidate.key] for proposal in proposals}
    return made


@pytest.fixture(scope="module")
def space():
    return make_space()


@pytest.mark.parametrize("count", [1, 5, BATCH])
def test_no_candidate_is_proposed_twice_and_none_is_left_out(count):
    choices, rng = stub_session.make_choices(), random.Random(0)
    search, measured, made = Search(SPEC, choices, seed=0), {}, []
    while proposals := search.propose(measured, count):
        assert len(proposals) <= count
        made += [proposal.candidate.key for proposal in proposals]
        assert len(set(made)) == len(made)
        # One in four fails; that says nothing about its time, and it is not asked for again.
        measured |= {p.candidate.key: None if rng.random() < 0.25 else rng.uniform(1, 9) for p in proposals}
    assert sorted(made) == sorted(candidate.key for candidate, _ in choices)
    assert search.propose(measured, count) == []


def test_the_default_comes_first_and_then_some_of_the_cheapest(space):
    search = Search(SPEC, space, seed=0)
    proposals = search.propose({}, BATCH)
    assert proposals[0].candidate == space[0][0] and proposals[0].origin == "default"
    origins = [proposal.origin for proposal in proposals]
    assert origins.count("rule") == 7 and origins.count("diverse") == 8
    assert [p.candidate for p in proposals if p.origin == "rule"] == [candidate for candidate, _ in space[1:8]]
    # Nothing was measured: cycles are no microseconds.
    assert {proposal.predicted_us for proposal in proposals} == {None}
    # What is unlike the cheapest is not hopelessly dear.
    assert max(proposal.cycles for proposal in proposals) <= 6 * space[0][1]


def test_proposals_follow_from_seed_and_trials_alone(space):
    times = true_times(space)
    first = run(Search(SPEC, space, seed=3), times, 64)
    assert run(Search(SPEC, space, seed=3), times, 64) == first
    assert run(Search(SPEC, space, seed=4), times, 64) != first


@pytest.mark.parametrize("stopped", [16, 32, 48])
def test_a_search_that_is_resumed_goes_on_as_it_would_have(space, stopped):
    times = true_times(space)
    whole = run(Search(SPEC, space, seed=0), times, 64)
    # Stored trials come back in any order.
    known = [proposal.candidate.key for proposal in whole[:stopped]]
    random.Random(stopped).shuffle(known)
    resumed = run(Search(SPEC, space, seed=0), times, 64, {key: times[key] for key in known})
    assert resumed == whole[stopped:]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_found_within_64_trials(space, seed):
    times = true_times(space)
    made = run(Search(SPEC, space, seed=seed), times, 64)
    best = min(times, key=times.get)
    assert best in {proposal.candidate.key for proposal in made}
    # The rule alone would not have got there in as many.
    assert best not in {candidate.key for candidate, _ in space[:64]}


def known_of(spec, choices, times):
    return [Known(spec, candidate, cycles, times[candidate.key]) for candidate, cycles in choices]


def test_the_best_of_the_nearest_workload_is_tried_early(space):
    assert spec_distance(SPEC, SPEC) == 0 < spec_distance(SPEC, NEAR) < spec_distance(SPEC, FAR)
    cheap, near_best, far_best = space[:40], space[200], space[300]
    elsewhere = [
        *known_of(FAR, [*cheap, far_best], {key: 9.0 for key in true_times(space)} | {far_best[0].key: 1.0}),
        *known_of(NEAR, [*cheap, near_best], {key: 9.0 for key in true_times(space)} | {near_best[0].key: 1.0}),
    ]
    for order in (elsewhere, elsewhere[::-1]):
        proposals = Search(SPEC, space, seed=0, elsewhere=order).propose({}, BATCH)
        assert [p.candidate for p in proposals if p.origin == "relative"] == [near_best[0], far_best[0]]
        assert proposals[0].origin == "default"


def test_a_relative_that_is_no_candidate_here_stands_for_the_one_most_like_it(space):
    gone = Candidate("stub", {**space[200][0].layout, "co_block": 128})
    search = Search(SPEC, space, seed=0, elsewhere=[Known(NEAR, gone, 1e4, 1.0)])
    (relative,) = [p.candidate for p in search.propose({}, BATCH) if p.origin == "relative"]
    assert {**relative.layout, "co_block": 128} == gone.layout


def test_trials_of_another_workload_improve_the_first_guesses(space):
    times = true_times(space)
    lessons = known_of(NEAR, random.Random(0).sample(space, 100), true_times(space, NEAR))
    first = {candidate.key: times[candidate.key] for candidate, _ in space[:2]}

    def guessed(elsewhere):
        proposals = Search(SPEC, space, seed=0, elsewhere=elsewhere).propose(first, len(space))
        assert len(proposals) == len(space) - len(first)
        return rank_correlation([p.predicted_us for p in proposals], [times[p.candidate.key] for p in proposals])

    assert guessed(lessons) > guessed([]) + 0.1


def test_predictions_order_what_is_left_better_than_the_rule_does(space):
    times, measured = true_times(space), {}
    search = Search(SPEC, space, seed=0)
    run(search, times, 64, measured)
    left = search.propose(measured, len(space))
    true = [times[proposal.candidate.key] for proposal in left]
    by_model = rank_correlation([proposal.predicted_us for proposal in left], true)
    assert by_model > 0.9 > rank_correlation([proposal.cycles for proposal in left], true)


SMALL = st.integers(0, 4) | st.floats(-1e3, 1e3)


@given(pairs=st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=30))
def test_rank_correlation_is_spearmans(pairs):
    scipy_stats = pytest.importorskip("scipy.stats")
    first, second = zip(*pairs, strict=True)
    found = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy_stats.spearmanr(first, second).statistic, abs=1e-9)


def test_rank_correlation_of_little_says_nothing():
    assert rank_correlation([], []) is None
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, 3], [2, 2, 2]) is None
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
