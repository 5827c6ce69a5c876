"""What stored sessions did: search curves, how good the guesses were, what failed, and the best schedule.

Reads logs and measures nothing. A *search* is everything one log holds for one context and one space: the same target,
machine and number of threads, and our schedules or TVM's own, in however many runs.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convt_tvm.errors import TuningLogError
from convt_tvm.pictures import COLOURS, new_figure, tidy
from convt_tvm.records import EARLY, OWN, Candidate, Context, Result, SessionInfo, Trial, failures_text
from convt_tvm.search import rank_correlation
from convt_tvm.store import R, Read, read_records

__all__ = ["SearchLog", "draw", "plain_trace", "read_searches", "readable_trace", "to_html"]


@dataclass(frozen=True, slots=True)
class SearchLog:
    """A search as its log tells it.

    Attributes
    ----------
    space
        `convt_tvm.records.OWN` or ``GENERIC``.
    infos
        Its runs, the last of them last.
    trials
        In the order in which they were made.
    result
        Of the last run that ended; None if none did.
    problems
        Lines of the log that could not be read.
    """

    context: Context
    space: str
    infos: tuple[SessionInfo, ...]
    trials: tuple[Trial, ...]
    result: Result | None
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """Workload, machine and threads."""
        threads = f"{self.context.threads} thread{'s' if self.context.threads > 1 else ''}"
        workload = self.infos[-1].workload if self.infos else "?"
        space = "" if self.space == OWN else ", TVM's own space"
        return f"{workload}, {threads}, machine {self.context.machine}{space}"

    @property
    def curve(self) -> tuple[float | None, ...]:
        """The best microseconds after each trial; None before anything was timed."""
        best, found = None, []
        for trial in self.trials:
            if trial.best_us is not None:
                best = trial.best_us if best is None else min(best, trial.best_us)
            found.append(best)
        return tuple(found)

    @property
    def best(self) -> Trial | None:
        """The fastest trial."""
        timed = [trial for trial in self.trials if trial.best_us is not None]
        return min(timed, key=lambda trial: trial.best_us or 0.0, default=None)

    @property
    def failures(self) -> dict[str, int]:
        """How many trials failed, by status."""
        return dict(Counter(trial.status for trial in self.trials if trial.status != "ok"))

    @property
    def model_correlation(self) -> float | None:
        """Rank correlation of what the model predicted, before each trial, with what was measured."""
        pairs = [(t.predicted_us, t.best_us) for t in self.trials if t.predicted_us and t.best_us]
        return rank_correlation([first for first, _ in pairs], [second for _, second in pairs])

    @property
    def rule_correlation(self) -> float | None:
        """Rank correlation of the cost rule's cycles with what was measured."""
        pairs = [(t.cycles, t.best_us) for t in self.trials if t.cycles and t.best_us]
        return rank_correlation([first for first, _ in pairs], [second for _, second in pairs])

    def trials_to(self, share: float) -> int | None:
        """After how many trials the best was within `share` of the fastest one of all."""
        best = self.best
        if best is None or best.best_us is None:
            return None
        goal = best.best_us / share
        return next(count for count, us in enumerate(self.curve, 1) if us is not None and us <= goal)

    @property
    def early_share(self) -> tuple[float, bool] | None:
        """What share of the speed of the fastest of all the first `EARLY` trials reached, and whether in one race.

        By the medians of the finalists if one of the first trials is among them, else by the fastest samples. None if
        there were no more trials, or nothing was timed.
        """
        first = self.trials[:EARLY]
        early_us = min((trial.best_us for trial in first if trial.best_us is not None), default=None)
        if len(self.trials) <= EARLY or early_us is None or self.best is None or self.best.best_us is None:
            return None
        known = {trial.candidate.key for trial in self.trials}
        finalists = [each for each in self.result.finalists if each.candidate.key in known] if self.result else []
        keys = {trial.candidate.key for trial in first}
        raced = [finalist.median_us for finalist in finalists if finalist.candidate.key in keys]
        if raced:
            return min(finalist.median_us for finalist in finalists) / min(raced), True
        return self.best.best_us / early_us, False

    @property
    def early_text(self) -> str:
        """The same in words; empty where there is nothing to say."""
        if self.early_share is None:
            return ""
        share, raced = self.early_share
        how = "measured again by turns" if raced else "by their fastest samples"
        return f"best of the first {EARLY} trials: {share:.1%} of the best of all {len(self.trials)}, {how}"

    def to_json(self) -> dict[str, Any]:
        """What the report says, as JSON values."""
        best = self.best
        return {
            "name": self.name,
            "spec": self.infos[-1].spec if self.infos else None,
            "space": self.space,
            "target": self.context.target,
            "machine": self.context.machine,
            "threads": self.context.threads,
            "runs": len(self.infos),
            "trials": len(self.trials),
            "failures": self.failures,
            "best_us": None if best is None else best.best_us,
            "best": None if best is None else best.candidate.to_json(),
            "trials_to_95_percent": self.trials_to(0.95),
            "early_share": None if self.early_share is None else self.early_share[0],
            "early_share_is_raced": None if self.early_share is None else self.early_share[1],
            "model_rank_correlation": self.model_correlation,
            "rule_rank_correlation": self.rule_correlation,
            "curve_us": list(self.curve),
            "result": None if self.result is None else self.result.to_json(),
            "wrong": [
                {"candidate": t.candidate.to_json(), "error": t.error, "trace": list(t.wrong_trace or ())}
                for t in self.trials
                if t.status == "wrong"
            ],
            "problems": list(self.problems),
        }


