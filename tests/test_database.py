import json
import re
from dataclasses import replace

import pytest
from stub_session import SPEC, make_info, run_stub
from tvm.s_tir import Schedule
from tvm.s_tir.meta_schedule.database import JSONDatabase

from convt_tvm import compiler
from convt_tvm.database import find_result, log_directory, logs_directory, merge, relatives
from convt_tvm.errors import TuningError, TuningLogError
from convt_tvm.explain import explain
from convt_tvm.machine import machine
from convt_tvm.metaschedule import commit
from convt_tvm.records import Candidate, Context, Finalist, Result, SessionInfo, Trial
from convt_tvm.roofline import Limits
from convt_tvm.space import choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import DATABASE_FILES, RESULTS, TRIALS, Store, read_records
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

HOST = Target.parse("llvm").for_dtype("float32")
HERE = Context(HOST.name, machine().key, 1)
ELSEWHERE = replace(HERE, machine="another0")
OTHER = ConvTranspose2dSpec(n=1, ci=4, ih=3, iw=3, co=2, kernel_size=3)


def result_of(**changes):
    values = dict(
        context=HERE,
        source="0" * 12,
        session="5e551011",
        date="2026-01-01T00:00:00+00:00",
        candidate=Candidate("stub", {"rows": 1}),
        digest="d" * 16,
        tuned=True,
        median_us=50.0,
        mad_us=1.0,
        default_us=100.0,
        noise_floor=1.01,
        trials=64,
    )
    return Result(**{**values, **changes})


def trial_of(**changes):
    values = dict(
        context=HERE,
        source="0" * 12,
        session="5e551011",
        date="2026-01-01T00:00:00+00:00",
        candidate=Candidate("stub", {"rows": 1}),
        digest="d" * 16,
        status="ok",
        cycles=1e4,
        samples_us=(5.0,),
    )
    return Trial(**{**values, **changes})


def write(logs, *records, spec=SPEC, target=HOST):
    with Store.open(log_directory(logs, spec, target)) as store:
        for record in records:
            store.append(record)


def write_tuned(logs, spec, target, number):
    """Store a result that the choice of this number is faster than the default; returns the choice."""
    choice = choices(spec, target)[number]
    code = compiler.lower_choice(spec, target, choice).code
    write(logs, result_of(candidate=choice.candidate, digest=code), spec=spec, target=target)
    return choice


def files_below(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.glob("*/*/*")
        if path.name.endswith((".json", ".jsonl"))
    }


def test_logs_are_where_the_variable_says_and_else_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVT_TVM_TUNING_LOGS", str(tmp_path))
    assert logs_directory() == tmp_path
    write(tmp_path, result_of())
    assert find_result(SPEC, HOST, threads=1).result == result_of()
    monkeypatch.delenv("CONVT_TVM_TUNING_LOGS")
    assert logs_directory().name == "tuning_logs" and logs_directory().is_dir()


def test_nothing_is_found_and_nothing_made_where_nothing_is(tmp_path):
    found = find_result(SPEC, HOST, threads=1, logs=tmp_path / "none")
    assert (found.result, found.ignored) == (None, ())
    assert not (tmp_path / "none").exists()


def test_every_workload_and_target_has_results_of_its_own(tmp_path):
    v2 = Target.parse("llvm:x86-64-v2")
    mine, others, of_v2 = (result_of(session=name) for name in ("1" * 8, "2" * 8, "3" * 8))
    of_v2 = replace(of_v2, context=replace(HERE, target=v2.name))
    write(tmp_path, mine)
    write(tmp_path, others, spec=OTHER)
    write(tmp_path, of_v2, target=v2)
    assert find_result(SPEC, HOST, threads=1, logs=tmp_path).result == mine
    assert find_result(OTHER, HOST, threads=1, logs=tmp_path).result == others
    assert find_result(SPEC, v2, threads=1, logs=tmp_path).result == of_v2
    assert find_result(OTHER, v2, threads=1, logs=tmp_path).result is None


def test_a_result_for_another_target_in_the_same_directory_is_ignored_with_its_reason(tmp_path):
    write(tmp_path, result_of(context=replace(HERE, target="llvm:x86_64+other")))
    found = find_result(SPEC, HOST, threads=1, logs=tmp_path)
    assert found.result is None
    assert found.ignored == ("the result of session 5e551011 is for the target llvm:x86_64+other",)


def test_results_are_for_a_number_of_threads_and_the_nearest_stands_in(tmp_path):
    by_threads = {count: result_of(context=replace(HERE, threads=count), session=f"{count:08d}") for count in (1, 2, 8)}
    write(tmp_path, *by_threads.values())
    nearest = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 8, 8: 8, 64: 8}
    for threads, stands_in in nearest.items():
        assert find_result(SPEC, HOST, threads=threads, logs=tmp_path).result == by_threads[stands_in]


