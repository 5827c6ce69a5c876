import json
from dataclasses import fields, replace

import pytest

from convt_tvm.errors import RowsError
from convt_tvm.json_lines import append_lines
from convt_tvm.rows import (
    COPY,
    OURS,
    OURS_DEFAULT,
    OURS_LAST,
    OURS_ONE_THREAD,
    TORCH_LAST,
    Row,
    geometric_means,
    latest_runs,
    read_rows,
    regressions,
)

BASE = Row(
    workload="dcgan/2",
    spec="n1_ci512",
    implementation=OURS,
    status="ok",
    threads=1,
    rounds=3,
    target="llvm:x86_64",
    date="2026-01-01T00:00:00.000+00:00",
    machine={"cpu": "a cpu", "cores": 2, "os": "Linux", "python": "3.11.0"},
    versions={"torch": "2.13.0", "openvino": None},
    commit="abc",
    noise_floor=1.02,
)


def run_of(times, **changes):
    """Rows of one run; a time of None is a peer that refused."""
    return [
        replace(
            BASE,
            implementation=name,
            median_us=time,
            samples_us=(time,) * BASE.rounds if time else (),
            status="ok" if time else "rejected",
            reason="" if time else "not this one",
            **changes,
        )
        for name, time in times.items()
    ]


def test_rows_survive_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = replace(BASE, samples_us=(1.0, 2.5), median_us=1.75, layout={"lanes": "co"}, bound_by="memory")
    append_lines(path, [first])
    append_lines(path, [BASE])
    assert read_rows(path) == [first, BASE]


def test_infinity_becomes_null():
    row = replace(BASE, error_over_bound=float("inf")).to_json()
    assert row["error_over_bound"] is None
    json.dumps(row, allow_nan=False)


