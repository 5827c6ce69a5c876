import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import stub_session
from stub_session import SPEC, TRACE, StubBuilder, make_choices, make_info, run_stub, true_us

from convt_tvm.errors import TuningLogError
from convt_tvm.records import GENERIC, OWN, Candidate, Result, Trial
from convt_tvm.search import rank_correlation
from convt_tvm.session_report import draw, plain_trace, read_searches, readable_trace, to_html
from convt_tvm.store import SESSIONS, Store
from convt_tvm.trials import Built

BEST = min((candidate for candidate, _ in make_choices()), key=true_us)
UNBUILDABLE = make_choices()[2][0]


class FailingBuilder(StubBuilder):
    def build(self, candidates):
        for built in super().build(candidates):
            if built.candidate == UNBUILDABLE:
                built = Built(built.candidate, "build_failed", "rows <b> & more")
            yield built


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Two searches, of one thread and of two; in the first the best candidate gives wrong answers, another fails."""
    directory = tmp_path_factory.mktemp("log")
    builder = FailingBuilder(directory / "scratch")
    run_stub(directory, trials=48, builder=builder, wrong=lambda candidate: candidate == BEST)
    run_stub(directory, trials=20, context=replace(stub_session.CONTEXT, threads=2))
    return directory / "log"


@pytest.fixture(scope="module")
def searches(log):
    return read_searches(log)


class Page(HTMLParser):
    """The tables of a page as rows of cells, its text, and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.text, self.addresses, self.tags, self._cell = [], "", [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._cell = False

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def test_a_log_holds_a_search_for_each_context(searches):
    assert [search.context.threads for search in searches] == [1, 2]
    assert [len(search.trials) for search in searches] == [48, 20]
    assert [len(search.infos) for search in searches] == [1, 1]
    assert searches[0].failures == {"wrong": 1, "build_failed": 1}
    assert searches[0].name == "stub, 1 thread, machine aaaaaaaa"
    assert searches[1].name == "stub, 2 threads, machine aaaaaaaa"


def test_tvms_own_space_is_a_search_of_its_own(tmp_path):
    plain = Candidate("generic", {}, ("trace",))
    run_stub(tmp_path, trials=20)
    with Store.open(tmp_path / "log") as store:
        (trial, *_), (result,) = store.read(Trial).records, store.read(Result).records
        store.append(make_info(space=GENERIC))
        store.append(replace(trial, candidate=plain, samples_us=(44.0,)))
        store.append(replace(result, candidate=plain, median_us=44.0, default_us=11.0, tuned=False))
    ours, theirs = read_searches(tmp_path / "log")
    assert [(search.space, len(search.trials), len(search.infos)) for search in (ours, theirs)] == [
        (OWN, 20, 1),
        (GENERIC, 1, 1),
    ]
    assert (ours.result, theirs.result.candidate) == (result, plain)
    assert theirs.name == f"{ours.name}, TVM's own space" and theirs.to_json()["space"] == GENERIC
    pytest.importorskip("matplotlib")
    assert f"{plain}: 0.25 times as fast as what build took" in Page(to_html([ours, theirs], ["", ""])).text


def test_the_newest_result_counts_in_whatever_order_logs_were_merged(tmp_path):
    run_stub(tmp_path, trials=20)
    with Store.open(tmp_path / "log") as store:
        (result,), trials = store.read(Result).records, store.read(Trial).records
        store.append(replace(result, date="1999-01-01T00:00:00+00:00"))
        store.append(replace(trials[-1], candidate=Candidate("older", {}), date="1999-01-01T00:00:00+00:00"))
    (search,) = read_searches(tmp_path / "log")
    assert search.result == result and search.trials[0].candidate.schedule == "older"


def test_the_curve_is_the_best_so_far(searches):
    for search in searches:
        times = [trial.best_us for trial in search.trials]
        for count, best in enumerate(search.curve, 1):
            assert best == min((us for us in times[:count] if us is not None), default=None)
        assert search.curve[-1] == search.best.best_us == search.result.median_us


def test_trials_to_a_share_of_the_best_are_counted(searches):
    search, *_ = searches
    trial = replace(search.trials[0], samples_us=(1.0,))
    slow, failed, near, best = (replace(trial, samples_us=samples) for samples in ((9.0, 8.0), (), (1.05,), (1.0,)))
    made = replace(search, trials=(failed, slow, near, best))
    assert made.curve == (None, 8.0, 1.05, 1.0)
    assert (made.trials_to(0.95), made.trials_to(0.99), made.trials_to(0.1)) == (3, 4, 2)
    assert replace(search, trials=(failed,)).trials_to(0.95) is None


def test_steps_are_readable_without_the_compiler():
    assert plain_trace(TRACE) == "b0 = GetSBlock(acc0)\nv1 = SampleCategorical([0, 16])  # 1"
    assert plain_trace(([["Reorder", ["l1", "l0"], [], []]], [])) == "Reorder(l1, l0)"


def test_what_the_first_64_trials_reached(searches):
    search, *_ = searches
    assert (search.early_share, search.early_text) == (None, "")
    trial, finalist = search.trials[0], search.result.finalists[0]
    many = tuple(
        replace(trial, candidate=Candidate("stub", {"rows": number}), samples_us=(100.0 - number,))
        for number in range(80)
    )
    # By samples: 37 of trial 64 against 21 of the last; the finalists are of other trials.
    made = replace(search, trials=many)
    assert made.early_share == (21 / 37, False)
    assert made.early_text == "best of the first 64 trials: 56.8% of the best of all 80, by their fastest samples"
    raced = tuple(
        replace(finalist, candidate=trial.candidate, samples_us=(us,))
        for trial, us in ((many[63], 40.0), (many[79], 38.0))
    )
    made = replace(made, result=replace(search.result, finalists=raced))
    assert made.early_share == (0.95, True) and made.to_json()["early_share"] == 0.95
    assert made.early_text == "best of the first 64 trials: 95.0% of the best of all 80, measured again by turns"
    assert replace(made, trials=many[:64]).early_share is None


def test_correlations_are_of_what_was_predicted_before_each_trial(searches):
    search, *_ = searches
    guessed = [trial for trial in search.trials if trial.predicted_us and trial.best_us]
    assert len(guessed) == 48 - 16 - sum(trial.status != "ok" for trial in search.trials[16:])
    expected = rank_correlation([t.predicted_us for t in guessed], [t.best_us for t in guessed])
    assert search.model_correlation == expected
    timed = [trial for trial in search.trials if trial.best_us]
    assert search.rule_correlation == rank_correlation([t.cycles for t in timed], [t.best_us for t in timed])


def test_the_values_are_json_and_tell_what_went_wrong(searches):
    values = json.loads(json.dumps(searches[0].to_json(), allow_nan=False))
    assert (values["trials"], values["runs"], values["spec"]) == (48, 1, SPEC.name)
    assert values["failures"] == {"wrong": 1, "build_failed": 1}
    (wrong,) = values["wrong"]
    assert wrong == {"candidate": BEST.to_json(), "error": "3 of 8 outputs are wrong on integers", "trace": list(TRACE)}
    assert values["best_us"] == values["result"]["median_us"] == min(filter(None, values["curve_us"]))


def test_the_page_needs_nothing_else(searches):
    pytest.importorskip("matplotlib")
    text = to_html(searches, ["trace of the first", "trace of the second"])
    page = Page(text)
    assert text.startswith("<!doctype html>") and text.endswith("</body></html>")
    assert len(page.addresses) == 1 and page.addresses[0].startswith("data:image/png;base64,iVBOR")
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_shows_failures_by_cause_and_the_wrong_candidate(searches):
    pytest.importorskip("matplotlib")
    page = Page(to_html(searches, ["a < b", "trace"]))
    assert ["wrong", str(BEST), "3 of 8 outputs are wrong on integers"] in page.rows
    assert ["build failed", str(UNBUILDABLE), "rows <b> & more"] in page.rows
    first, second = ([row for row in page.rows if row[0] == search.name] for search in searches)
    assert [row[1:3] for row in (*first, *second)] == [["48", "2"], ["20", "0"]]
    assert page.text.count("Failed") == page.text.count("Failed: 1 build failed, 1 wrong") == 1
    assert page.text.count(f"Steps of the wrong {BEST}") == page.text.count(plain_trace(TRACE)) == 1
    # The winner is another one, and its steps are there.
    assert f"Result: {searches[0].result.candidate}: beats the default" in page.text
    assert "a < b" in page.text
    assert searches[0].infos[0].command in page.text


def test_pictures_are_written(searches, tmp_path):
    pytest.importorskip("matplotlib")
    draw(searches, tmp_path / "searches.png")
    assert (tmp_path / "searches.png").read_bytes().startswith(b"\x89PNG")
    draw(searches[:1], tmp_path / "searches.svg")
    assert "<svg" in (tmp_path / "searches.svg").read_text()


@pytest.mark.filterwarnings("error")
def test_a_search_in_which_everything_failed_is_shown_too(searches):
    pytest.importorskip("matplotlib")
    failed = tuple(trial for trial in searches[0].trials if trial.status != "ok")
    search = replace(searches[0], trials=failed, result=None)
    assert search.best is None and search.curve == (None, None) and search.model_correlation is None
    page = Page(to_html([search], ["nothing was timed"]))
    assert [search.name, "2", "2", *7 * ["-"]] in page.rows
    assert json.dumps(search.to_json(), allow_nan=False)


def test_a_picture_without_matplotlib_says_what_to_install(searches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TuningLogError, match=r"pip install 'convt-tvm\[plot\]'"):
        draw(searches, tmp_path / "searches.png")


def test_a_candidate_that_is_gone_has_a_line_instead_of_steps(searches):
    gone = Candidate("stub", {"rows": 1})
    assert readable_trace(searches[0], gone) == "stub (rows=1) is no candidate of this version."


def test_a_log_that_lost_its_sessions_is_still_read(log, tmp_path):
    for path in log.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / SESSIONS).write_text('{"torn')
    search, _ = read_searches(tmp_path)
    assert search.name == "?, 1 thread, machine aaaaaaaa" and len(search.trials) == 48
    assert "line 1, was skipped" in search.problems[0]
    assert readable_trace(search, BEST) == f"{BEST}; which workload it is for went with the log's sessions."


def test_a_directory_without_trials_is_refused(tmp_path):
    with pytest.raises(TuningLogError, match=r"holds no trials; name the log of a workload, <logs>/<target key>/"):
        read_searches(tmp_path)
