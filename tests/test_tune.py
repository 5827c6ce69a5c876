"""Sessions that build, check and time real kernels."""

import json
import os
import sys
from pathlib import Path

import pytest

from convt_tvm import trials
from convt_tvm.records import Trial
from convt_tvm.space import choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import read_records
from convt_tvm.target import Target
from convt_tvm.tune import Budget, tune
from convt_tvm.workers import Worker
from convt_tvm.workloads import Workload

HOST = Target.parse("llvm").for_dtype("float32")
SPEC = ConvTranspose2dSpec(n=1, ci=8, ih=6, iw=7, co=20, kernel_size=4, stride=2, padding=1)


@pytest.mark.tune
def test_a_planted_off_by_one_is_rejected_and_the_report_shows_it(run, tmp_path, monkeypatch):
    # Within the first batch; not the default, without which there is no session.
    planted = choices(SPEC, HOST)[1].candidate
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    def start(module, arguments=()):
        if list(arguments) != ["build"]:
            return Worker(module, arguments)
        return Worker("planted_builder", [json.dumps(dict(planted.layout)), *arguments], {"PYTHONPATH": path})

    monkeypatch.setattr(trials, "Worker", start)
    outcome = tune(
        Workload("tiny", "", SPEC), HOST, budget=Budget(6, 10), effort="quick", threads=1, logs=tmp_path / "logs"
    )
    assert (outcome.trials, dict(outcome.failures)) == (6, {"wrong": 1})
    assert planted not in [finalist.candidate for finalist in outcome.result.finalists]
    (log,) = (tmp_path / "logs").glob("*/*/")
    (wrong,) = [trial for trial in read_records(log, Trial).records if trial.status == "wrong"]
    assert wrong.candidate == planted and wrong.samples_us == ()

    code, out, _ = run("report", "--session", log)
    assert code == 0
    assert "tiny, 1 thread" in out and ": 1 wrong\n" in out
    assert f"wrong  tiny, 1 thread, machine {outcome.info.context.machine}: {planted}: " in out
    assert "outputs are wrong on integers" in out and "    b0 = GetSBlock(" in out
    pytest.importorskip("matplotlib")
    assert run("report", "--session", log, "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Failed: 1 wrong" in page and "outputs are wrong on integers" in page
    assert f"Steps of the wrong {planted}" in page and "= GetSBlock(" in page