def read_searches(directory: Path) -> list[SearchLog]:
    """Every search in one workload's log.

    Raises
    ------
    TuningLogError
        If there is no trial in it.
    """
    infos, trials = read_records(directory, SessionInfo), read_records(directory, Trial)
    results = read_records(directory, Result)
    problems = (*infos.problems, *trials.problems, *results.problems)
    found = list(dict.fromkeys((trial.context, trial.candidate.space) for trial in trials.records))
    if not found:
        raise TuningLogError(
            f"{directory} holds no trials; name the log of a workload, <logs>/<target key>/<spec name>."
        )
    searches = []
    for context, space in found:
        mine = [result for result in _by_date(results) if (result.context, result.candidate.space) == (context, space)]
        searches.append(
            SearchLog(
                context,
                space,
                tuple(info for info in _by_date(infos) if (info.context, info.space) == (context, space)),
                tuple(each for each in _by_date(trials) if (each.context, each.candidate.space) == (context, space)),
                mine[-1] if mine else None,
                problems,
            )
        )
    return searches


def _by_date(read: Read[R]) -> list[R]:
    """The oldest first: `merge` appends what may be older."""
    return sorted(read.records, key=lambda record: record.date)


def readable_trace(search: SearchLog, candidate: Candidate) -> str:
    """The steps of a schedule, or why they cannot be shown; imports the compiler for schedules of ours."""
    if candidate.trace is not None:
        return f"# {candidate}\n{plain_trace(candidate.trace)}"
    from convt_tvm.compiler import trace_text
    from convt_tvm.spec import ConvTranspose2dSpec
    from convt_tvm.target import Target

    if not search.infos:
        return f"{candidate}; which workload it is for went with the log's sessions."
    spec = ConvTranspose2dSpec.from_name(search.infos[-1].spec)
    return trace_text(spec, Target.parse(search.context.target), candidate)


def plain_trace(trace: Sequence[Any]) -> str:
    """The instructions of a stored trace, each a line with its decision; imports nothing, and shows what was run."""
    instructions, decisions = trace
    decided = dict(decisions)
    lines = []
    for place, (kind, inputs, attributes, outputs) in enumerate(instructions):
        results = f"{', '.join(outputs)} = " if outputs else ""
        decision = f"  # {decided[place]}" if place in decided else ""
        lines.append(f"{results}{kind}({', '.join(str(each) for each in (*inputs, *attributes))}){decision}")
    return "\n".join(lines)


def draw(searches: Sequence[SearchLog], path: Path | io.BytesIO) -> None:
    """Draw the search curves into one picture, with predicted against measured times of each search beside them.

    The file's suffix names the format; PNG where there is none. Needs matplotlib.
    """
    figure = new_figure(6 + 4.6 * len(searches), 4.4, TuningLogError)
    axes = figure.subplots(1, 1 + len(searches), width_ratios=[1.3, *(1 for _ in searches)])
    _draw_curves(axes[0], searches)
    for place, search in enumerate(searches):
        _draw_guesses(axes[1 + place], search, COLOURS[place % len(COLOURS)])
    figure.savefig(path, dpi=120, **({"format": "png"} if isinstance(path, io.BytesIO) else {}))


def _plain(value: float, position: int) -> str:
    return f"{value:g}"


def _tidy(axes: Any) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            axis.set_major_formatter(_plain)
            # Times of one workload seldom span a decade, and need numbers between the powers of ten.
            axis.set_minor_formatter(_plain if high < 10 * low else lambda value, position: "")
    tidy(axes)


