"""Examinations to one HTML page that needs nothing else, and to a Markdown table; examines nothing."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from convt_tvm.check_plots import plot_lengths, plot_overview, plot_phases, plot_ulps
from convt_tvm.errors import RowsError
from convt_tvm.findings import STAGES, Examination, Finding
from convt_tvm.json_lines import write_lines
from convt_tvm.rounding import QUANTILES

__all__ = ["plot", "to_html", "to_markdown", "write_report"]

_OURS, _TORCH = "ours", "torch"
_DATA = "normal"
_FACTOR = 2
"""How many times torch's largest error ours may be before the tables mark it."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: .8em; }
h3 { margin-top: 1.4em; font-size: 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #888; vertical-align: bottom; }
th, td { padding: 3px 10px 3px 0; } td { border-bottom: 1px solid #eee; } td.number { text-align: right; }
.pass { color: #006b3c; } .fail { color: #b3261e; font-weight: 700; } .limitation { color: #8a5a00; }
.rejected, .unavailable, .none { color: #777; }
.dim { color: #666; } code { font-size: 12px; } img { max-width: 100%; } details { margin: .5em 0; }
.scroll { overflow-x: auto; }
"""


def write_report(directory: Path, examinations: Sequence[Examination]) -> Path:
    """Write ``index.html``, the plots as PNG files and ``rows.jsonl`` to a directory; returns the page's path.

    Raises
    ------
    RowsError
        if there is nothing to report, or matplotlib is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(examinations)
    for name, png in pictures.items():
        (directory / f"{name}.png").write_bytes(png)
    write_lines(directory / "rows.jsonl", examinations)
    page = directory / "index.html"
    page.write_text(to_html(examinations, pictures), encoding="utf-8")
    return page


def _pictures(examinations: Sequence[Examination]) -> dict[str, bytes]:
    """Every plot that there is data for, by name."""
    found = {
        "overview": plot_overview(examinations, _DATA, _OURS, _TORCH),
        "lengths": plot_lengths(examinations, _DATA),
    }
    for one in examinations:
        name = _anchor(one)
        found |= {f"{name}-ulps": plot_ulps(one, _DATA), f"{name}-phases": plot_phases(one, _DATA)}
    return {name: png for name, png in found.items() if png is not None}


def plot(examinations: Sequence[Examination], path: Path) -> None:
    """Draw our largest error over torch's, a bar for each workload, to a PNG file.

    Raises
    ------
    RowsError
        if no workload has both, or matplotlib is missing.
    """
    png = plot_overview(examinations, _DATA, _OURS, _TORCH)
    if png is None:
        raise RowsError("no workload has both our error and torch's.")
    path.write_bytes(png)


def _anchor(one: Examination) -> str:
    return one.workload.replace("/", "-")


def to_html(examinations: Sequence[Examination], pictures: dict[str, bytes]) -> str:
    """The page, pictures inside it; raises RowsError if there are no examinations."""
    if not examinations:
        raise RowsError("there is nothing to report on; name workloads.")
    failures = sum(len(one.failures) for one in examinations)
    first = examinations[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(first.versions.items()) if version)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>convt-tvm numerics</title>",
        f"<style>{_STYLE}</style>",
        "<h1>How far from torch, how far from the truth, and why</h1>",
        f"<p class='{'fail' if failures else 'pass'}'>{len(examinations)} workloads, {failures} failures of ours.</p>",
        f"<p class='dim'>{escape(str(first.machine.get('cpu')))}, {escape(str(first.machine.get('os')))}; "
        f"{escape(versions)}; commit {escape(first.commit or 'unknown')}; {first.date}; seed {first.seed}; "
        f"{first.runs} runs with {' and '.join(map(str, first.threads))} threads.</p>",
        _GUIDE,
        *_table(["workload", *STAGES, *_ERROR_HEADER], [_summary_cells(one) for one in examinations]),
        _picture(pictures, "overview", "Our largest error over torch's, by workload"),
        _picture(pictures, "lengths", "Largest error over bound against the number of products summed"),
    ]
    for one in examinations:
        parts += _section(one, pictures)
    return "\n".join(parts) + "\n"


_GUIDE = """
<details><summary>How to read this</summary><p><b>exactness</b>: integers on which nothing rounds, compared bit for bit
with int64: what fails here reads or writes the wrong element. <b>rounding</b>: real numbers, compared with float64; an
output may be off by &gamma;<sub>k</sub>&nbsp;(|x|&nbsp;*&nbsp;|w|), the bound of a sum of its own k products (Higham,
Accuracy and Stability of Numerical Algorithms, chapter 3), plus one rounding to its own type: <i>error/bound</i> above
1 is wrong code or too narrow a sum, whatever the data. <b>special</b>: NaN, infinities, signed zeros and overflow go to
the outputs whose sums have them and to no others; <span class='limitation'>limitation</span> marks what the README says
is not supported. <b>determinism</b>: the same bits on every run, for any number of threads, in a batch as alone, loaded
as freshly built.</p></details>
"""

_ERROR_HEADER = ("max error", "torch's", "ours/torch's", "error/bound")


def _errors(one: Examination) -> tuple[float | None, float | None, float | None]:
    """Our largest error and torch's on normally distributed data, and our largest ratio to the bound on any."""
    ours, torch = (one.find("rounding", _DATA, name) for name in (_OURS, _TORCH))
    ratios = [each.rounding.max_ratio for each in one.findings if each.implementation == _OURS and each.rounding]
    return (
        ours.rounding.max_error if ours and ours.rounding else None,
        torch.rounding.max_error if torch and torch.rounding else None,
        max(ratios, default=None),
    )


def _factor(ours: float | None, torch: float | None) -> float | None:
    if ours is None or torch is None:
        return None
    return ours / torch if torch else (1.0 if ours == 0 else float("inf"))


def _number(value: float | None, form: str = ".2e") -> str:
    return "-" if value is None else format(value, form)


def _cell(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind!r}' if kind else ''}>{text}</td>"


def _status(status: str | None) -> str:
    return _cell(status or "-", status or "none")


def _summary_cells(one: Examination) -> list[str]:
    ours, torch, ratio = _errors(one)
    factor = _factor(ours, torch)
    far = factor is not None and factor > _FACTOR
    return [
        _cell(f"<a href='#{escape(_anchor(one))}'>{escape(one.workload)}</a>"),
        *(_status(one.status(stage, _OURS)) for stage in STAGES),
        _cell(_number(ours), "number"),
        _cell(_number(torch), "number"),
        _cell(_number(factor, ".2f"), "number limitation" if far else "number"),
        _cell(_number(ratio, ".3g"), "number"),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<div class='scroll'><table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"
    for row in rows:
        yield f"<tr>{''.join(row)}</tr>"
    yield "</table></div>"


def _picture(pictures: dict[str, bytes], name: str, description: str) -> str:
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    return f"<p><img alt='{escape(description)}' src='data:image/png;base64,{data}'></p>"


def _section(one: Examination, pictures: dict[str, bytes]) -> Iterator[str]:
    """Everything about one workload."""
    name = _anchor(one)
    yield f"<h2 id='{escape(name)}'>{escape(one.workload)}</h2><p><code>{escape(one.spec)}</code></p>"
    verdicts = [
        [_cell(escape(each)), *(_status(one.status(stage, each)) for stage in STAGES)] for each in one.implementations
    ]
    yield from _table(["implementation", *STAGES], verdicts)
    yield "<h3>Distance from float64</h3>"
    rounding = [each for each in one.findings if each.stage == "rounding" and each.rounding]
    yield from _table(
        [
            "data",
            "implementation",
            "max error",
            "relative norm",
            "max ulps",
            "max error/bound",
            *(f"{q:.1%}" for q in QUANTILES),
        ],
        [_rounding_cells(each) for each in rounding],
    )
    yield _picture(pictures, f"{name}-ulps", "Histograms of errors in ulps")
    yield _picture(pictures, f"{name}-phases", "Largest error over bound in every phase")
    worst = max(
        (each for each in rounding if each.implementation == _OURS and each.worst),
        key=lambda each: each.worst.ratio if each.worst else 0.0,
        default=None,
    )
    if worst is not None:
        yield f"<p><b>Our worst element</b>, {escape(worst.data)} data: {escape(str(worst.worst))}.</p>"
    others = [
        each
        for each in one.findings
        if each.status != "pass" and (each.stage != "rounding" or each.rounding is None or each.status == "fail")
    ]
    if others:
        yield f"<details{' open' if one.failures else ''}><summary>{len(others)} findings other than pass</summary>"
        yield from _table(
            ["stage", "data", "implementation", "status", "reason"],
            [
                [
                    _cell(escape(each.stage)),
                    _cell(escape(each.data)),
                    _cell(escape(each.implementation)),
                    _status(each.status),
                    _cell(escape(each.reason)),
                ]
                for each in others
            ],
        )
        yield "</details>"
    repeated = [each for each in one.findings if each.stage == "determinism" and each.implementation == _OURS]
    if repeated:
        facts = ", ".join(f"{each.data} <span class='{each.status}'>{each.status}</span>" for each in repeated)
        yield f"<p><b>Same bits</b>: {facts}.</p>"
    yield from _special(one)


def _special(one: Examination) -> Iterator[str]:
    """Where implementations disagree on special values; torch's back ends among themselves too."""
    data = list(dict.fromkeys(each.data for each in one.findings if each.stage == "special"))
    if not data:
        return
    yield "<h3>Special values</h3>"
    rows = []
    for case in data:
        statuses = [(each, one.find("special", case, each)) for each in one.implementations]
        rows.append([_cell(escape(case)), *(_status(found.status if found else None) for _, found in statuses)])
    yield from _table(["case", *one.implementations], rows)


def _rounding_cells(finding: Finding) -> list[str]:
    measured = finding.rounding
    assert measured is not None
    numbers = [
        _number(measured.max_error),
        _number(measured.relative_norm),
        _number(measured.max_ulps, ".3g"),
        _number(measured.max_ratio, ".3g"),
        *(_number(value, ".2g") for value in measured.quantiles),
    ]
    kinds = ["number", "number", "number", "number fail" if finding.status == "fail" else "number"]
    kinds += ["number"] * len(QUANTILES)
    return [
        _cell(escape(finding.data)),
        _cell(escape(finding.implementation)),
        *(_cell(number, kind) for number, kind in zip(numbers, kinds, strict=True)),
    ]


def to_markdown(examinations: Sequence[Examination]) -> str:
    """A table with a line for each workload, and what it was measured with; losses to torch are marked.

    Raises
    ------
    RowsError
        if there are no examinations.
    """
    if not examinations:
        raise RowsError("there is nothing to report on; name workloads.")
    header = ["workload", "stages", "same bits", "max error", "torch's", "ours / torch's", "error/bound"]
    lines = [f"| {' | '.join(header)} |", f"|---|---|---|{'---:|' * (len(header) - 3)}"]
    factors = []
    for one in examinations:
        ours, torch, ratio = _errors(one)
        factor = _factor(ours, torch)
        stages = [stage for stage in STAGES[:3] if one.status(stage, _OURS) == "fail"]
        same = [each for each in one.findings if each.stage == "determinism" and each.implementation == _OURS]
        differing = [each.data for each in same if each.status != "pass"]
        if factor is not None:
            factors.append(factor)
        cells = [
            one.workload,
            f"**{', '.join(stages)} fail**" if stages else "pass",
            f"**not: {', '.join(differing)}**" if differing else "yes" if same else "-",
            _number(ours),
            _number(torch),
            f"**{factor:.2f}**" if factor is not None and factor > _FACTOR else _number(factor, ".2f"),
            _number(ratio, ".3g"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = examinations[0]
    repeated = f"{first.runs} runs with {' and '.join(map(str, first.threads))} threads"
    text = (
        f"Largest distance from float64 on normally distributed data, and our largest error over bound on all of them. "
        f"*Same bits*: {repeated}, every item of a batch as alone, loaded as freshly built."
    )
    if factors:
        beyond = sum(factor > _FACTOR for factor in factors)
        text += f" More than {_FACTOR} times torch's error: {beyond} of {len(factors)}."
    machine = (
        f"{first.machine.get('cpu')}, torch {first.versions.get('torch')}; commit {first.commit}; {first.date[:10]}."
    )
    return "\n".join(lines) + f"\n\n{text}\n\n{machine}\n"
