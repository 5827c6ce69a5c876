"""One transposed convolution, described once and validated once."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any, Self, TypeAlias

from convt_tvm.errors import SpecError, SpecTypeError, UnsupportedDtypeError
from convt_tvm.phases import Axis

__all__ = ["CHANNELS_LAST", "CONTIGUOUS", "DTYPE_BYTES", "MEMORY_ORDER", "ConvTranspose2dSpec", "Pair"]

Pair: TypeAlias = tuple[int, int]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

CONTIGUOUS, CHANNELS_LAST = "contiguous_format", "channels_last"
"""Memory formats of input and output, by PyTorch's names: NCHW or NHWC in memory, and NCHW in every shape."""
MEMORY_ORDER = {"nchw": (0, 1, 2, 3), "nhwc": (0, 2, 3, 1)}
"""For axes in memory, the order in which those of a shape come there. Compiled functions take tensors in that order."""

_PAIRS = ("kernel_size", "stride", "padding", "output_padding", "dilation")
_SIZES = ("ci", "ih", "iw", "co", "groups")
_NAME = re.compile(
    r"n(?P<n>\d+|any)_ci(?P<ci>\d+)_ih(?P<ih>\d+)_iw(?P<iw>\d+)_co(?P<co>\d+)_k(?P<kernel_size>\d+x\d+)"
    r"_s(?P<stride>\d+x\d+)_p(?P<padding>\d+x\d+)_op(?P<output_padding>\d+x\d+)_d(?P<dilation>\d+x\d+)"
    r"_g(?P<groups>\d+)_(?P<bias>bias|nobias)_(?P<dtype>\w+?)(_(?P<memory_format>channels_last))?"
)
_EXAMPLE_NAME = "n1_ci512_ih4_iw4_co256_k4x4_s2x2_p1x1_op0x0_d1x1_g1_bias_float32"


