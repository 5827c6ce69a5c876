"""Channels summed before taps: `llvm_taps`."""

from dataclasses import replace
from math import prod

import pytest
import torch
from machine_code import disassemble, innermost_loops
from same_bits import different_answers

from convt_tvm.compiler import build, build_artifact
from convt_tvm.processor import host_architecture
from convt_tvm.reference import error_bound, integer_inputs, normal_inputs, reference
from convt_tvm.schedules.llvm_taps import row_shares
from convt_tvm.space import choices, default_choice
from convt_tvm.spec import CHANNELS_LAST, ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout, summed_channels
from convt_tvm.target import Target

HOST, V3, V4 = (Target.parse(name) for name in ("llvm", "llvm:x86-64-v3", "llvm:x86-64-v4"))
NARROW = ConvTranspose2dSpec(
    n=2, ci=6, ih=5, iw=7, co=10, kernel_size=(3, 4), stride=2, padding=(1, 0), output_padding=(1, 0), groups=2
)
MANY_CHANNELS = ConvTranspose2dSpec(n=1, ci=320, ih=6, iw=5, co=3, kernel_size=3, stride=2, padding=1)
SPECS = {
    "phases of one tap and of two, groups": NARROW,
    "any batch size": replace(NARROW, n=None),
    "images for threads to share": replace(NARROW, n=9, bias=False),
    "parts of channels": MANY_CHANNELS,
    "rows of weights for threads to share": replace(NARROW, n=1, groups=1, ci=40, ih=4, iw=6, co=64, kernel_size=4),
    "one position": replace(NARROW, ih=1, iw=1, padding=0, kernel_size=7),
    "phases without taps": replace(NARROW, kernel_size=2, stride=(3, 4), padding=0, output_padding=(1, 2)),
    "taps that read every other row": replace(NARROW, kernel_size=3, stride=(4, 1), dilation=(2, 3), output_padding=0),
    "outputs of the border alone": replace(NARROW, kernel_size=2, stride=1, dilation=9, padding=0, output_padding=0),
    "taps as far apart as a row is long": replace(
        NARROW, iw=2, kernel_size=(1, 6), dilation=2, padding=0, stride=(3, 1)
    ),
    "cropped": replace(NARROW, kernel_size=3, padding=3, output_padding=0),
    "several tiles of columns": replace(NARROW, ih=3, iw=75, co=4, kernel_size=(2, 6)),
    "many phases": replace(NARROW, ih=3, iw=21, co=2, kernel_size=(3, 32), stride=(2, 16)),
    "one channel": replace(NARROW, ci=1, co=1, groups=1, dtype="float64"),
}
LAST = replace(NARROW, ci=16, memory_format=CHANNELS_LAST)
SPECS |= {
    "channels_last": LAST,
    "channels_last, any batch size": replace(LAST, n=None, ci=24, iw=11),
    "channels_last, one output channel": replace(LAST, ci=4, co=1, groups=1, n=9),
    "channels_last, blocks of channels": replace(
        LAST, ci=24, co=33, groups=1, stride=1, kernel_size=2, output_padding=0
    ),
    "channels_last, outputs of the border alone": replace(LAST, kernel_size=2, stride=3, padding=0, dtype="float64"),
}
SPECS |= {
    f"{dtype}, {name}": replace(SPECS[name], dtype=dtype)
    for dtype, name in (
        ("bfloat16", "phases of one tap and of two, groups"),
        ("float16", "any batch size"),
        ("float16", "several tiles of columns"),
        ("bfloat16", "channels_last, any batch size"),
        ("float16", "channels_last, one output channel"),
    )
}

here = pytest.mark.skipif(not HOST.loads_some, reason="this processor has no loads that leave lanes out")


def tap_choices(spec, target=HOST):
    found = choices(spec.sized, target, "llvm_taps")
    assert all(isinstance(choice.layout, TapLayout) for choice in found)
    return found