def test_threads_are_those_of_this_process_by_default(tmp_path, monkeypatch):
    write(tmp_path, *(result_of(context=replace(HERE, threads=count)) for count in (1, 3)))
    for count in (1, 3):
        monkeypatch.setattr("convt_tvm.threads.get_num_threads", lambda count=count: count)
        assert find_result(SPEC, HOST, logs=tmp_path).result.context.threads == count


@pytest.mark.parametrize("backwards", [False, True])
def test_the_newest_result_counts_in_whatever_order_they_were_merged(tmp_path, backwards):
    old, new = result_of(median_us=40.0), result_of(date="2026-01-02T00:00:00+00:00", session="newer000")
    write(tmp_path, *((new, old) if backwards else (old, new)))
    assert find_result(SPEC, HOST, threads=1, logs=tmp_path).result == new


def test_another_machines_result_never_counts(tmp_path):
    faster = result_of(context=ELSEWHERE, median_us=1.0, date="2026-02-01T00:00:00+00:00", session="faster00")
    write(tmp_path, faster)
    found = find_result(SPEC, HOST, threads=1, logs=tmp_path)
    assert found.result is None
    reason = f"the result of session faster00 is from machine another0, and this one is {HERE.machine}"
    assert found.ignored == (reason,)
    write(tmp_path, result_of(context=replace(HERE, threads=8)), faster)
    found = find_result(SPEC, HOST, threads=1, logs=tmp_path)
    assert (found.result.context.threads, found.ignored) == (8, (reason, reason))


def test_an_unreadable_result_is_ignored_with_its_reason(tmp_path):
    write(tmp_path, result_of())
    path = log_directory(tmp_path, SPEC, HOST) / RESULTS
    path.write_text('{"machine": 1}\n' + path.read_text() + '{"torn')
    found = find_result(SPEC, HOST, threads=1, logs=tmp_path)
    assert found.result == result_of()
    first, last = found.ignored
    assert first.startswith("results.jsonl, line 1, was skipped: a result record lacks a field: 'target'")
    assert last.startswith("results.jsonl, line 3, was skipped: it is no JSON")


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Stores a result for the tenth choice of `SPEC` as changed; returns what the manifest of a build says."""
    monkeypatch.setenv("CONVT_TVM_TUNING_LOGS", str(tmp_path / "logs"))

    def compile_nothing(module, target, library):
        library.write_bytes(b"")
        return []

    monkeypatch.setattr(compiler, "compile_module", compile_nothing)

    def build(**changes):
        choice = choices(SPEC, HOST)[10]
        digest = compiler.lower_choice(SPEC, HOST, choice).code
        write(tmp_path / "logs", result_of(**{"candidate": choice.candidate, "digest": digest, **changes}))
        return choice, compiler.build_artifact(SPEC, HOST, tmp_path / "artifact")

    return build


def explained():
    return explain(Workload("tiny", "a test", SPEC), HOST, limits=Limits(1, "float32", 100e9, 10e9))


def test_a_build_takes_the_stored_result_and_says_so(tuned):
    choice, manifest = tuned()
    assert (manifest.schedule, manifest.layout) == (choice.space.name, choice.layout.to_json())
    assert manifest.tuning["result"]["session"] == "5e551011" and manifest.tuning["ignored"] == []
    assert explained().stored.session == "5e551011" and explained().ignored == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"candidate": Candidate("stub", {"rows": 1})}, r"is for stub \(rows=1\), which is no candidate any more"),
        ({"digest": "0" * 16}, r"is for .*, which is other code by now"),
        ({"context": ELSEWHERE}, "is from machine another0"),
    ],
)
def test_a_build_says_why_a_stored_result_does_not_apply(tuned, changes, reason):
    _, manifest = tuned(**changes)
    default = choices(SPEC, HOST)[0]
    assert (manifest.schedule, manifest.layout) == (default.space.name, default.layout.to_json())
    assert "result" not in manifest.tuning
    (said,) = manifest.tuning["ignored"]
    assert re.match(f"the result of session 5e551011 {reason}", said)
    assert explained().stored is None and explained().ignored == (said,)


def test_relatives_are_timed_trials_of_other_workloads_in_the_same_context(tmp_path):
    wanted = trial_of(session="wanted00")
    write(tmp_path, trial_of())
    write(
        tmp_path,
        wanted,
        trial_of(status="wrong", samples_us=()),
        trial_of(context=ELSEWHERE),
        trial_of(context=replace(HERE, threads=2)),
        spec=OTHER,
    )
    (tmp_path / HOST.key / "no-spec").mkdir()
    assert list(relatives(tmp_path, SPEC, HERE)) == [(OTHER, wanted)]


@pytest.fixture
def theirs(tmp_path):
    """The logs of another machine, with a finished session and MetaSchedule's files."""
    logs = tmp_path / "theirs"
    run_stub(tmp_path / "stub", trials=5, context=ELSEWHERE)
    log = log_directory(logs, SPEC, HOST)
    log.parent.mkdir(parents=True)
    (tmp_path / "stub" / "log").rename(log)
    workloads, tuning_records = (log / name for name in DATABASE_FILES)
    workloads.write_text('["hash1", "module1"]\n["hash0", "module0"]\n')
    tuning_records.write_text("[0, [[], [0.25]]]\n[1, [[], [0.5]]]\n")
    return logs