def _as_int(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SpecTypeError(f"{name}={value!r} must be an integer; got {type(value).__name__}.") from None


def _as_pair(name: str, value: object) -> Pair:
    if isinstance(value, list | tuple):
        if len(value) == 1:
            value = (value[0], value[0])
        if len(value) != 2:
            raise SpecTypeError(f"{name}={value!r} must be an integer or two of them, (height, width).")
        return _as_int(name, value[0]), _as_int(name, value[1])
    both = _as_int(name, value)
    return both, both


@dataclass(frozen=True, init=False)
class ConvTranspose2dSpec:
    """Shape, parameters and dtype of one ``torch.nn.ConvTranspose2d`` applied to one input shape.

    Parameters
    ----------
    n, ci, ih, iw
        Input shape NCHW; ``n`` may be 0, or None for any batch size; the others are at least 1.
    co
        Output channels; ``ci`` and ``co`` are multiples of ``groups``.
    kernel_size, stride, padding, output_padding, dilation
        An integer, or two as (height, width); stored as pairs. ``output_padding`` is below ``max(stride, dilation)`` on
        each axis, as in PyTorch.
    groups
        Number of blocked connections from input to output channels.
    bias
        Whether a bias of shape ``(co,)`` is added.
    dtype
        ``float32``, ``float64``, ``float16`` or ``bfloat16``: of input, weight, bias and output alike. The two
        half-width types accumulate in float32.
    memory_format
        ``contiguous_format`` or ``channels_last``: of input and output alike, as `torch.memory_format` names them.
        Shapes are NCHW either way.

    Raises
    ------
    SpecError
        (a ValueError and a RuntimeError) if the parameters are not valid or the output would be empty.
    UnsupportedDtypeError
        (also a NotImplementedError) for any other dtype.

    Examples
    --------
    >>> spec = ConvTranspose2dSpec(n=1, ci=512, ih=4, iw=4, co=256, kernel_size=4, stride=2, padding=1)
    >>> spec.output_shape
    (1, 256, 8, 8)
    >>> ConvTranspose2dSpec.from_name(spec.name) == spec
    True
    """

    n: int | None
    ci: int
    ih: int
    iw: int
    co: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    output_padding: Pair
    dilation: Pair
    groups: int
    bias: bool
    dtype: str
    memory_format: str

    def __init__(
        self,
        *,
        n: int | None,
        ci: int,
        ih: int,
        iw: int,
        co: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: str = "float32",
        memory_format: str = CONTIGUOUS,
    ) -> None:
        given = {
            "n": None if n is None else _as_int("n", n),
            "ci": _as_int("ci", ci),
            "ih": _as_int("ih", ih),
            "iw": _as_int("iw", iw),
            "co": _as_int("co", co),
            "kernel_size": _as_pair("kernel_size", kernel_size),
            "stride": _as_pair("stride", stride),
            "padding": _as_pair("padding", padding),
            "output_padding": _as_pair("output_padding", output_padding),
            "dilation": _as_pair("dilation", dilation),
            "groups": _as_int("groups", groups),
            "bias": bool(bias),
            "dtype": str(dtype).removeprefix("torch."),
            "memory_format": str(memory_format).removeprefix("torch."),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._validate()

    def _validate(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise UnsupportedDtypeError(f"dtype={self.dtype!r} is not supported; use one of {', '.join(DTYPE_BYTES)}.")
        if self.memory_format not in (CONTIGUOUS, CHANNELS_LAST):
            raise SpecError(
                f"memory_format={self.memory_format!r} is not supported; use {CONTIGUOUS} or {CHANNELS_LAST}."
            )
        if self.n is not None and self.n < 0:
            raise SpecError(f"n={self.n} must not be negative.")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise SpecError(f"{name}={getattr(self, name)} must be at least 1 on both axes.")
        for name in ("padding", "output_padding"):
            if min(getattr(self, name)) < 0:
                raise SpecError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("ci", "co"):
            if getattr(self, name) % self.groups:
                raise SpecError(f"{name}={getattr(self, name)} must be a multiple of groups={self.groups}.")
        largest = tuple(max(pair) for pair in zip(self.stride, self.dilation, strict=True))
        if any(op >= limit for op, limit in zip(self.output_padding, largest, strict=True)):
            raise SpecError(
                f"output_padding={self.output_padding} must be smaller than stride={self.stride} or "
                f"dilation={self.dilation} on each axis; lower it or raise the stride."
            )
        if min(self.oh, self.ow) < 1:
            raise SpecError(
                f"the output would be {self.oh}x{self.ow}: input {self.ih}x{self.iw} with kernel_size="
                f"{self.kernel_size}, stride={self.stride}, dilation={self.dilation} is smaller than what "
                f"padding={self.padding} crops; lower the padding."
            )

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The two spatial axes, height first."""
        parameters = self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        height, width = (Axis(size, *of_axis) for size, *of_axis in zip((self.ih, self.iw), *parameters, strict=True))
        return height, width

    @property
    def oh(self) -> int:
        """Output height."""
        return self.axes[0].output_size

    @property
    def ow(self) -> int:
        """Output width."""
        return self.axes[1].output_size

    def with_batch(self, n: int) -> "ConvTranspose2dSpec":
        """The same layer applied to ``n`` images."""
        return replace(self, n=n)

    @property
    def sized(self) -> "ConvTranspose2dSpec":
        """The spec itself; where it goes for any batch size, that of a single image."""
        return self.with_batch(1) if self.n is None else self

    @property
    def turned(self) -> "ConvTranspose2dSpec":
        """The same layer with images of one column turned on their side: of one row.

        Where the images before and after have one column, and the kernel has; otherwise the spec itself. All tensors
        are the same in memory.
        """
        if not self.iw == self.ow == self.kernel_size[1] == 1:
            return self
        pairs: dict[str, Any] = {name: tuple(reversed(getattr(self, name))) for name in _PAIRS}
        return replace(self, ih=1, iw=self.ih, **pairs)

    @property
    def _batch(self) -> int:
        if self.n is None:
            raise SpecError(f"{self.name} has no shapes of its own: it is for any batch size; see `with_batch`.")
        return self.n

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """NCHW."""
        return self._batch, self.ci, self.ih, self.iw

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """IOHW: ``(ci, co/groups, kh, kw)``."""
        return self.ci, self.co // self.groups, *self.kernel_size

    @property
    def bias_shape(self) -> tuple[int]:
        """``(co,)``, whether or not there is a bias."""
        return (self.co,)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """NCHW."""
        return self._batch, self.co, self.oh, self.ow

    @property
    def shapes(self) -> str:
        """Input and output shape in words: ``1x512x4x4 to 1x256x8x8``; ``n`` stands for any batch size."""
        images = (self.sized.input_shape[1:], self.sized.output_shape[1:])
        return " to ".join("x".join(map(str, ("n" if self.n is None else self.n, *image))) for image in images)

    @property
    def is_channels_last(self) -> bool:
        """Whether the memory format is ``channels_last``."""
        return self.memory_format == CHANNELS_LAST

    @property
    def input_axes(self) -> str:
        """The order of the input's axes in memory: ``nchw``, also where one channel makes it no matter, or ``nhwc``."""
        return "nhwc" if self.is_channels_last and self.ci > 1 else "nchw"

    @property
    def output_axes(self) -> str:
        """The order in memory of the output's axes, as `input_axes`."""
        return "nhwc" if self.is_channels_last and self.co > 1 else "nchw"

    @property
    def accumulator_dtype(self) -> str:
        """The dtype that sums are kept in: float64 for float64, float32 for the others."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds that reach the output: no zeros between inputs, none beyond the borders."""
        height, width = self.axes
        return self._batch * self.ci * (self.co // self.groups) * height.products * width.products

    @property
    def size_bytes(self) -> int:
        """Bytes of input, weight, bias and output, each counted once."""
        elements = prod(self.input_shape) + prod(self.weight_shape) + self.bias * self.co + prod(self.output_shape)
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def name(self) -> str:
        """The canonical name, which holds every field; see `from_name`."""
        batch = "any" if self.n is None else self.n
        pairs = {name: "x".join(map(str, getattr(self, name))) for name in _PAIRS}
        return (
            f"n{batch}_ci{self.ci}_ih{self.ih}_iw{self.iw}_co{self.co}_k{pairs['kernel_size']}_s{pairs['stride']}"
            f"_p{pairs['padding']}_op{pairs['output_padding']}_d{pairs['dilation']}_g{self.groups}"
            f"_{'bias' if self.bias else 'nobias'}_{self.dtype}"
            f"{f'_{CHANNELS_LAST}' if self.is_channels_last else ''}"
        )

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The spec whose canonical `name` this is; raises SpecError if it is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise SpecError(f"{name!r} is not a canonical spec name such as {_EXAMPLE_NAME!r}.")
        given: dict[str, Any] = match.groupdict()
        for field, text in given.items():
            if field in _PAIRS:
                given[field] = tuple(map(int, text.split("x")))
            elif field not in ("bias", "dtype", "memory_format"):
                given[field] = None if text == "any" else int(text)
        given["bias"] = given["bias"] == "bias"
        given["memory_format"] = given["memory_format"] or CONTIGUOUS
        spec = cls(**given)
        if spec.name != name:
            raise SpecError(f"{name!r} is not canonical; the name of this spec is {spec.name!r}.")
        return spec

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; pairs become lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The spec that `to_json` wrote; raises SpecError for missing or unknown fields."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise SpecError(
                f"a spec has the fields {sorted(known)}; missing {sorted(known - set(values))}, "
                f"unknown {sorted(set(values) - known)}."
            )
        return cls(**values)
