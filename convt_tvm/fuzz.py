"""Specs drawn over the whole domain of the operator, from a seed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from convt_tvm.errors import SpecError
from convt_tvm.spec import CHANNELS_LAST, CONTIGUOUS, DTYPE_BYTES, ConvTranspose2dSpec, Pair

__all__ = ["Choose", "Domain", "draw_spec", "fuzzed_specs"]

MEMORY_FORMATS = CONTIGUOUS, CHANNELS_LAST

Choose: TypeAlias = Callable[[int, int], int]
"""An integer between two, both included: ``Random(seed).randint``, or what a property-based test draws."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The largest value of each parameter; channels are those of a group.

    ``depthwise`` is that of a layer's groups of one channel each, which come in multiples of 8.

    The default is wide enough for every tile of the schedules and its surplus, and small enough that building takes
    longer than running.
    """

    n: int = 3
    groups: int = 5
    depthwise: int = 32
    ci: int = 6
    ih: int = 9
    iw: int = 40
    co: int = 40
    kernel_size: int = 6
    stride: int = 6
    padding: int = 5
    dilation: int = 4


def draw_spec(
    choose: Choose,
    *,
    dtypes: Sequence[str] = tuple(DTYPE_BYTES),
    memory_formats: Sequence[str] = MEMORY_FORMATS,
    domain: Domain | None = None,
) -> ConvTranspose2dSpec:
    """One spec, every parameter of which may take every value up to that of `domain`.

    Two in five have one group, one is depthwise.

    Raises
    ------
    SpecError
        if the padding drawn crops the whole output; draw again.
    """
    limits = domain or Domain()

    def pair(low: int, high: int) -> Pair:
        return choose(low, high), choose(low, high)

    kind = choose(0, 4)
    depthwise = kind == 4 and limits.depthwise >= 8
    groups = (1, 1, min(2, limits.groups), limits.groups, 1)[kind]
    if depthwise:
        groups = 8 * choose(1, limits.depthwise // 8)
    stride, dilation = pair(1, limits.stride), pair(1, limits.dilation)
    return ConvTranspose2dSpec(
        n=choose(1, limits.n),
        ci=groups * choose(1, 1 if depthwise else limits.ci),
        ih=choose(1, limits.ih),
        iw=choose(1, limits.iw),
        co=groups * choose(1, 1 if depthwise else limits.co),
        kernel_size=pair(1, limits.kernel_size),
        stride=stride,
        padding=pair(0, limits.padding),
        output_padding=[choose(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)],
        dilation=dilation,
        groups=groups,
        bias=bool(choose(0, 1)),
        dtype=dtypes[choose(0, len(dtypes) - 1)],
        memory_format=memory_formats[choose(0, len(memory_formats) - 1)],
    )


def fuzzed_specs(
    seed: int,
    numbers: range,
    *,
    dtypes: Sequence[str] = tuple(DTYPE_BYTES),
    memory_formats: Sequence[str] = MEMORY_FORMATS,
    domain: Domain | None = None,
) -> Iterator[tuple[int, ConvTranspose2dSpec]]:
    """The numbered specs of the sequence that belongs to `seed`; each is the same whichever others are drawn.

    Examples
    --------
    >>> all_of_them, one = dict(fuzzed_specs(7, range(20))), dict(fuzzed_specs(7, range(12, 13)))
    >>> all_of_them[12] == one[12]
    True
    """
    for number in numbers:
        random = Random(f"{seed}/{number}")
        while True:
            try:
                yield number, draw_spec(random.randint, dtypes=dtypes, memory_formats=memory_formats, domain=domain)
                break
            except SpecError:
                continue
