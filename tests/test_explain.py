import json
from types import SimpleNamespace

from convt_tvm.compiler import Stored
from convt_tvm.explain import AxisPhase, explain
from convt_tvm.roofline import Limits
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.workloads import Workload, resolve

LIMITS = Limits(1, "float32", 100e9, 10e9)


def test_multiplications_of_the_textbook_form():
    found = explain(resolve(["dcgan/5"])[0], limits=LIMITS)
    # 62 of 64 rows and columns meet two taps, the outermost one: (4*32 - 2)**2 pairs.
    assert found.useful_multiplications == 64 * 3 * 126 * 126
    assert found.textbook_multiplications == 64 * 3 * 64 * 64 * 4 * 4
    assert found.zero_multiplications == found.textbook_multiplications - found.useful_multiplications


def test_phases_name_their_taps():
    spec = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=2, kernel_size=(3, 1), stride=(2, 3), bias=False)
    found = explain(Workload("tiny", "a test", spec), limits=LIMITS)
    assert found.rows == (AxisPhase(0, 4, (0, 2)), AxisPhase(1, 3, (1,)))
    assert found.columns == (AxisPhase(0, 3, (0,)), AxisPhase(1, 2, ()), AxisPhase(2, 2, ()))


def test_the_first_candidate_is_the_default_choice(monkeypatch, tmp_path):
    from convt_tvm.space import default_choice
    from convt_tvm.target import Target

    monkeypatch.setenv("CONVT_TVM_TUNING_LOGS", str(tmp_path))
    for workload in resolve(["dcgan/2", "dcgan/5"]):
        found = explain(workload, "llvm:x86-64-v3", limits=LIMITS)
        choice = default_choice(workload.spec, Target.parse("llvm:x86-64-v3"))
        first = found.candidates[0]
        assert (first.schedule, first.layout, first.cycles) == (
            choice.space.name,
            choice.layout.to_json(),
            choice.cycles,
        )
        assert [each.cycles for each in found.candidates] == sorted(each.cycles for each in found.candidates)
        assert found.reason.startswith(f"{first.schedule} has the fewest estimated cycles of {len(found.candidates)}")


def test_a_stored_result_runs_in_place_of_the_default(monkeypatch):
    workload = resolve(["dcgan/1"])[0]
    plain = explain(workload, limits=LIMITS)
    second = plain.candidates[1]
    winner = SimpleNamespace(schedule=second.schedule, layout=second.layout)
    result = SimpleNamespace(tuned=True, candidate=winner, default_us=30.0, median_us=20.0, summary=lambda: {"a": 1})
    stored = Stored(result, ignored=("made elsewhere",))
    monkeypatch.setattr("convt_tvm.compiler.find_stored", lambda *_, **__: stored)
    found = explain(workload, limits=LIMITS)
    assert f"co_block={second.layout['co_block']}" in found.reason
    assert "1.50 times as fast as the default" in found.reason
    assert found.to_json()["stored"] == {"a": 1}
    assert found.to_json()["ignored"] == ["made elsewhere"]
    result.tuned = False
    assert "session" not in found.reason


def test_json_holds_it_all():
    found = explain(resolve(["dcgan/1"])[0], limits=LIMITS)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["workload"] == "dcgan/1" and values["threads"] == 1
    assert values["bound"]["by"] == found.bound.by and values["bound"]["us"] == found.bound.secs * 1e6
    assert len(values["candidates"]) == len(found.candidates)
    assert values["rows"][0]["taps"] == list(found.rows[0].taps)
