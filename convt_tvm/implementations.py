"""What the numerics lab compares: our kernels by schedule space, torch by back end, other libraries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from convt_tvm.check import Operator, torch_eager
from convt_tvm.dot_layout import DotLayout
from convt_tvm.errors import RowsError, TargetError
from convt_tvm.layout import Layout
from convt_tvm.peers import PEERS, Refusal, prepare
from convt_tvm.spec import CONTIGUOUS, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_layout import TileLayout

if TYPE_CHECKING:
    from convt_tvm.space import Choice

__all__ = [
    "OURS",
    "Implementation",
    "RefusedError",
    "emulated_implementation",
    "find_implementation",
    "implementations",
    "our_implementations",
]

OURS = "ours"
"""The kernel that would run; ``ours/SCHEDULE`` is one layout of a schedule space, drawn by the spec's name.

Its best layout is as a rule one of few, and would leave most of what the space holds untried.
"""
EMULATED = f"{OURS}/emulated"
"""The kernel that would run on a GPU, run by the emulator."""

_SLOW = ("torch_compile",)
"""Peers that take seconds to prepare for each data set, and compute with the kernels of others that are compared."""


class RefusedError(Exception):
    """An implementation that does not take the spec, or is not installed; carries the `Refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute the operator.

    Attributes
    ----------
    name
        ``ours``, ``ours/SCHEDULE``, ``ours/emulated``, ``torch``, ``torch_native`` (without oneDNN), or a name of
        `convt_tvm.peers.PEERS`.
    prepare
        Gives an operator for a spec; raises RefusedError for a spec that is not taken.
    """

    name: str
    prepare: Callable[[ConvTranspose2dSpec], Operator]
    _kept: dict[ConvTranspose2dSpec, Operator] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_ours(self) -> bool:
        """Whether its failures are ours."""
        return self.name.split("/")[0] == OURS

    def make(self, spec: ConvTranspose2dSpec) -> Operator:
        """The operator for a spec, prepared when it is first asked for and kept until `forget`."""
        if spec not in self._kept:
            self._kept[spec] = self.prepare(spec)
        return self._kept[spec]

    def for_any_batch(self) -> "Implementation":
        """The same, for specs of any batch size also where one of a certain size is asked for."""
        return Implementation(self.name, lambda spec: self.make(replace(spec, n=None)))

    def forget(self) -> None:
        """Let go of what `make` kept."""
        self._kept.clear()


def our_implementations(target: Target) -> list[Implementation]:
    """Our kernel as it would run, then a layout of every schedule space for the target."""
    from convt_tvm.space import spaces

    names = [space.name for space in spaces() if space.target_kind == target.kind]
    return [
        Implementation(OURS, partial(_build, target, None)),
        *(Implementation(f"{OURS}/{name}", partial(_build, target, name)) for name in names),
    ]


def emulated_implementation(target: Target) -> Implementation:
    """Our kernel for GPUs as it would run, on the emulator; raises TargetError for another target."""
    if target.kind != "cuda":
        raise TargetError(f"the emulator runs code for GPUs, not for {target.name}; write --target cuda or cuda:sm_90.")

    def prepare(spec: ConvTranspose2dSpec) -> Operator:
        from convt_tvm.emulate import EmulatedKernel

        return EmulatedKernel(replace(spec, memory_format=CONTIGUOUS), target)

    return Implementation(EMULATED, prepare)


def _build(target: Target, schedule: str | None, spec: ConvTranspose2dSpec) -> Operator:
    from convt_tvm.compiler import build
    from convt_tvm.space import choices, declared

    if target.kind == "cuda":
        # Its kernels read and write NCHW; they take other tensors by a copy.
        spec = replace(spec, memory_format=CONTIGUOUS)
    choice = None
    if schedule is not None:
        filled = replace(spec, n=spec.n or 1)
        found = choices(filled, target, schedule)
        if not found:
            raise RefusedError(Refusal("rejected", f"the schedule space {schedule} does not apply"))
        choice = _drawn(found, declared(filled, target), target)
    return build(spec, target, choice=choice)


def _drawn(found: Sequence["Choice"], spec: ConvTranspose2dSpec, target: Target) -> "Choice":
    """One of the choices, the same for a spec every time.

    Half of those whose outputs can go past the caches do, and half of the others take chunks of columns or copy by
    chunk, as only images far larger than a case's would be worth it. Of layouts for tile units those whose chunks have
    one row take chunks of columns, half of them; those for GPUs cannot.
    """
    from convt_tvm.cost import past_caches

    rest, number = divmod(crc32(spec.name.encode()), len(found))
    choice, layout = found[number], found[number].layout
    if type(layout) is TileLayout and layout.row_chunk == 1 and rest % 2:
        return replace(choice, layout=_in_columns(layout, spec, rest // 2))
    if layout.taps != "inner" or type(layout) not in (Layout, DotLayout):
        return choice
    if rest % 2:
        passing = list(past_caches(spec, replace(layout, gathers=False, streams=False), target))
        return replace(choice, layout=passing[rest // 2 % len(passing)]) if passing else choice
    if rest // 2 % 2 and type(layout) is Layout and layout.image_block == 1 and not layout.passes_caches:
        if rest // 4 % 2:
            rows = layout.row_block * (1 + rest // 8 % 4)
            return replace(choice, layout=replace(layout, by_chunk=True, row_chunk=rows, column_chunk=0))
        return replace(choice, layout=_in_columns(layout, spec, rest // 8))
    return choice


def _in_columns(layout: Layout, spec: ConvTranspose2dSpec, number: int) -> Layout:
    """`layout` in chunks of columns, of one of the sizes there are."""
    tiles = 1 + number % (replace(layout, column_chunk=0).columns(spec) // layout.column_block)
    return replace(layout, column_chunk=tiles * layout.column_block)


def _native(spec: ConvTranspose2dSpec) -> Operator:
    """PyTorch without oneDNN: its own column-to-image code over a matrix product."""
    eager = torch_eager(spec)

    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The library's own switch: `torch.backends.mkldnn.flags` warns about a feature of Intel's GPUs.
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return eager(input, weight, bias)
        finally:
            torch._C._set_mkldnn_enabled(before)

    return run


def _peer(name: str) -> Callable[[ConvTranspose2dSpec], Operator]:
    def make(spec: ConvTranspose2dSpec) -> Operator:
        def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            contender = prepare(name, spec, (input, weight, bias), torch.get_num_threads())
            if isinstance(contender, Refusal):
                raise RefusedError(contender)
            return contender().contiguous()

        return run

    return make


def implementations(target: Target, *, spaces: bool = False, peers: bool = True) -> list[Implementation]:
    """Everything there is to compare.

    Parameters
    ----------
    spaces
        Whether to force every schedule space besides running the one chosen.
    peers
        Whether to compare other libraries as well as torch.
    """
    ours = our_implementations(target)
    found = ours if spaces else ours[:1]
    found += [Implementation("torch", torch_eager), Implementation("torch_native", _native)]
    others = [name for name in PEERS if name not in ("torch", *_SLOW)] if peers else []
    return found + [Implementation(name, _peer(name)) for name in others]


def find_implementation(name: str, target: Target) -> Implementation:
    """The implementation of that name; raises RowsError, listing those there are, for another."""
    emulated = [emulated_implementation(target)] if target.kind == "cuda" else []
    known = {each.name: each for each in (*implementations(target, spaces=True), *emulated)}
    if name not in known:
        raise RowsError(f"there is no implementation {name!r}; there are {', '.join(known)}.")
    return known[name]
