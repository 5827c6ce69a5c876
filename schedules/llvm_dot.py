"""CPU: dot products of pairs of bfloat16 (AVX-512 BF16), vector lanes along output channels."""

from collections.abc import Iterator

from tvm.s_tir import Schedule

from convt_tvm.compute import IN_VECTORS
from convt_tvm.dot_layout import DotLayout, paired
from convt_tvm.layout import Layout, bands, reaches
from convt_tvm.schedule import find_window
from convt_tvm.schedules import llvm_channels
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import TILE_FEATURES, Target

NAME = "llvm_dot"
TARGET_KIND = "llvm"

SLOW_WITH_TILES = 3


def applies(spec: ConvTranspose2dSpec) -> bool:
    """Specs in bfloat16 that have any product."""
    return spec.dtype == "bfloat16" and any(reaches(spec, band) for band in bands(spec))


def layouts(spec: ConvTranspose2dSpec, target: Target) -> Iterator[tuple[Layout, float]]:
    """Those of `llvm_channels` for half the input channels, each with its estimated cycles."""
    if "avx512bf16" not in target.features:
        return
    factor = 1 if TILE_FEATURES.isdisjoint(target.features) else SLOW_WITH_TILES
    for layout, cycles in llvm_channels.layouts(paired(spec), target):
        yield DotLayout(**layout.to_json()), factor * cycles


def space(sch: Schedule) -> None:
    """Schedule the phase form in `sch` in place; deterministic for a declaration."""
    llvm_channels.space(sch)
    window = find_window(sch)
    if window is not None:
        sch.annotate(sch.get_loops(window)[-2], IN_VECTORS, True)
