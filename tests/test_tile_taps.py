"""Channels summed before taps in a tile unit: `llvm_amx_taps`."""

from dataclasses import replace
from math import prod

import pytest
import torch
from same_bits import different_answers

import convt_tvm as ct
from convt_tvm.compiler import lower_choice
from convt_tvm.processor import LEVELS, TILE_FEATURES, host_features
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.space import choices, default_choice
from convt_tvm.spec import CHANNELS_LAST, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_tap_layout import TileTapLayout

HOST, TILES = Target.parse("llvm"), Target("llvm", "x86_64", (*LEVELS["x86-64-v4"], *TILE_FEATURES))
FEW = ConvTranspose2dSpec(n=1, ci=64, ih=12, iw=9, co=3, kernel_size=4, stride=2, padding=1, dtype="bfloat16")
LAST = replace(FEW, memory_format=CHANNELS_LAST)
FIFTY = replace(FEW, ci=20, co=4, kernel_size=5, groups=2)
SPECS = {
    "three channels": FEW,
    "any batch size": replace(FEW, n=None, ci=33, ih=5, iw=7),
    "images for threads to share": replace(FEW, n=9, ih=4, iw=4, bias=False),
    "groups, taps that differ, several tiles of rows": replace(FEW, n=2, ci=24, co=26, kernel_size=(3, 5), groups=2),
    "fifty rows": FIFTY,
    "one channel of each": replace(FEW, ci=1, co=1, ih=3, iw=3),
    "three steps": replace(FEW, ci=70, co=1, stride=1, kernel_size=9, padding=4),
    "rows of weights for threads to share": replace(FEW, ih=4, iw=4, co=40),
    "one position": replace(FEW, ih=1, iw=1, padding=0),
    "phases without taps": replace(FEW, kernel_size=2, stride=3, padding=0, output_padding=1),
    "channels_last": LAST,
    "channels_last, any batch size": replace(LAST, n=None, ci=36, ih=5, iw=7),
    "channels_last, groups": replace(LAST, n=2, ci=16, co=12, groups=2, stride=(3, 2), dilation=(2, 1)),
    "channels_last, four steps": replace(LAST, n=9, ci=100, co=1, bias=False),
}

here = pytest.mark.skipif(not host_features() >= TILE_FEATURES, reason="this processor has no tile unit (AMX)")


def tile_choices(spec, target=TILES):
    found = choices(spec.sized, target, "llvm_amx_taps")
    assert all(isinstance(choice.layout, TileTapLayout) for choice in found)
    return found


@here
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_answers_are_exact(spec):
    for choice in tile_choices(spec, HOST):
        kernel = ct.build(spec, choice=choice)
        for count in (0, 1, 3, 9) if spec.n is None else (spec.n,):
            sized = spec.with_batch(count)
            image, weight, bias = integer_inputs(sized, count)
            packed = kernel.pack(weight)
            assert (tuple(packed.shape), packed.dtype) == (choice.layout.packed_shape(spec.sized), torch.bfloat16)
            output = torch.full(sized.output_shape, torch.nan, dtype=torch.bfloat16)
            output = output.to(memory_format=getattr(torch, spec.memory_format))
            kernel(image, packed, bias, out=output)
            assert torch.equal(output.double(), reference(sized, image, weight, bias).double()), choice.layout


@here
@pytest.mark.parametrize("name", ["three channels", "channels_last", "any batch size"])
def test_nothing_beyond_the_image_counts(name):
    spec = SPECS[name].sized
    image, weight, bias = integer_inputs(spec, 0)
    around = torch.full((image.numel() + 256,), torch.nan, dtype=torch.bfloat16)
    inside = around[128:-128].as_strided(image.shape, image.stride()).copy_(image)
    for choice in tile_choices(spec, HOST):
        kernel = ct.build(spec, choice=choice)
        assert torch.equal(kernel(inside, weight, bias).double(), reference(spec, image, weight, bias).double())


@here
def test_bits_are_the_same_for_tiles_threads_and_batches():
    spec = replace(FEW, n=9, ci=200, ih=20, iw=13)
    assert different_answers(spec, tile_choices(spec, HOST)) == 1


def test_are_for_bfloat16_and_targets_that_say_so():
    assert tile_choices(FEW) and tile_choices(LAST)
    assert not tile_choices(FEW, Target.parse("llvm:x86-64-v4"))
    assert not any(tile_choices(replace(FEW, dtype=dtype)) for dtype in ("float32", "float16"))
    # Squares of pairs would be of two groups; sums of all taps of all positions would leave the caches by far.
    assert not tile_choices(replace(LAST, ci=6)) and not tile_choices(replace(FEW, ih=1024, iw=1024))


@pytest.mark.parametrize("spec", [FEW, LAST, replace(FEW, ci=33)])
def test_sums_are_tile_products_of_panels(spec):
    for choice in tile_choices(spec):
        text = str(lower_choice(spec, TILES, choice).module["convt"])
        names = ("ldtilecfg", "tilezero", "tileloadd64", "tdpbf16ps", "tilestored64", "tilerelease")
        assert [name for name in names if f"llvm.x86.{name}" not in text] == []
        assert "product_local[" not in text


def test_rows_of_weights_fill_tiles_and_registers():
    # Of 50 rows 3 tiles would be 27, of which 2 take them in, if they were even.
    for spec in (FEW, SPECS["three steps"], FIFTY):
        for layout in (choice.layout for choice in tile_choices(spec)):
            rows, columns = layout.tiles.channel_tiles, layout.tiles.position_tiles
            assert rows * columns + rows + 1 <= 8
            assert layout.weight_rows <= 16 * rows and layout.weight_rows % rows == 0
            assert 0 <= layout.matrix_rows(spec) - spec.co // spec.groups * prod(spec.kernel_size) < layout.weight_rows
            channels = 2 * layout.pairs(spec)
            assert spec.ci // spec.groups <= channels < spec.ci // spec.groups + 2 * layout.tiles.steps(spec)
            assert prod(layout.packed_shape(spec)) == spec.groups * layout.matrix_rows(spec) * channels
            assert TileTapLayout.from_json(layout.to_json()) == layout


def test_few_output_channels_are_summed_before_taps():
    for spec in (FEW, replace(FEW, co=1, kernel_size=9, stride=3, padding=4)):
        assert default_choice(spec, TILES).space.name == "llvm_amx_taps"
        assert default_choice(replace(spec, n=None), TILES).space.name == "llvm_amx_taps"
    assert default_choice(replace(FEW, co=256), TILES).space.name == "llvm_amx"