def test_merging_twice_is_merging_once(theirs, tmp_path):
    ours = tmp_path / "ours"
    (first,) = merge(theirs, ours)
    assert (first.spec, first.added) == (SPEC.name, {"sessions.jsonl": 1, "trials.jsonl": 5, "results.jsonl": 1})
    once = files_below(ours)
    assert once.keys() == files_below(theirs).keys() and len(once) == 5
    (second,) = merge(theirs, ours)
    assert set(second.added.values()) == {0}
    assert files_below(ours) == once


def test_merged_records_stand_behind_ours_and_never_win_here(theirs, tmp_path):
    ours = tmp_path / "ours"
    mine, trial = result_of(median_us=1e6), trial_of()
    write(ours, make_info(context=HERE), trial, mine)
    merge(theirs, ours)
    log, their_log = (log_directory(logs, SPEC, HOST) for logs in (ours, theirs))
    assert read_records(log, Trial).records == (trial, *read_records(their_log, Trial).records)
    assert [info.context for info in read_records(log, SessionInfo).records] == [HERE, ELSEWHERE]
    assert find_result(SPEC, HOST, threads=1, logs=ours).result == mine


def test_merged_tuning_records_keep_their_workloads(theirs, tmp_path):
    log = log_directory(tmp_path / "ours", SPEC, HOST)
    log.mkdir(parents=True)
    workloads, tuning_records = (log / name for name in DATABASE_FILES)
    workloads.write_text('["hash0", "module0"]\n["hash2", "module2"]\n')
    tuning_records.write_text("[1, [[], [0.125]]]\n[0, [[], [0.5]]]\n")
    merge(theirs, tmp_path / "ours")
    named = [json.loads(line)[0] for line in workloads.read_text().splitlines()]
    assert named == ["hash0", "hash2", "hash1"]
    records = [json.loads(line) for line in tuning_records.read_text().splitlines()]
    # Theirs of hash0 is ours already.
    assert [(named[number], value[1]) for number, value in records] == [
        ("hash2", [0.125]),
        ("hash0", [0.5]),
        ("hash1", [0.25]),
    ]


def test_a_torn_line_of_theirs_is_not_merged(theirs, tmp_path):
    path = log_directory(theirs, SPEC, HOST) / TRIALS
    path.write_text(path.read_text()[:-20])
    (merged,) = merge(theirs, tmp_path / "ours")
    assert merged.added[TRIALS] == 4


def test_merging_what_holds_no_logs_or_into_a_log_in_use_is_refused(theirs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TuningLogError, match=r"empty holds no tuning logs; name a directory of <target key>/"):
        merge(tmp_path / "empty", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with (
        Store.open(log_directory(tmp_path / "ours", SPEC, HOST)),
        pytest.raises(TuningError, match="another session is writing to"),
    ):
        merge(theirs, tmp_path / "ours")


@pytest.mark.parametrize(
    ("schedule", "target", "changes"),
    [
        ("llvm_columns", "llvm:x86-64-v3", {}),
        ("llvm_taps", "llvm:x86-64-v3", {}),
        ("llvm_depthwise", "llvm:x86-64-v3", {"co": 8, "groups": 8, "memory_format": "channels_last"}),
        ("llvm_dot", "llvm:x86_64+avx512bf16+avx512vl", {"dtype": "bfloat16"}),
    ],
)
def test_winners_of_every_kind_are_kept_for_tvm_alone(schedule, target, changes, tmp_path):
    spec = ConvTranspose2dSpec(**{"n": 1, "ci": 8, "ih": 6, "iw": 6, "co": 4, "kernel_size": 3, **changes})
    target = Target.parse(target)
    candidate = choices(spec, target, schedule)[0].candidate
    result = result_of(candidate=candidate, finalists=(Finalist(candidate, "d" * 16, (50.0, 51.0)),))
    with Store.open(tmp_path / "log") as store:
        commit(store, spec, target, result)
    database = JSONDatabase(*(str(tmp_path / "log" / name) for name in DATABASE_FILES))
    (record,) = database.get_all_tuning_records()
    assert [float(secs) for secs in record.run_secs] == pytest.approx([50e-6, 51e-6])
    schedule = Schedule(record.workload.mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    assert schedule.trace is not None
