"""What the numerics lab finds: one row for each stage, data set and implementation, stored as a line of JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from convt_tvm.errormap import Tap, Worst
from convt_tvm.errors import RowsError
from convt_tvm.rounding import LengthError, Rounding

__all__ = ["STAGES", "Finding", "Stage", "Status", "append_findings", "read_findings"]

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
        """The fields as JSON values; infinities and NaN, which JSON lacks, become the strings Python writes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["rounding"] = self.rounding and self.rounding.to_json()
        values["worst"] = self.worst and self.worst.to_json()
        plain: dict[str, Any] = _plain(values)
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The finding that `to_json` wrote; raises RowsError for missing or unknown fields."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            found = set(values) if isinstance(values, Mapping) else set()
            raise RowsError(
                f"a finding lacks the fields {sorted(known - found)} and has the unknown ones {sorted(found - known)}; "
                "write findings with `convt-tvm check --report` or `--conformance -o`."
            )
        given = _unplain(dict(values))
        if given["rounding"] is not None:
            lengths = tuple(LengthError(**each) for each in given["rounding"].pop("lengths"))
            given["rounding"] = Rounding(**given["rounding"], lengths=lengths)
        if given["worst"] is not None:
            given["worst"] = Worst(**{**given["worst"], "taps": tuple(Tap(**tap) for tap in given["worst"]["taps"])})
        return cls(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unplain(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_unplain(item) for item in value)
    return float(value) if value in ("inf", "-inf", "nan") else value


def append_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Append findings to a file, a line each, making it if it is not there."""
    text = "".join(json.dumps(finding.to_json(), allow_nan=False) + "\n" for finding in findings)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_findings(path: Path) -> list[Finding]:
    """The findings in a file; raises RowsError naming the line that is none, OSError if there is no such file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Finding.from_json(json.loads(line)))
        except (json.JSONDecodeError, RowsError, TypeError) as error:
            raise RowsError(f"{path}, line {number}: {error}") from error
    return found