def test_every_field_is_stored():
    assert BASE.to_json().keys() == {field.name for field in fields(Row)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: a benchmark row lacks the fields .*'spec'"),
        (json.dumps(BASE.to_json() | {"colour": 1}), r"unknown ones \['colour'\]; write rows with"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    append_lines(path, [BASE])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RowsError, match=message):
        read_rows(path)


def test_a_run_compares_with_its_best_peer():
    (run,) = latest_runs(run_of({OURS: 10.0, COPY: 9.0, "torch": 40.0, "openvino": 12.0, "onnxruntime": None}))
    assert run.best_peer.implementation == "openvino"
    assert (run.over_best, run.over_torch) == (pytest.approx(1.2), pytest.approx(4.0))
    assert list(run.peers) == ["torch", "openvino", "onnxruntime"]
    assert not run.is_behind


def test_samples_are_compared_with_those_of_their_round():
    """The machine was slow in the last three rounds, but for the last sample of the peer."""
    ours, peer = run_of({OURS: 20.0, "torch": 15.0})
    ours, peer = replace(ours, samples_us=(10, 10, 20, 20, 20)), replace(peer, samples_us=(15, 15, 30, 30, 15))
    (run,) = latest_runs([ours, peer])
    assert (run.over_best, run.is_behind) == (pytest.approx(1.5), False)


def test_a_peer_is_compared_with_ours_in_its_memory_format():
    (run,) = latest_runs(run_of({OURS: 10.0, COPY: 10.0, OURS_LAST: 5.0, "torch": 18.0, TORCH_LAST: 9.5}))
    assert list(run.peers) == ["torch", TORCH_LAST]
    assert (run.best_peer.implementation, run.over_best) == ("torch", pytest.approx(1.8))
    (run,) = latest_runs(run_of({OURS: 10.0, OURS_LAST: 9.0, "torch": 40.0, TORCH_LAST: 9.5}))
    assert (run.best_peer.implementation, run.over_best) == (TORCH_LAST, pytest.approx(9.5 / 9))
    # Rows from before there were such kernels, and those that could not be timed.
    (run,) = latest_runs(run_of({OURS: 10.0, TORCH_LAST: 9.0}))
    assert (run.over_best, run.is_behind) == (pytest.approx(0.9), True)
    (run,) = latest_runs(run_of({OURS: 10.0, OURS_LAST: None, TORCH_LAST: 9.0}))
    assert run.over_best is None


def test_the_default_kernel_is_ours_and_can_stand_in():
    (run,) = latest_runs(run_of({OURS: 10.0, COPY: 10.0, OURS_DEFAULT: 16.0, "torch": 15.0}))
    assert (list(run.peers), run.over_best, run.is_behind) == (["torch"], pytest.approx(1.5), False)
    assert (run.by_default.over_best, run.by_default.is_behind) == (pytest.approx(15 / 16), True)
    (run,) = latest_runs(run_of({OURS: 10.0, "torch": 15.0}))
    assert run.by_default is run


def test_ours_with_one_thread_is_no_peer_and_is_compared_in_each_round():
    ours, alone = run_of({OURS: 10.0, OURS_ONE_THREAD: 10.0})
    ours, alone = replace(ours, samples_us=(5, 5, 10, 10, 10)), replace(alone, samples_us=(10, 10, 20, 20, 9))
    (run,) = latest_runs([ours, alone])
    assert (run.peers, run.over_one_thread) == ({}, pytest.approx(0.5))
    for beside in {}, {OURS_ONE_THREAD: None}:
        (run,) = latest_runs(run_of({OURS: 10.0, **beside}))
        assert run.over_one_thread is None


@pytest.mark.parametrize(("peer", "behind"), [(9.9, False), (9.7, True)])
def test_behind_means_by_more_than_the_noise(peer, behind):
    (run,) = latest_runs(run_of({OURS: 10.0, "torch": peer}))
    assert run.is_behind is behind


def test_without_our_time_there_is_no_ratio():
    (run,) = latest_runs(run_of({OURS: None, "torch": 4.0}))
    assert (run.over_best, run.over_torch, run.is_behind) == (None, None, False)
    (run,) = latest_runs(run_of({OURS: 4.0, "torch": None}))
    assert (run.best_peer, run.over_best) == (None, None)


def test_the_last_run_counts_and_runs_are_not_mixed():
    old = run_of({OURS: 10.0, "torch": 40.0, "openvino": 12.0})
    new = run_of({OURS: 8.0, "torch": 40.0}, date="2026-01-02T00:00:00.000+00:00")
    two = run_of({OURS: 5.0}, threads=2)
    runs = latest_runs([*new, *old, *two])
    assert [(run.ours.threads, run.ours.median_us, list(run.peers)) for run in runs] == [
        (1, 8.0, ["torch"]),
        (2, 5.0, []),
    ]


def test_geometric_means_skip_what_was_not_compared():
    runs = [*latest_runs(run_of({OURS: 10.0, "torch": 40.0})), *latest_runs(run_of({OURS: 10.0, "openvino": 10.0}))]
    assert geometric_means(runs) == (pytest.approx(2.0), pytest.approx(4.0))
    assert geometric_means([]) == (None, None)


def test_a_regression_exceeds_both_noise_floors():
    old = run_of({OURS: 10.0, "torch": 40.0})
    within = run_of({OURS: 10.3, "torch": 40.0})
    assert regressions(old, within) == []
    (line,) = regressions(old, run_of({OURS: 10.5, "torch": 40.0}))
    assert line == "dcgan/2: 3.81x torch, formerly 4.00x; slower by 5.0%, noise 4.0%"


def test_a_slower_machine_is_no_regression():
    assert regressions(run_of({OURS: 10.0, "torch": 40.0}), run_of({OURS: 30.0, "torch": 120.0})) == []


@pytest.mark.parametrize("other", [run_of({OURS: 10.0}), run_of({OURS: 10.0, "torch": 4.0}, threads=2), []])
def test_nothing_in_common_is_an_error(other):
    with pytest.raises(RowsError, match="no workload in common"):
        regressions(run_of({OURS: 10.0, "torch": 40.0}), other)
