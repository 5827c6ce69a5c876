"""A session whose builder and runner compute nothing: ``python stub_session.py LOG TRIALS SECS-A-TRIAL``."""

import itertools
import sys
import time
from pathlib import Path

from convt_tvm.records import Candidate, Context, SessionInfo
from convt_tvm.search import Search
from convt_tvm.session import run_session
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import Store
from convt_tvm.trials import Built, Measured

SPEC = ConvTranspose2dSpec(n=1, ci=8, ih=8, iw=8, co=8, kernel_size=4, stride=2, padding=1)
TRACE = ([["GetSBlock", [], ["acc0"], ["b0"]], ["SampleCategorical", [], [[0, 16]], ["v1"]]], [[1, 1]])
CONTEXT = Context("llvm:x86_64", "aaaaaaaa", 1)


def make_choices():
    """60 candidates with cycles, the cheapest first; the rule ignores `color`, which matters."""
    made = [
        (Candidate("stub", {"rows": rows, "columns": columns, "color": color}), 100.0 * rows + 10 * columns)
        for rows, columns, color in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), ("red", "green", "blue"))
    ]
    return sorted(made, key=lambda pair: pair[1])


def true_us(candidate):
    layout = candidate.layout
    return (
        (100.0 * layout["rows"] + 10 * layout["columns"])
        / 10
        * {"red": 2.0, "green": 1.0, "blue": 1.5}[layout["color"]]
    )


class StubBuilder:
    def __init__(self, directory):
        self.directory = directory
        self.built = []

    def build(self, candidates):
        for candidate in candidates:
            self.built.append(candidate)
            directory = self.directory / f"build{len(self.built)}"
            directory.mkdir(parents=True, exist_ok=True)
            yield Built(candidate, "ok", directory=directory, digest="d" * 16, trace=TRACE)

    def close(self):
        pass


class StubRunner:
    def __init__(self, secs=0.0, wrong=lambda candidate: False):
        self.secs = secs
        self.wrong = wrong
        self.ran = []

    def run(self, built, best_us):
        self.ran.append(built.candidate)
        time.sleep(self.secs)
        if self.wrong(built.candidate):
            return Measured("wrong", "3 of 8 outputs are wrong on integers")
        return Measured("ok", samples_us=(true_us(built.candidate),) * 3)

    def race(self, built, rounds):
        return [(true_us(each.candidate),) * rounds for each in built]

    def close(self):
        pass


def make_info(trials=20, **changes):
    choices = make_choices()
    values = dict(
        context=CONTEXT,
        source="0" * 12,
        session="5e551011",
        date="2026-01-01T00:00:00+00:00",
        workload="stub",
        spec=SPEC.name,
        space="own",
        candidates=len(choices),
        default=choices[0][0],
        trials=trials,
        budget_secs=600.0,
        seed=0,
        effort="normal",
        command="convt-tvm tune stub",
        machine_info={"cpu": "stub"},
        commit=None,
        host="here",
        pid=1,
    )
    return SessionInfo(**{**values, **changes})


def run_stub(directory, *, secs=0.0, wrong=lambda candidate: False, builder=None, runner=None, **changes):
    builder, runner = builder or StubBuilder(directory / "scratch"), runner or StubRunner(secs, wrong)
    with Store.open(directory / "log") as store:
        search = Search(SPEC, make_choices(), seed=0)
        outcome = run_session(make_info(**changes), store, search, builder, runner)
    return outcome, runner


if __name__ == "__main__":
    run_stub(Path(sys.argv[1]), trials=int(sys.argv[2]), secs=float(sys.argv[3]))
