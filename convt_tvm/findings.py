"""What the numerics lab finds about each stage, data set and implementation, stored as a line of JSON a workload."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from convt_tvm.errormap import Tap, Worst
from convt_tvm.json_lines import read_lines, require_fields
from convt_tvm.rounding import LengthError, Rounding

__all__ = [
    "STAGES",
    "Examination",
    "Finding",
    "Stage",
    "Status",
    "read_examinations",
]

_REMEDY = "`convt-tvm check --report` writes them"

Stage: TypeAlias = Literal["exactness", "rounding", "special", "determinism"]
Status: TypeAlias = Literal["pass", "fail", "limitation", "rejected", "unavailable"]

STAGES: tuple[Stage, ...] = ("exactness", "rounding", "special", "determinism")
"""In the order in which they are worth reading: what fails in one makes the later ones meaningless."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one stage found about one implementation of one spec on one data set.

    Attributes
    ----------
    spec
        Canonical name.
    implementation
        A name of `convt_tvm.implementations`.
    stage, data
        Which check, on which data: a distribution, a special value, a way to repeat.
    status
        ``pass`` or ``fail``; ``limitation`` where it does what the README says it does not support; ``rejected`` if the
        implementation refuses the spec, ``unavailable`` if it is not installed.
    reason
        Why the status is not ``pass``; may add to a pass.
    seed
        Of the data.
    rounding, worst, phases
        The rounding stage's figures, the element farthest off, and the largest error over bound of each phase.
    """

    spec: str
    implementation: str
    stage: Stage
    data: str
    status: Status
    reason: str = ""
    seed: int = 0
    rounding: Rounding | None = None
    worst: Worst | None = None
    phases: tuple[tuple[float, ...], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; infinities and NaN, which JSON lacks, become the strings Python writes.

        Floats keep five digits, so that rows stay small.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["rounding"] = self.rounding and self.rounding.to_json()
        values["worst"] = self.worst and self.worst.to_json()
        plain: dict[str, Any] = _plain(values)
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The finding that `to_json` wrote; raises RowsError for missing or unknown fields."""
        require_fields(cls, values, "a finding", _REMEDY)
        given = _unplain(dict(values))
        if given["rounding"] is not None:
            lengths = tuple(LengthError(*each) for each in given["rounding"].pop("lengths"))
            given["rounding"] = Rounding(**given["rounding"], lengths=lengths)
        if given["worst"] is not None:
            given["worst"] = Worst(**{**given["worst"], "taps": tuple(Tap(**tap) for tap in given["worst"]["taps"])})
        return cls(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unplain(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_unplain(item) for item in value)
    return float(value) if value in ("inf", "-inf", "nan") else value


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything found about one workload in one go, a line of a file.

    Attributes
    ----------
    workload, spec
        The workload's name and its spec's canonical name.
    target, seed, threads, runs
        What our kernel was compiled for, of the data, and how determinism was tried.
    date, commit, machine, versions
        When (UTC), at which commit, where and with what it was done.
    findings
        In the order in which they were made.
    """

    workload: str
    spec: str
    target: str
    seed: int
    threads: tuple[int, ...]
    runs: int
    date: str
    commit: str | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    findings: tuple[Finding, ...]

    @property
    def implementations(self) -> list[str]:
        """Names, ours first."""
        return list(dict.fromkeys(finding.implementation for finding in self.findings))

    def find(self, stage: Stage, data: str, implementation: str) -> Finding | None:
        """The finding of that stage on that data, if there is one."""
        key = stage, data, implementation
        return next((each for each in self.findings if (each.stage, each.data, each.implementation) == key), None)

    def status(self, stage: Stage, implementation: str) -> Status | None:
        """The gravest status of a stage; None if it was not gone through."""
        found = [each.status for each in self.findings if (each.stage, each.implementation) == (stage, implementation)]
        return min(found, key=_GRAVITY.index, default=None)

    @property
    def failures(self) -> list[Finding]:
        """What failed of ours."""
        return [each for each in self.findings if each.status == "fail" and each.implementation.startswith("ours")]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"threads": list(self.threads), "findings": [each.to_json() for each in self.findings]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The examination that `to_json` wrote; raises RowsError for missing or unknown fields."""
        require_fields(cls, values, "an examination", _REMEDY)
        findings = tuple(map(Finding.from_json, values["findings"]))
        return cls(**{**values, "threads": tuple(values["threads"]), "findings": findings})


_GRAVITY: tuple[Status, ...] = ("fail", "limitation", "pass", "rejected", "unavailable")


def read_examinations(path: Path) -> list[Examination]:
    """The examinations in a file; raises RowsError naming the line that is none, OSError if there is no such file."""
    return read_lines(path, Examination.from_json)
