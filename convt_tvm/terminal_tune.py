"""How tuning sessions look in a terminal: a line that is redrawn while they run, and a table at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import indent
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from convt_tvm.records import OWN, failures_text
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.terminal import Column, milliseconds, print_table, stderr_is_terminal, stdout_console

if TYPE_CHECKING:
    from convt_tvm.session import Outcome
    from convt_tvm.session import Progress as SessionProgress
    from convt_tvm.session_report import SearchLog

__all__ = ["describe_progress", "print_outcomes", "print_searches", "session_progress"]


def describe_progress(progress: "SessionProgress") -> str:
    """What a session has found so far, in one line."""
    info, parts = progress.info, []
    if progress.best_us is not None:
        gflops = 2 * ConvTranspose2dSpec.from_name(info.spec).multiply_adds / progress.best_us / 1e3
        share = f" ({gflops / info.peak_gflops:.0%} of peak)" if info.peak_gflops else ""
        parts.append(f"{gflops:.4g} GFLOP/s{share}")
        if progress.default_us is not None:
            parts.append(f"{progress.default_us / progress.best_us:.2f}x default")
        if info.torch_us is not None:
            parts.append(f"{info.torch_us / progress.best_us:.2f}x torch")
    if progress.failures:
        parts.append(failures_text(progress.failures))
    if progress.secs_left is not None:
        minutes, secs = divmod(round(progress.secs_left), 60)
        parts.append(f"{minutes}:{secs:02d} left")
    return ", ".join([*parts, progress.step])


@contextmanager
def session_progress(*, quiet: bool) -> "Iterator[Callable[[SessionProgress], None]]":
    """A line for each session on stderr if that is a terminal; call the result with the session's progress."""
    if quiet or not stderr_is_terminal():
        yield lambda progress: None
        return
    columns = (
        TextColumn("{task.fields[session]}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.description}"),
    )
    # No thread of its own that redraws: it would take time from what is being measured.
    with Progress(*columns, console=Console(stderr=True, force_terminal=True), auto_refresh=False) as bar:
        tasks = {}

        def observe(progress: "SessionProgress") -> None:
            info = progress.info
            if info.session not in tasks:
                threads = f"{info.context.threads} thread{'s' if info.context.threads > 1 else ''}"
                tasks[info.session] = bar.add_task("", session=f"{info.workload}, {threads}")
            bar.update(
                tasks[info.session],
                total=progress.wanted,
                completed=progress.trials,
                description=describe_progress(progress),
                refresh=True,
            )

        yield observe


def print_outcomes(outcomes: "Sequence[Outcome]") -> None:
    """Print what sessions found: a table, and beneath it what has to be known besides."""
    console = stdout_console()

    def best(outcome: "Outcome") -> str:
        if outcome.result is None:
            return "[bold red]none[/]"
        if not outcome.result.tuned and outcome.info.space == OWN:
            return "[dim]the default stays[/]"
        return escape(str(outcome.result.candidate))

    def time(outcome: "Outcome") -> str:
        return milliseconds(None if outcome.result is None else outcome.result.median_us)

    def speedup(outcome: "Outcome") -> str:
        result = outcome.result
        return "-" if result is None else f"{result.default_us / result.median_us:.2f}x"

    def share(outcome: "Outcome") -> str:
        result, info = outcome.result, outcome.info
        if result is None or not info.peak_gflops:
            return "-"
        gflops = 2 * ConvTranspose2dSpec.from_name(info.spec).multiply_adds / result.median_us / 1e3
        return f"{gflops / info.peak_gflops:.0%}"

    columns = [
        Column("workload", lambda outcome: outcome.info.workload, "left"),
        Column("threads", lambda outcome: str(outcome.info.context.threads)),
        Column("trials", lambda outcome: str(outcome.trials)),
        Column("new", lambda outcome: str(outcome.measured), dropped=2, title="new trials"),
        Column("minutes", lambda outcome: f"{outcome.secs / 60:.1f}", dropped=3, title="minutes"),
        Column("ms", time),
        Column("of\npeak", share, dropped=4, title="share of peak"),
        Column("default/\nours", speedup),
        Column(
            "noise",
            lambda outcome: "-" if outcome.result is None else f"{outcome.result.noise_floor - 1:.1%}",
            dropped=5,
            title="noise",
        ),
        Column("ended by", lambda outcome: outcome.stopped, "left", dropped=6, title="what ended it"),
        Column("schedule", best, "left", dropped=1, title="schedule"),
    ]
    print_table(columns, outcomes, console)
    for outcome in outcomes:
        if outcome.failures:
            console.print(f"{escape(outcome.info.workload)}: {failures_text(outcome.failures)}", soft_wrap=True)
        for note in outcome.notes:
            console.print(f"[yellow]note[/]  {escape(outcome.info.workload)}: {escape(note)}", soft_wrap=True)


def print_searches(searches: "Sequence[SearchLog]", traces: Sequence[str]) -> None:
    """Print stored searches side by side, their failures, and the best schedule of each."""
    from convt_tvm.session_report import plain_trace

    console = stdout_console()

    def correlation(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    columns = [
        Column("search", lambda search: search.name, "left"),
        Column("trials", lambda search: str(len(search.trials))),
        Column("failed", lambda search: str(sum(search.failures.values())), dropped=5, title="failed"),
        Column("best\nsample, ms", lambda search: milliseconds(search.best and search.best.best_us)),
        Column("result\nms", lambda search: milliseconds(search.result and search.result.median_us)),
        Column(
            "default/\nresult",
            lambda search: f"{search.result.default_us / search.result.median_us:.2f}x" if search.result else "-",
        ),
        Column("trials\nto 95 %", lambda search: str(search.trials_to(0.95) or "-"), dropped=4, title="trials to 95 %"),
        Column("rank corr.\nmodel", lambda search: correlation(search.model_correlation), dropped=3, title="model's"),
        Column(
            "\nrule", lambda search: correlation(search.rule_correlation), dropped=2, title="rank correlation of rule"
        ),
    ]
    print_table(columns, searches, console)
    for search, trace in zip(searches, traces, strict=True):
        for text in filter(None, (search.early_text, failures_text(search.failures))):
            console.print(f"{escape(search.name)}: {text}", soft_wrap=True)
        for trial in search.trials:
            if trial.status != "ok":
                console.print(
                    f"[bold red]{trial.status.replace('_', ' ')}[/]  {escape(search.name)}: "
                    f"{escape(str(trial.candidate))}: {escape(trial.error)}",
                    soft_wrap=True,
                )
            if trial.wrong_trace is not None:
                console.print(escape(indent(plain_trace(trial.wrong_trace), "    ")), soft_wrap=True)
        for problem in search.problems:
            console.print(f"[yellow]note[/]  {escape(search.name)}: {escape(problem)}", soft_wrap=True)
        console.print(f"\n{escape(search.name)}\n{escape(trace)}", soft_wrap=True)
