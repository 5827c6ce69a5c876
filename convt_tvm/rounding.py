"""How far outputs are from exact arithmetic: in units of their own error bound, and in units of their last place."""

from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch

from convt_tvm.reference import Expected
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["QUANTILES", "ULP_EDGES", "LengthError", "Rounding", "measure_rounding", "ulp"]

QUANTILES = (0.5, 0.9, 0.99, 0.999)
ULP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)
"""Upper edges of the histogram's bins, each included; a last bin holds the rest. The first two hold what is correctly
rounded."""

_LENGTHS_KEPT = 12


@dataclass(frozen=True, slots=True)
class LengthError:
    """Error over bound among the ``outputs`` that sum ``length`` products each."""

    length: int
    outputs: int
    median: float
    largest: float


@dataclass(frozen=True, slots=True)
class Rounding:
    """The distances of one output tensor from float64.

    Attributes
    ----------
    max_error, max_ratio
        Largest distance, and largest ratio of a distance to its own bound: above 1 the kernel is wrong. Infinite for
        an output that is NaN or infinite and should not be.
    quantiles
        Of those ratios, at `QUANTILES`.
    relative_norm
        Euclidean norm of the distances over that of the exact outputs.
    max_ulps, ulps
        Largest distance in units in the last place of the exact value, and how many outputs fall between `ULP_EDGES`.
    lengths
        The ratios by reduction length, shortest first; at most 12 lengths, evenly chosen.
    """

    max_error: float
    max_ratio: float
    quantiles: tuple[float, ...]
    relative_norm: float
    max_ulps: float
    ulps: tuple[int, ...]
    lengths: tuple[LengthError, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, apart from infinities; lengths as lists of their fields."""
        return asdict(self) | {"lengths": [list(astuple(each)) for each in self.lengths]}


def ulp(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` around each value, in float64."""
    info = torch.finfo(getattr(torch, dtype))
    # frexp gives 0.5 <= mantissa < 1, so the leading bit is worth 2**(exponent - 1).
    exponent = torch.frexp(values.double().abs().clamp(min=info.smallest_normal)).exponent
    return torch.exp2(exponent.double()) * (info.eps / 2)


def measure_rounding(spec: ConvTranspose2dSpec, expected: Expected, output: torch.Tensor) -> Rounding:
    """The distances of `output` from what is expected of it; all zero for an empty batch."""
    if not output.numel():
        return Rounding(0.0, 0.0, (0.0,) * len(QUANTILES), 0.0, 0.0, (0,) * (len(ULP_EDGES) + 1), ())
    error = (output.double() - expected.exact).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    ratio = expected.ratio(output)
    ulps = error / ulp(expected.exact, spec.dtype)
    bins = torch.bucketize(ulps.contiguous(), torch.tensor(ULP_EDGES, dtype=torch.float64))
    norm = float(expected.exact.norm())
    return Rounding(
        max_error=float(error.max()),
        max_ratio=float(ratio.max()),
        quantiles=_quantiles(ratio),
        relative_norm=float(error.norm()) / norm if norm else 0.0,
        max_ulps=float(ulps.max()),
        ulps=tuple(torch.bincount(bins.flatten(), minlength=len(ULP_EDGES) + 1).tolist()),
        lengths=_by_length(expected.lengths, ratio),
    )


def _quantiles(values: torch.Tensor) -> tuple[float, ...]:
    """Exact order statistics: torch.quantile takes no more than 16 million values."""
    ordered = values.flatten().sort().values
    return tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in QUANTILES)


def _by_length(lengths: torch.Tensor, ratio: torch.Tensor) -> tuple[LengthError, ...]:
    present = torch.unique(lengths).tolist()
    chosen = present[:: -(-len(present) // _LENGTHS_KEPT)]
    found = []
    for length in chosen:
        there = ratio[:, :, (lengths == length)[0, 0]].flatten()
        found.append(LengthError(int(length), there.numel(), float(there.median()), float(there.max())))
    return tuple(found)