def _draw_curves(axes: Any, searches: Sequence[SearchLog]) -> None:
    for place, search in enumerate(searches):
        colour = COLOURS[place % len(COLOURS)]
        curve = [(count, us) for count, us in enumerate(search.curve, 1) if us is not None]
        if not curve:
            continue
        counts, best = zip(*curve, strict=True)
        axes.step(counts, best, where="post", color=colour, linewidth=1.8, label=search.name)
        timed = [(count, t.best_us) for count, t in enumerate(search.trials, 1) if t.best_us is not None]
        axes.scatter(*zip(*timed, strict=True), s=9, color=colour, alpha=0.35, linewidths=0)
        failed = [count for count, trial in enumerate(search.trials, 1) if trial.status != "ok"]
        axes.plot(failed, [max(best)] * len(failed), "x", color=colour, markersize=6)
    axes.set_yscale("log")
    axes.set_xlabel("trials (crosses: failed ones)")
    axes.set_ylabel("microseconds a call; line: best so far")
    axes.set_title("Search", loc="left", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _draw_guesses(axes: Any, search: SearchLog, colour: str) -> None:
    pairs = [(t.predicted_us, t.best_us) for t in search.trials if t.predicted_us and t.best_us]
    if pairs:
        predicted, measured = zip(*pairs, strict=True)
        low, high = min(*predicted, *measured), max(*predicted, *measured)
        axes.plot([low, high], [low, high], color="#999999", linewidth=1)
        axes.scatter(predicted, measured, s=14, color=colour, alpha=0.6, linewidths=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "no predictions yet", ha="center", transform=axes.transAxes)
    axes.set_xlabel("predicted, microseconds")
    axes.set_ylabel("measured")
    axes.set_title(
        f"{search.name}\nrank correlation {_correlation(search.model_correlation)}, of the rule "
        f"{_correlation(search.rule_correlation)}",
        loc="left",
        fontsize=9,
    )
    _tidy(axes)


def _correlation(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def to_html(searches: Sequence[SearchLog], traces: Sequence[str]) -> str:
    """One page with everything, pictures included.

    Parameters
    ----------
    traces
        The best schedule of each search in readable form.
    """
    picture = io.BytesIO()
    draw(searches, picture)
    encoded = base64.b64encode(picture.getvalue()).decode()
    title = "; ".join(search.name for search in searches)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}"
        "th{border-bottom:1px solid #999}img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow:auto}"
        ".bad{color:#b00020}</style></head><body>",
        f"<h1>Tuning sessions</h1>{_comparison(searches)}",
        f"<p><img alt='search curves and predictions' src='data:image/png;base64,{encoded}'></p>",
    ]
    for search, trace in zip(searches, traces, strict=True):
        parts.append(_details(search, trace))
    return "\n".join([*parts, "</body></html>"])


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _comparison(searches: Sequence[SearchLog]) -> str:
    rows = []
    for search in searches:
        result, best = search.result, search.best
        rows.append(
            [
                search.name,
                str(len(search.trials)),
                str(sum(search.failures.values())),
                "-" if best is None else f"{best.best_us:.4g}",
                "-" if result is None else f"{result.median_us:.4g}",
                "-" if result is None else f"{result.default_us / result.median_us:.2f}",
                "-" if result is None else f"{result.noise_floor - 1:.1%}",
                str(search.trials_to(0.95) or "-"),
                _correlation(search.model_correlation),
                _correlation(search.rule_correlation),
            ]
        )
    header = [
        "search", "trials", "failed", "best sample, us", "result, us", "default / result", "noise", "trials to 95 %",
        "rank correlation", "of the rule",
    ]  # fmt: skip
    return _rows(header, rows)


def _verdict(result: Result) -> str:
    if result.candidate.space != OWN:
        return f"{result.default_us / result.median_us:.2f} times as fast as what build took"
    return "beats the default by more than the noise" if result.tuned else "the default stays"


def _details(search: SearchLog, trace: str) -> str:
    parts = [f"<h2>{html.escape(search.name)}</h2>"]
    if search.infos:
        info = search.infos[-1]
        versions = info.machine_info.get("versions") or {}
        parts.append(
            f"<p>{html.escape(str(info.machine_info.get('cpu')))}; target {html.escape(search.context.target)}; "
            f"{html.escape(', '.join(f'{name} {version}' for name, version in versions.items() if version))}; "
            f"<code>{html.escape(info.command)}</code></p>"
        )
    if search.result is not None:
        parts.append(f"<p>Result: {html.escape(str(search.result.candidate))}: {_verdict(search.result)}.</p>")
        parts.append(
            _rows(
                ["measured again, by turns", "median, us"],
                [[str(each.candidate), f"{each.median_us:.4g}"] for each in search.result.finalists],
            )
        )
    if search.early_text:
        parts.append(f"<p>{html.escape(search.early_text)}.</p>")
    failed = [trial for trial in search.trials if trial.status != "ok"]
    if failed:
        parts.append(f"<h3 class='bad'>Failed: {html.escape(failures_text(search.failures))}</h3>")
        parts.append(
            _rows(
                ["cause", "candidate", "what happened"],
                [[trial.status.replace("_", " "), str(trial.candidate), trial.error] for trial in failed],
            )
        )
    for trial in failed:
        if trial.wrong_trace is not None:
            steps = html.escape(plain_trace(trial.wrong_trace))
            parts.append(f"<details><summary>Steps of the wrong {html.escape(str(trial.candidate))}</summary>")
            parts.append(f"<pre>{steps}</pre></details>")
    parts.append(f"<h3>Best schedule</h3><pre>{html.escape(trace)}</pre>")
    for problem in search.problems:
        parts.append(f"<p class='bad'>{html.escape(problem)}</p>")
    return "\n".join(parts)
