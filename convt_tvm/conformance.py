"""Families of cases against implementations: every case goes through exactness and rounding, in blocks, in parallel."""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from convt_tvm.cases import FAMILIES, FUZZ, sampled_cases
from convt_tvm.distributions import DISTRIBUTIONS
from convt_tvm.examine import examine
from convt_tvm.findings import Finding
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.implementations import Implementation, emulated_implementation, implementations, our_implementations
from convt_tvm.json_lines import read_lines, require_fields
from convt_tvm.replay import Reproducer
from convt_tvm.target import Target

__all__ = ["Block", "Tally", "blocks", "conform", "examine_block", "read_tallies", "untried"]

BLOCK = 25


@dataclass(frozen=True, slots=True)
class Block:
    """Cases that one process tries, one after the other: numbers ``first`` to ``last``, both included, of a family."""

    family: str
    seed: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Tally:
    """How one implementation did on a `Block`.

    Attributes
    ----------
    block, implementation
        What was tried, and by what.
    commit, source
        At which commit of this package (None outside a checkout), and from which `source_fingerprint` its kernels come.
    passed, failed, rejected
        Cases, by the worst of their findings; those out of scope are in none of them.
    max_ratio
        Largest error over bound of the cases that passed.
    out_of_scope
        Cases that are no spec, and why.
    failures
        A `Reproducer` for each failed case.
    """

    block: Block
    implementation: str
    commit: str | None
    source: str
    passed: int = 0
    failed: int = 0
    rejected: int = 0
    max_ratio: float = 0.0
    out_of_scope: tuple[str, ...] = ()
    failures: tuple[Reproducer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"failures": [failure.to_json() for failure in self.failures]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The tally that `to_json` wrote; raises RowsError for missing or unknown fields."""
        require_fields(cls, values, "a tally", "write tallies with `convt-tvm check --conformance`")
        return cls(
            **{
                **values,
                "block": Block(**values["block"]),
                "out_of_scope": tuple(values["out_of_scope"]),
                "failures": tuple(Reproducer.from_json(each) for each in values["failures"]),
            }
        )


def blocks(families: Sequence[str], *, seed: int, fuzz: int) -> list[Block]:
    """What there is to try: the families whole, and the first `fuzz` fuzzed cases, a few to a block."""
    found = []
    for family in families:
        # The sampled families have some tens of cases; a block past their end is empty and is not made.
        count = fuzz if family == FUZZ else sum(1 for _ in FAMILIES[family]())
        found += [Block(family, seed, first, min(first + BLOCK, count) - 1) for first in range(0, count, BLOCK)]
    return found


def read_tallies(path: Path) -> list[Tally]:
    """The tallies in a file, none if there is no file; raises RowsError naming the line that is none."""
    return read_lines(path, Tally.from_json) if path.exists() else []


def untried(wanted: Iterable[Block], tallies: Iterable[Tally]) -> list[Block]:
    """The blocks that no tally of kernels from today's sources is about."""
    tried = {tally.block for tally in tallies if tally.source == source_fingerprint()}
    return [block for block in wanted if block not in tried]


def examine_block(block: Block, target: Target, compared: Sequence[Implementation], commit: str | None) -> list[Tally]:
    """Put every case of a block through exactness and rounding; a tally for each implementation.

    Each case sees normally distributed data and one more distribution, by turns.
    """
    others = [name for name in DISTRIBUTIONS if name != "normal"]
    statuses: dict[str, list[str]] = {each.name: [] for each in compared}
    ratios: dict[str, float] = dict.fromkeys(statuses, 0.0)
    failures: dict[str, list[Reproducer]] = {name: [] for name in statuses}
    out_of_scope = []
    for offset, case in enumerate(sampled_cases(block.family, block.seed, range(block.first, block.last + 1))):
        if case.spec is None:
            out_of_scope.append(f"{case.name}: {case.reason}")
            continue
        number = block.first + offset
        distributions = ("normal", others[number % len(others)])
        found: dict[str, list[Finding]] = {name: [] for name in statuses}
        for finding in examine(
            case.spec,
            compared,
            seed=block.seed + number,
            stages=("exactness", "rounding"),
            distributions=distributions,
        ):
            found[finding.implementation].append(finding)
        for implementation in compared:
            name, own = implementation.name, found[implementation.name]
            failed = [finding for finding in own if finding.status == "fail"]
            refused = any(finding.status in ("rejected", "unavailable") for finding in own)
            statuses[name].append("failed" if failed else "rejected" if refused else "passed")
            if failed:
                failures[name].append(Reproducer.of(failed[0], implementation, target, commit))
            else:
                ratios[name] = max([ratios[name], *(each.rounding.max_ratio for each in own if each.rounding)])
            implementation.forget()
    return [
        Tally(
            block=block,
            implementation=name,
            commit=commit,
            source=source_fingerprint(),
            passed=got.count("passed"),
            failed=got.count("failed"),
            rejected=got.count("rejected"),
            max_ratio=ratios[name],
            out_of_scope=tuple(out_of_scope),
            failures=tuple(failures[name]),
        )
        for name, got in statuses.items()
    ]


_compared: list[Implementation] = []


def _begin(target: Target, peers: bool, emulate: bool) -> None:
    """Prepare a worker process: one thread, and the implementations it compares. It ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _compared[:] = _implementations(target, peers, emulate)


def _end_with_parent() -> None:
    """A parent that is killed tells its workers nothing: they would wait for more blocks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _implementations(target: Target, peers: bool, emulate: bool) -> list[Implementation]:
    if emulate:
        return [emulated_implementation(target)]
    return implementations(target, spaces=True) if peers else our_implementations(target)[1:]


def _work(block: Block, target: Target, commit: str | None) -> list[Tally]:
    return examine_block(block, target, _compared, commit)


def conform(
    wanted: Sequence[Block], target: Target, *, peers: bool, emulate: bool = False, jobs: int | None, commit: str | None
) -> Iterator[list[Tally]]:
    """Tallies of the blocks, as these are finished, in whatever order.

    Parameters
    ----------
    peers
        Whether to compare torch and other libraries besides our schedule spaces.
    emulate
        Try our kernels for GPUs on the emulator, and nothing else.
    jobs
        Processes; as many as there are processors for this one if None, and none besides this one if 1.

    Raises
    ------
    ConvTError
        if no data that tell can be drawn for a case.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    if jobs == 1:
        compared = _implementations(target, peers, emulate)
        for block in wanted:
            yield examine_block(block, target, compared, commit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (target, peers, emulate)) as pool:
        futures = [pool.submit(_work, block, target, commit) for block in wanted]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
