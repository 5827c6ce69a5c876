import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from convt_tvm.check_report import to_html, to_markdown, write_report
from convt_tvm.errors import RowsError
from convt_tvm.examine import examine_workload
from convt_tvm.findings import Examination, read_examinations
from convt_tvm.implementations import Implementation
from convt_tvm.json_lines import write_lines
from convt_tvm.reference import reference
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

SPEC = ConvTranspose2dSpec(n=1, ci=4, ih=4, iw=5, co=3, kernel_size=3, stride=2, padding=1)
PNG = b"\x89PNG\r\n\x1a\n"


def right(spec):
    return lambda *inputs: reference(spec, *inputs).to(inputs[0].dtype)


def coarse(spec):
    def run(*inputs):
        return right(spec)(*(None if each is None else each.bfloat16().float() for each in inputs))

    return run


def examined(ours=right, theirs=right):
    compared = [Implementation("ours", ours), Implementation("torch", theirs)]
    return examine_workload(
        Workload("suite/1", "nowhere", SPEC),
        Target.parse("llvm"),
        compared,
        seed=0,
        threads=(torch.get_num_threads(),),
        runs=2,
        commit="c0ffee",
    )


@pytest.fixture(scope="module")
def good():
    return examined()


@pytest.fixture(scope="module")
def bad():
    return examined(ours=coarse)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[name] for name in ("href", "src") if name in values and tag != "img"]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_its_pictures_and_needs_no_network(good, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(tmp_path / "report", [good])
    parsed = Page(page.read_text())
    assert len(parsed.images) == 4
    for image in parsed.images:
        assert image.startswith("data:image/png;base64,")
        assert base64.b64decode(image.partition(",")[2]).startswith(PNG)
    assert all(link.startswith("#") for link in parsed.links)
    assert "http" not in page.read_text()
    assert "1 workloads, 0 failures of ours." in parsed.text
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "index.html", "rows.jsonl", "overview.png", "lengths.png", "suite-1-ulps.png", "suite-1-phases.png",
    }  # fmt: skip
    assert read_examinations(tmp_path / "report" / "rows.jsonl") == [rounded(good)]


def rounded(one):
    """What five digits leave of it."""
    return Examination.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))


def test_a_failure_is_on_the_page_with_its_place(bad):
    text = Page(to_html([bad], {})).text
    assert "failures of ours" in text and " 0 failures" not in text
    assert "outputs are beyond their error bound; at (0, " in text
    assert bad.status("rounding", "ours") == "fail"
    assert bad.status("rounding", "torch") == "pass"
    assert bad.status("exactness", "ours") == "pass"


def test_markdown_has_a_line_a_workload_and_marks_losses(good, bad):
    (line,) = [line for line in to_markdown([good]).splitlines() if line.startswith("| suite/1")]
    assert re.fullmatch(r"\| suite/1 \| pass \| yes \| \S+ \| \S+ \| 1.00 \| 0\.\d+ \|", line)
    assert "More than 2 times torch's error: 0 of 1." in to_markdown([good])
    (line,) = [line for line in to_markdown([bad]).splitlines() if line.startswith("| suite/1")]
    assert "**rounding fail**" in line
    assert re.search(r"\| \*\*\d+\.\d\d\*\* \|", line)
    assert "More than 2 times torch's error: 1 of 1." in to_markdown([bad])
    assert "commit c0ffee" in to_markdown([good])


def test_infinities_and_nan_survive_being_stored(good, tmp_path):
    first, *others = (finding for finding in good.findings if finding.worst)
    odd = replace(first, worst=replace(first.worst, value=float("inf"), ratio=float("-inf")))
    write_lines(tmp_path / "rows.jsonl", [replace(good, findings=(odd, *others))])
    found = read_examinations(tmp_path / "rows.jsonl")[0].findings[0].worst
    assert (found.value, found.ratio) == (float("inf"), float("-inf"))


def test_what_is_no_row_is_named_by_its_line(good, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(path, [good])
    path.write_text(path.read_text() + '{"workload": "x"}\n')
    with pytest.raises(RowsError, match=r"rows.jsonl, line 2: an examination lacks the fields \['commit'"):
        read_examinations(path)


def test_nothing_is_no_report():
    with pytest.raises(RowsError, match="name workloads"):
        to_html([], {})
    with pytest.raises(RowsError, match="name workloads"):
        to_markdown([])
