"""Where an output is wrong: the worst element with the taps that made it, and the worst of every phase."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from convt_tvm.phases import Axis
from convt_tvm.spec import ConvTranspose2dSpec, Pair

__all__ = ["Tap", "Worst", "find_worst", "phase_map", "taps_of"]

_TAPS_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Tap:
    """One kernel position and the input position it is multiplied with, each as (row, column)."""

    kernel: Pair
    input: Pair


@dataclass(frozen=True, slots=True)
class Worst:
    """The element of an output that is farthest off.

    Attributes
    ----------
    position
        (n, co, oh, ow).
    phase
        Row and column modulo the stride.
    taps
        What it sums over in each input channel of its group; empty where it is the bias alone.
    value, exact, ratio
        What it is, what it should be, and the distance between over the error bound.
    """

    position: tuple[int, int, int, int]
    phase: Pair
    taps: tuple[Tap, ...]
    value: float
    exact: float
    ratio: float

    def __str__(self) -> str:
        shown = ", ".join(f"w{list(tap.kernel)}*x{list(tap.input)}" for tap in self.taps[:_TAPS_SHOWN])
        more = f" and {len(self.taps) - _TAPS_SHOWN} more" if len(self.taps) > _TAPS_SHOWN else ""
        sums = f"sums {shown}{more}" if self.taps else "is the bias alone"
        return (
            f"at {self.position} it is {self.value:.9g} instead of {self.exact:.9g}; phase {self.phase}, which {sums}"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, apart from NaN and infinities."""
        return asdict(self)


def _reaching(axis: Axis, output: int) -> list[tuple[int, int]]:
    """Pairs (kernel index, input index) whose product reaches an output of the axis."""
    pairs = []
    for tap in range(axis.kernel_size):
        steps, rest = divmod(output + axis.padding - axis.dilation * tap, axis.stride)
        if not rest and 0 <= steps < axis.input_size:
            pairs.append((tap, steps))
    return pairs


def taps_of(spec: ConvTranspose2dSpec, row: int, column: int) -> tuple[Tap, ...]:
    """What the output at a row and column sums over, in each input channel of its group.

    By the definition, not by `convt_tvm.phases`: whoever looks for a wrong phase needs another opinion.
    """
    rows, columns = (_reaching(axis, output) for axis, output in zip(spec.axes, (row, column), strict=True))
    return tuple(Tap((kh, kw), (ih, iw)) for kh, ih in rows for kw, iw in columns)


def find_worst(
    spec: ConvTranspose2dSpec, output: torch.Tensor, exact: torch.Tensor, ratio: torch.Tensor
) -> Worst | None:
    """The element with the largest ratio; None for an empty output."""
    if not ratio.numel():
        return None
    index = torch.unravel_index(ratio.argmax(), ratio.shape)
    n, co, oh, ow = (int(position) for position in index)
    return Worst(
        position=(n, co, oh, ow),
        phase=(oh % spec.stride[0], ow % spec.stride[1]),
        taps=taps_of(spec, oh, ow),
        value=float(output[index]),
        exact=float(exact[index]),
        ratio=float(ratio[index]),
    )


def phase_map(spec: ConvTranspose2dSpec, ratio: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """The largest ratio in each phase, rows by columns; no more phases than the output has rows and columns."""
    height, width = spec.stride
    if not ratio.numel():
        return ()
    flat = ratio.amax(dim=(0, 1))
    return tuple(
        tuple(float(flat[row::height, column::width].max()) for column in range(min(width, spec.ow)))
        for row in range(min(height, spec.oh))
    )
