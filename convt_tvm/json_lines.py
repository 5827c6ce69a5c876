"""Files of records as JSON, one a line: rows of benchmarks, examinations and tallies of the numerics lab."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from convt_tvm.errors import RowsError

__all__ = ["append_lines", "append_values", "read_lines", "require_fields", "write_lines"]

R = TypeVar("R")


class Record(Protocol):
    """What becomes a line."""

    def to_json(self) -> Any:
        """JSON values without NaN or infinity."""


def _text(values: Iterable[Any]) -> str:
    return "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Append records to a file, making it if it is not there."""
    append_values(path, (record.to_json() for record in records))


def append_values(path: Path, values: Iterable[Any]) -> None:
    """Append what `to_json` of records gave to a file, making it if it is not there."""
    text = _text(values)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write records to a file in place of what it held."""
    path.write_text(_text(record.to_json() for record in records), encoding="utf-8")


def read_lines(path: Path, parse: Callable[[Any], R]) -> list[R]:
    """The records in a file; blank lines are passed over.

    Raises
    ------
    RowsError
        naming the line that is no JSON, or that `parse` raises RowsError, TypeError or KeyError for.
    OSError
        if there is no such file.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(parse(json.loads(line)))
        except (json.JSONDecodeError, RowsError, TypeError, KeyError) as error:
            raise RowsError(f"{path}, line {number}: {error}") from error
    return found


def require_fields(record: type[Any], values: object, name: str, remedy: str) -> None:
    """Raise RowsError unless `values` is a mapping with exactly the fields of the dataclass `record`.

    The message calls it `name`, lists what is missing and what is unknown, and ends in `remedy`.
    """
    known = {field.name for field in fields(record)}
    found = set(values) if isinstance(values, Mapping) else set()
    if not isinstance(values, Mapping) or found != known:
        raise RowsError(
            f"{name} lacks the fields {sorted(known - found)} and has the unknown ones {sorted(found - known)}; "
            f"{remedy}."
        )
