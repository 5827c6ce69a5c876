import json
import subprocess
import sys

import pytest
from stub_session import run_stub

from convt_tvm.errors import TuningError, TuningLogError
from convt_tvm.records import Candidate, Result, SessionInfo, Trial
from convt_tvm.store import DATABASE_FILES, RESULTS, SESSIONS, TRIALS, Read, Store, read_records, repair


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The log of a finished session, with MetaSchedule's two files as it writes them."""
    directory = tmp_path_factory.mktemp("finished")
    run_stub(directory, trials=4)
    log = directory / "log"
    workloads, tuning_records = DATABASE_FILES
    (log / workloads).write_text("".join(f'["hash{number}", "module{number}"]\n' for number in range(3)))
    (log / tuning_records).write_text("".join(f"[{number % 3}, [[], [0.5]]]\n" for number in range(6)))
    return log


def copy_of(log, directory):
    directory.mkdir()
    for path in log.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize("kind", [SessionInfo, Trial, Result])
def test_records_survive_a_round_trip(finished, kind):
    read = read_records(finished, kind)
    assert read.records and not read.problems
    for record in read.records:
        assert kind.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_an_unknown_or_missing_field_is_named(finished):
    values = read_records(finished, Trial).records[0].to_json()
    with pytest.raises(TuningLogError, match=r"lacks the fields \[\] and has the unknown ones \['novelty'\]"):
        Trial.from_json({**values, "novelty": 1})
    del values["machine"]
    with pytest.raises(TuningLogError, match="a trial record lacks a field: 'machine'"):
        Trial.from_json(values)


def test_candidates_are_equal_whatever_the_order_of_their_fields():
    assert Candidate("a", {"x": 1, "y": 2}).key == Candidate("a", {"y": 2, "x": 1}).key
    assert Candidate("a", {"x": 1}).key != Candidate("a", {"x": 1}, trace=("b",)).key


@pytest.mark.parametrize("name", [SESSIONS, TRIALS, RESULTS])
def test_cutting_any_number_of_bytes_off_loses_no_earlier_record(finished, tmp_path, name):
    log = copy_of(finished, tmp_path / "log")
    whole = (finished / name).read_bytes()
    kind = {SESSIONS: SessionInfo, TRIALS: Trial, RESULTS: Result}[name]
    every = read_records(finished, kind).records
    for size in range(len(whole) + 1):
        (log / name).write_bytes(whole[:size])
        # A last line that lacks only its line feed is whole.
        expected = every[: sum(is_json(line) for line in whole[:size].split(b"\n"))]
        assert read_records(log, kind).records == expected
        repair(log)
        assert read_records(log, kind) == Read(expected, ())
    with Store.open(log) as store:
        store.append(every[0])
    assert read_records(log, kind).records[-1] == every[0]


def is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", DATABASE_FILES)
def test_cutting_the_database_leaves_every_earlier_record_that_still_has_its_workload(finished, tmp_path, name):
    log = copy_of(finished, tmp_path / "log")
    whole = {file: (finished / file).read_bytes() for file in DATABASE_FILES}
    for size in range(len(whole[name]) + 1):
        for file in DATABASE_FILES:
            (log / file).write_bytes(whole[file][:size] if file == name else whole[file])
        repair(log)
        workloads, records = (
            [json.loads(line) for line in (log / file).read_text().splitlines()] for file in DATABASE_FILES
        )
        assert all(record[0] < len(workloads) for record in records)
        lost = whole[name][size:].count(b"\n")
        assert len(workloads) >= 3 - (lost if name == DATABASE_FILES[0] else 0)
        if name == DATABASE_FILES[1]:
            assert len(records) >= 6 - lost


def test_a_torn_line_is_mentioned_and_the_next_one_stands_alone(finished, tmp_path):
    log = copy_of(finished, tmp_path / "log")
    with (log / TRIALS).open("a") as file:
        file.write('{"schedule": "st')
    before = read_records(log, Trial)
    assert len(before.records) == 4 and "line 5, was skipped" in before.problems[0]
    with Store.open(log) as store:
        assert store.repaired == ("trials.jsonl ended in a torn line of 16 bytes, which was cut off",)
        store.append(before.records[0])
    assert len(read_records(log, Trial).records) == 5


def test_a_second_session_is_refused_by_name_and_may_wait(finished, tmp_path):
    log = copy_of(finished, tmp_path / "log")
    hold = "\n".join(
        (
            "from pathlib import Path",
            "from convt_tvm.store import Store",
            f"with Store.open(Path({str(log)!r})):",
            "    print(1, flush=True)",
            "    input()",
        )
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        refusal = r"another session \(process 1 on here\) is writing to .*; wait for it"
        with pytest.raises(TuningError, match=refusal), Store.open(log):
            pass
        # The lock goes with its holder, however that ends.
        other.kill()
        with Store.open(log, wait_secs=5) as store:
            assert len(store.read(Trial).records) == 4
