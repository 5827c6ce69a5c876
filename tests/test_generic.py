"""TVM's own space as a baseline: what it proposes is built, checked and timed like ours, and never used by `build`."""

from functools import partial

import pytest
import torch
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from convt_tvm import generic
from convt_tvm.compiler import best_choice, build_artifact
from convt_tvm.compute import declare_phases
from convt_tvm.database import find_result
from convt_tvm.errors import TuningError
from convt_tvm.layout import Layout, bands, reaches
from convt_tvm.records import GENERIC, Candidate, Context, Trial
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.runtime import load
from convt_tvm.schedule import sum_loops
from convt_tvm.session_report import read_searches, readable_trace
from convt_tvm.space import default_choice, find_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tune import Budget, is_same_code, tune
from convt_tvm.workloads import Workload, resolve

HOST = Target.parse("llvm").for_dtype("float32")
FEW = ConvTranspose2dSpec(n=1, ci=8, ih=6, iw=7, co=3, kernel_size=4, stride=2, padding=1)
# Two groups, columns that the stride does not divide, several bands of rows.
ODD = ConvTranspose2dSpec(
    n=2, ci=6, ih=5, iw=9, co=36, kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), output_padding=(1, 2), groups=2
)


@pytest.fixture(autouse=True)
def small_evolution(monkeypatch):
    """A search of TVM's that takes a second and not a minute."""
    small = partial(
        ms.search_strategy.EvolutionarySearch, population_size=12, init_min_unmeasured=4, genetic_num_iters=1
    )
    monkeypatch.setattr(ms.search_strategy, "EvolutionarySearch", small)
    monkeypatch.setattr(generic, "GENERATION", 6)


@pytest.mark.parametrize("spec", [FEW, ODD, resolve(["dcgan/2"])[0].spec])
def test_the_plain_form_has_one_sum_for_each_output(spec):
    layout = generic.plain_layout(spec)
    assert layout == Layout.from_json(layout.to_json())
    sch = Schedule(declare_phases(spec, layout, HOST))
    for band in bands(spec):
        assert (layout.rows(band), layout.blocks(spec)) == (band.rows, 1)
        if reaches(spec, band):
            assert sum_loops(sch, sch.get_sblock(f"acc{band.index}"))[1] == []


def search_of(spec, **arguments):
    return generic.GenericSearch(spec, HOST, threads=1, seed=0, **arguments)


@pytest.mark.parametrize("spec", [FEW, ODD])
def test_candidates_are_schedules_of_the_plain_form_and_right(spec, tmp_path):
    proposals = search_of(spec).propose({}, 3)
    assert len({proposal.candidate.key for proposal in proposals}) == len(proposals) == 3
    inputs = integer_inputs(spec, 0)
    for number, proposal in enumerate(proposals):
        assert (proposal.origin, proposal.cycles, proposal.candidate.space) == ("evolution", None, GENERIC)
        # As the log keeps it.
        stored = Candidate.from_json(proposal.candidate.to_json())
        manifest = build_artifact(spec, HOST, tmp_path / str(number), choice=find_choice(spec, HOST, stored))
        assert manifest.schedule == "generic" and manifest.trace == list(stored.trace)
        assert torch.equal(load(tmp_path / str(number))(*inputs), reference(spec, *inputs).to(torch.float32))


def test_what_was_measured_is_learned_and_not_proposed_again():
    search = search_of(FEW)
    measured = {}
    while len(measured) < 14:
        proposals = search.propose(measured, 4)
        assert proposals and not measured.keys() & {proposal.candidate.key for proposal in proposals}
        measured |= {each.candidate.key: 100.0 if measured else None for each in proposals[:1]}
        measured |= {each.candidate.key: 100.0 for each in proposals[1:]}
    learned = search._database.get_all_tuning_records()
    assert 6 <= len(learned) <= len(measured) and search._model.data_size == len(learned)
    assert sorted({float(record.run_secs[0]) for record in learned}) == [1e-4, generic.FAILED_SECS]

    resumed = search_of(FEW, earlier=search._candidates.values())
    assert not measured.keys() & {each.candidate.key for each in resumed.propose(measured, 4)}
    assert len(resumed._database) == resumed._model.data_size == len(measured)


@pytest.mark.tune
def test_a_session_races_ours_and_build_ignores_it(tmp_path):
    workload = Workload("tiny", "", FEW)
    arguments = dict(budget=Budget(5, 5), effort="quick", threads=1, logs=tmp_path, space=GENERIC)
    outcome = tune(workload, HOST, **arguments)
    assert (outcome.trials, outcome.stopped) == (5, "trials")
    result = outcome.result
    assert result.candidate.space == GENERIC
    assert outcome.info.default == default_choice(FEW, HOST).candidate
    assert outcome.info.default in [finalist.candidate for finalist in result.finalists]

    found = find_result(FEW, HOST, threads=1, logs=tmp_path)
    assert found.result is None
    assert found.ignored == (f"the result of session {result.session} is a baseline, from TVM's own space",)
    assert best_choice(FEW, HOST, threads=1, logs=tmp_path) == default_choice(FEW, HOST)

    again = tune(workload, HOST, **arguments)
    assert (again.measured, again.result) == (0, result)
    (directory,) = tmp_path.glob("*/*/")
    (search,) = read_searches(directory)
    assert (search.space, len(search.trials), search.result) == (GENERIC, 5, result)
    assert "= SamplePerfectTile(" in readable_trace(search, result.candidate)


def test_trials_of_other_sources_do_not_count():
    (proposal,) = search_of(FEW).propose({}, 1)
    trial = Trial(
        Context(HOST.name, "aaaaaaaa", 1),
        "0" * 12,
        "5e551011",
        "2026-01-01T00:00:00+00:00",
        proposal.candidate,
        "d",
        "ok",
    )
    # Its trace does not apply to another declaration, and nobody tries.
    assert not is_same_code(ODD, HOST, trial)


def test_gpus_are_refused(tmp_path):
    with pytest.raises(TuningError, match="TVM's own space is searched with its rules for llvm only, not for cuda"):
        tune(
            Workload("tiny", "", FEW),
            "cuda:sm_90",
            budget=Budget(1, 1),
            effort="quick",
            threads=1,
            logs=tmp_path,
            space=GENERIC,
        )