def of_every_size(spec, target=HOST):
    """For each number of positions a choice that is summed in tiles of so many, and one of another number of rows."""
    found = {choice.layout.positions: choice for choice in tap_choices(spec, target)}
    rows = {choice.layout.weight_rows: choice for choice in tap_choices(spec, target)}
    return [*found.values(), list(rows.values())[len(rows) // 2]]


@here
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_answers_are_exact(spec):
    for choice in of_every_size(spec):
        kernel = build(spec, choice=choice)
        for count in (0, 1, 3, 9) if spec.n is None else (spec.n,):
            sized = spec.with_batch(count)
            image, weight, bias = integer_inputs(sized, count)
            packed = kernel.pack(weight)
            assert tuple(packed.shape) == choice.layout.packed_shape(spec.sized)
            output = kernel(image, packed, bias)
            assert output.is_contiguous(memory_format=getattr(torch, spec.memory_format))
            assert torch.equal(output.double(), reference(sized, image, weight, bias).double()), choice.layout


@here
def test_bits_are_the_same_for_tiles_threads_and_batches():
    spec = replace(MANY_CHANNELS, n=9, ih=20, iw=13)
    assert different_answers(spec, of_every_size(spec)) == 1


@here
def test_sums_of_many_channels_are_near():
    spec = replace(MANY_CHANNELS, ci=2048, kernel_size=4)
    assert 1 < spec.ci // summed_channels(spec) < 20
    image, weight, bias = normal_inputs(spec, 0)
    kernel = build(spec, choice=tap_choices(spec)[0])
    error = (kernel(image, kernel.pack(weight), bias).double() - reference(spec, image, weight, bias)).abs()
    assert bool((error <= error_bound(spec, image, weight, bias)).all())
    eager = torch.nn.functional.conv_transpose2d(image, weight, bias, spec.stride, spec.padding)
    assert error.max() <= 2 * (eager.double() - reference(spec, image, weight, bias)).abs().max()


@here
@pytest.mark.parametrize(
    "name",
    [
        *("phases of one tap and of two, groups", "cropped", "channels_last"),
        "bfloat16, phases of one tap and of two, groups",
    ],
)
def test_nothing_beyond_the_image_is_read(name):
    spec = SPECS[name]
    image, weight, bias = integer_inputs(spec, 0)
    around = torch.full((image.numel() + 128,), torch.nan, dtype=image.dtype)
    around[64:-64].as_strided(image.shape, image.stride()).copy_(image)
    for choice in of_every_size(spec):
        kernel = build(spec, choice=choice)
        output = kernel(around[64:-64].as_strided(image.shape, image.stride()), kernel.pack(weight), bias)
        assert torch.equal(output.double(), reference(spec, image, weight, bias).double()), choice.layout


def test_layouts_need_loads_that_leave_lanes_out_and_sums_for_the_caches():
    assert all(tap_choices(replace(NARROW, dtype=dtype), V3) for dtype in ("float32", "bfloat16", "float16", "float64"))
    assert not tap_choices(NARROW, Target.parse("llvm:x86-64-v2"))
    # Squares of three channels would be transposed.
    assert tap_choices(LAST, V3) and not tap_choices(replace(LAST, ci=6), V3)
    # Sums of all taps of all positions would leave the caches by far.
    assert not tap_choices(replace(NARROW, ih=512, iw=512), V3)
    # To store them costs little beside sums over many channels.
    many = ConvTranspose2dSpec(n=1, ci=192, ih=40, iw=48, co=80, kernel_size=4, stride=4)
    assert tap_choices(many, V3) and not tap_choices(replace(many, ci=32), V3)


@pytest.mark.parametrize("vector_bytes", [32, 64])
def test_tiles_fit_the_registers_and_take_in_all_rows_and_positions(vector_bytes):
    target = V3 if vector_bytes == 32 else Target.parse("llvm:x86-64-v4")
    found = tap_choices(NARROW, target)
    for layout in (choice.layout for choice in found):
        vectors = layout.positions * 4 // vector_bytes
        assert layout.positions * 4 % vector_bytes == 0
        assert vectors * layout.weight_rows + vectors + 1 <= target.vector_registers
        assert 0 <= layout.matrix_rows(NARROW) - 5 * 12 < layout.weight_rows
        assert 0 <= layout.panels(NARROW) * layout.positions - 35 < layout.positions
        assert prod(layout.packed_shape(NARROW)) == 2 * layout.matrix_rows(NARROW) * 3
        assert TapLayout.from_json(layout.to_json()) == layout


def test_few_channels_on_small_images_are_summed_before_taps():
    for spec in (
        ConvTranspose2dSpec(n=16, ci=320, ih=8, iw=8, co=8, kernel_size=(6, 3), stride=(2, 1), dilation=2, groups=2),
        ConvTranspose2dSpec(n=1, ci=256, ih=28, iw=5, co=4, kernel_size=7, stride=3, output_padding=1, bias=False),
    ):
        for target in (V3, V4):
            assert default_choice(spec, target).space.name == "llvm_taps"
            assert default_choice(replace(spec, n=None), target).space.name == "llvm_taps"
    wide = ConvTranspose2dSpec(n=1, ci=64, ih=128, iw=128, co=8, kernel_size=4, stride=2, padding=1)
    assert all(default_choice(wide, target).space.name == "llvm_columns" for target in (V3, V4))


def test_threads_share_the_rows_of_weights_where_panels_are_few():
    spec = ConvTranspose2dSpec(n=1, ci=1024, ih=8, iw=8, co=256, kernel_size=4, stride=2, padding=1)
    layout = choices(spec, V4, "llvm_taps")[0].layout
    assert layout.panels(spec) * row_shares(spec, layout) >= 4
    assert layout.row_tiles(spec) % row_shares(spec, layout) == 0
    many = replace(spec, ih=32, iw=32, co=16)
    assert row_shares(many, choices(many, V4, "llvm_taps")[0].layout) == 1


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize(("channels", "parts"), [(96, 1), (480, 3)])
def test_sums_stay_in_registers_and_images_are_read_in_vectors(channels, parts, tmp_path):
    # Sums over channels are too many for the stack, where LLVM would know what else may be kept of them.
    spec = replace(MANY_CHANNELS, ci=channels, co=12, ih=29, iw=27)
    assert channels // summed_channels(spec) == parts
    choice = next(c for c in tap_choices(spec, V3) if (c.layout.weight_rows, c.layout.positions) == (6, 16))
    build_artifact(spec, V3, tmp_path / "kernel", choice=choice)
    loops = innermost_loops(disassemble(tmp_path / "kernel" / "kernel.so"))
    summing = [loop for loop in loops if sum(name.startswith("vfmadd") for name, _ in loop) >= 12]
    assert summing
    for loop in summing:
        vectors = [name for name, operands in loop if "ymm" in operands and not name.startswith("vfmadd")]
        assert sorted(vectors) == ["vbroadcastss"] * 6 + ["vmovups"] * 2
    names = {name for loop in loops for name, _ in loop}
    # The image's end lies in a vector, and the next panel is asked for.
    assert {"vmaskmovps", "prefetcht0"} <= names


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
def test_vectors_of_cache_lines_are_read_with_masks(tmp_path):
    target = Target.parse("llvm:x86-64-v4")
    choice = next(c for c in tap_choices(NARROW, target) if c.layout.positions == 32)
    build_artifact(NARROW, target, tmp_path / "kernel", choice=choice)
    loops = innermost_loops(disassemble(tmp_path / "kernel" / "kernel.so"))
    assert any(name.startswith("vmovup") and "{%k" in operands for loop in loops for name, operands in loop)
