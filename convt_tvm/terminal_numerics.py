"""How the numerics lab's results look in a terminal."""

from collections.abc import Sequence
from functools import partial

from rich.markup import escape

from convt_tvm.conformance import Tally
from convt_tvm.findings import STAGES, Examination, Stage
from convt_tvm.implementations import OURS
from convt_tvm.terminal import Column, print_table, stdout_console

__all__ = ["print_conformance", "print_examinations"]

_OUTCOMES = ("passed", "failed", "rejected")


def print_conformance(tallies: Sequence[Tally]) -> None:
    """Print conformance as a matrix of case families and implementations, and what was out of scope."""
    names = list(dict.fromkeys(tally.implementation for tally in tallies))
    families = list(dict.fromkeys(tally.block.family for tally in tallies))

    def cell(family: str, name: str) -> str:
        own = [tally for tally in tallies if (tally.block.family, tally.implementation) == (family, name)]
        passed, failed, rejected = (sum(getattr(tally, what) for tally in own) for what in _OUTCOMES)
        parts = [
            f"[green]{passed}[/]",
            f"[bold red]{failed} fail[/]" * bool(failed),
            f"[dim]{rejected} rej.[/]" * bool(rejected),
        ]
        return " ".join(filter(None, parts)) if own else "-"

    console = stdout_console()
    columns = [Column("implementation", lambda name: name, "left")]
    columns += [Column(family, partial(cell, family)) for family in families]
    print_table(columns, names, console)
    for reason in dict.fromkeys(reason for tally in tallies for reason in tally.out_of_scope):
        console.print(f"[dim]out of scope: {escape(reason)}[/]", soft_wrap=True)
    worst = max((tally.max_ratio for tally in tallies if tally.implementation.startswith(OURS)), default=0.0)
    console.print(f"largest error/bound of ours: {worst:.3g}", soft_wrap=True)


def print_examinations(examinations: Sequence[Examination]) -> None:
    """Print the gravest status of every stage for our kernels, and our largest error over bound."""
    styles = {"pass": "green", "fail": "bold red", "limitation": "yellow"}

    def status(stage: Stage, one: Examination) -> str:
        found = one.status(stage, OURS)
        return "-" if found is None else f"[{styles.get(found, 'dim')}]{found}[/]"

    def ratio(one: Examination) -> str:
        found = [each.rounding.max_ratio for each in one.findings if each.implementation == OURS and each.rounding]
        return f"{max(found):.3g}" if found else "-"

    columns = [Column("workload", lambda one: one.workload, "left")]
    columns += [Column(stage, partial(status, stage), "left") for stage in STAGES]
    print_table([*columns, Column("error/\nbound", ratio)], examinations, stdout_console())
