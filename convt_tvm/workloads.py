"""Named suites of specs, each naming the model and the layer it comes from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from convt_tvm.errors import SpecError, UnknownWorkloadError
from convt_tvm.spec import CHANNELS_LAST, ConvTranspose2dSpec

__all__ = ["Workload", "adapted", "resolve", "suites"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A spec with the name people call it by and the place it comes from.

    Attributes
    ----------
    name
        Such as ``dcgan/2``; the canonical spec name where the workload belongs to no suite.
    source
        The model and layer, in words.
    spec
        The transposed convolution itself.
    """

    name: str
    source: str
    spec: ConvTranspose2dSpec


@cache
def _read_suites() -> dict[str, tuple[Workload, ...]]:
    def make(name: str, source: str, **values: Any) -> Workload:
        return Workload(name, source, ConvTranspose2dSpec(**values))

    stored = json.loads(files("convt_tvm").joinpath("workloads.json").read_text(encoding="utf-8"))
    return {suite: tuple(make(**row) for row in rows) for suite, rows in stored.items()}


def suites() -> dict[str, tuple[Workload, ...]]:
    """The suites by name, in the order of the file ``workloads.json``.

    Examples
    --------
    >>> list(suites())
    ['seed', 'dcgan', 'vision', 'other', 'overhead']
    >>> suites()["dcgan"][1].spec.output_shape
    (1, 256, 8, 8)
    """
    return dict(_read_suites())


def resolve(arguments: Sequence[str]) -> list[Workload]:
    """The workloads that the arguments name, in their order, each once.

    Parameters
    ----------
    arguments
        Each is ``all``, a suite (``dcgan``), a name (``dcgan/2``), or a canonical spec name. The spec name of a
        workload in a suite gives that workload.

    Raises
    ------
    UnknownWorkloadError
        (a ValueError) for an argument that is none of these; the message lists the nearest ones that are.

    Examples
    --------
    >>> [workload.name for workload in resolve(["dcgan/2", "seed", "seed/rect"])]
    ['dcgan/2', 'seed/square', 'seed/rect', 'seed/output_size']
    """
    every = [workload for suite in suites().values() for workload in suite]
    names = {"all": every, **{name: list(suite) for name, suite in suites().items()}}
    names |= {workload.name: [workload] for workload in every}
    by_spec = {workload.spec: workload for workload in every}
    found: dict[ConvTranspose2dSpec, Workload] = {}
    for argument in arguments:
        if argument in names:
            found |= {workload.spec: workload for workload in names[argument]}
        elif "_ci" in argument:
            spec = _parse_spec_name(argument)
            found[spec] = by_spec.get(spec, Workload(argument, "given by its spec name", spec))
        else:
            near = get_close_matches(argument.lower(), names, n=4, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the suites are {', '.join(suites())}."
            raise UnknownWorkloadError(f"{argument!r} is no suite, no workload and no canonical spec name; {hint}")
    return list(found.values())


def adapted(workloads: Sequence[Workload], *, dtype: str | None = None, channels_last: bool = False) -> list[Workload]:
    """The same workloads, in another dtype if one is given or in channels_last; raises UnsupportedDtypeError."""
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if channels_last:
        changes["memory_format"] = CHANNELS_LAST
    return [replace(workload, spec=replace(workload.spec, **changes)) for workload in workloads]


def _parse_spec_name(argument: str) -> ConvTranspose2dSpec:
    try:
        return ConvTranspose2dSpec.from_name(argument)
    except SpecError as error:
        raise UnknownWorkloadError(f"no workload {argument!r}: {error}") from error
