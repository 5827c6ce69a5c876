"""Schedule spaces: every layout is right, the default suits its target."""

import math
import re
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from drawn_specs import drawn_specs

from convt_tvm import cost, outputs, schedule
from convt_tvm import space as space_module
from convt_tvm.check import bits
from convt_tvm.compiler import build, build_artifact, lower_choice
from convt_tvm.dot_layout import DotLayout
from convt_tvm.errors import BuildError
from convt_tvm.layout import MANY_IMAGES, Layout, bands, images_apart, reaches, reads_input, skips_parts
from convt_tvm.reference import integer_inputs, normal_inputs, reference
from convt_tvm.runtime import load
from convt_tvm.space import choices, default_choice, find_choice, ranked_choices, spaces, varied_choices
from convt_tvm.spec import CHANNELS_LAST, CONTIGUOUS, DTYPE_BYTES, MEMORY_ORDER, ConvTranspose2dSpec
from convt_tvm.tap_layout import TapLayout
from convt_tvm.target import Target
from convt_tvm.tile_layout import TileLayout
from convt_tvm.workloads import resolve

V2, V3, V4 = (Target.parse(f"llvm:x86-64-v{level}") for level in (2, 3, 4))
ZEN4 = Target(V4.kind, V4.arch, (*V4.features, "avx512bf16"))

HOST = Target.parse("llvm")
FORMATS = [CONTIGUOUS, CHANNELS_LAST]
_TRIMMED = 'T.unroll({}, annotations={{"convt.vectors": True}})'
ODD = ConvTranspose2dSpec(
    n=2, ci=6, ih=5, iw=19, co=26, kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), output_padding=(1, 2), groups=2
)
# Border rows and columns on all sides; one tap for each row phase, and rows that no chunk of two divides.
BORDERED = ConvTranspose2dSpec(n=2, ci=5, ih=6, iw=9, co=19, kernel_size=(5, 4), stride=(2, 1), padding=(1, 0))
# Rows of one tap between others without any.
STRIDED = ConvTranspose2dSpec(
    n=2, ci=4, ih=9, iw=17, co=19, kernel_size=1, stride=(6, 5), padding=(3, 1), output_padding=(4, 3)
)
# Phases of one tap and of two, rows with the border on both sides.
MANY = ConvTranspose2dSpec(n=9, ci=3, ih=7, iw=9, co=2, kernel_size=3, stride=2, padding=1)
# The same of several channels in each of several groups.
GROUPED = replace(MANY, n=2, ci=6, co=9, groups=3)
# Tiles of them have room for others, and not all are filled.
SMALL = ConvTranspose2dSpec(n=7, ci=5, ih=2, iw=3, co=19, kernel_size=(3, 4), stride=2, padding=1)
# Three tiles of 16 columns, of which the last has outputs in two vectors of 4.
WIDE = ConvTranspose2dSpec(n=2, ci=3, ih=5, iw=37, co=6, kernel_size=3, stride=2)
LONG = ConvTranspose2dSpec(n=1, ci=48, ih=1, iw=300, co=21, kernel_size=(1, 4), stride=(1, 2), padding=(0, 1))
ONE_ROW = ConvTranspose2dSpec(n=2, ci=64, ih=7, iw=64, co=5, kernel_size=2, stride=2)


def test_spaces_are_the_files_of_schedules():
    assert [space.name for space in spaces()] == [
        "cuda_direct",
        "cuda_shared",
        "cuda_tensor",
        "llvm_amx",
        "llvm_amx_taps",
        "llvm_channels",
        "llvm_columns",
        "llvm_depthwise",
        "llvm_dot",
        "llvm_taps",
    ]
    assert all(space.name.startswith(f"{space.target_kind}_") for space in spaces())


def test_vector_length_and_registers_come_from_the_target():
    spec = resolve(["dcgan/4"])[0].spec
    for target, lanes, registers in ((V2, 4, 16), (V3, 8, 16), (V4, 16, 32)):
        found = choices(spec, target)
        assert max(choice.layout.vector_lanes for choice in found) == lanes
        for choice in found:
            layout = choice.layout
            accumulators = layout.co_block * layout.row_block * layout.column_block // layout.vector_lanes
            assert accumulators < registers


def test_few_channels_take_columns_or_taps_last_and_small_images_take_channels():
    for name, expected in {
        "dcgan/2": "llvm_channels",
        "dcgan/5": "llvm_taps",
        "fcn8s/up8": "llvm_columns",
        "bilinear/depthwise": "llvm_columns",
    }.items():
        assert default_choice(resolve([name])[0].spec, V4).space.name == expected


def test_choices_are_ordered_by_estimated_cycles():
    cycles = [choice.cycles for choice in choices(ODD, V4)]
    assert cycles == sorted(cycles)
    assert len(cycles) > 10


def test_a_target_without_a_space_is_refused(monkeypatch):
    monkeypatch.setattr(space_module, "spaces", lambda: ())
    with pytest.raises(BuildError, match=r"no schedule space applies to n2_ci6.* on llvm:"):
        default_choice(ODD, V4)


@pytest.mark.parametrize("lanes", ["co", "ow"])
def test_each_space_is_exact_in_several_layouts(lanes, tmp_path):
    found = along(lanes, ODD)
    for number, choice in enumerate(found[:: len(found) // 4]):
        assert is_exact(ODD, choice, tmp_path / str(number)), choice


@pytest.mark.parametrize(
    ("spec", "lanes", "changes"),
    [
        (BORDERED, "co", {}),
        (BORDERED, "co", {"row_chunk": 2}),
        (BORDERED, "co", {"taps": "outer"}),
        (BORDERED, "co", {"taps": "outer", "row_chunk": 3}),
        (BORDERED, "co", {"column_block": 4}),
        (BORDERED, "ow", {}),
        (BORDERED, "ow", {"row_chunk": 2}),
        (ONE_ROW, "ow", {"row_chunk": 2}),
        (ONE_ROW, "co", {"row_chunk": 2}),
        (BORDERED, "co", {"row_chunk": 4, "gathers": True}),
        (BORDERED, "ow", {"row_chunk": 4, "gathers": True}),
        (ONE_ROW, "co", {"row_chunk": 2, "gathers": True}),
        (ONE_ROW, "ow", {"row_chunk": 2, "gathers": True}),
        (STRIDED, "co", {"row_chunk": 2, "gathers": True}),
        (STRIDED, "ow", {"row_chunk": 6, "gathers": True}),
        (BORDERED, "ow", {"row_chunk": 4, "streams": True}),
        (WIDE, "ow", {"column_block": 16, "vector_lanes": 4}),
        (WIDE, "ow", {"column_block": 16, "vector_lanes": 4, "row_chunk": 6, "gathers": True}),
        (WIDE, "ow", {"row_chunk": 6, "streams": True}),
        (ONE_ROW, "ow", {"row_chunk": 2, "streams": True}),
        (STRIDED, "ow", {"row_chunk": 6, "streams": True}),
        (BORDERED, "co", {"row_chunk": 2, "by_chunk": True}),
        (BORDERED, "ow", {"row_chunk": 4, "by_chunk": True}),
        (MANY, "co", {"row_chunk": 3, "by_chunk": True}),
        (MANY, "ow", {"row_chunk": 2, "by_chunk": True}),
        (STRIDED, "ow", {"row_chunk": 1, "by_chunk": True}),
        (ODD, "co", {"row_chunk": 2, "by_chunk": True}),
        (ODD, "ow", {"row_chunk": 2, "by_chunk": True}),
        (GROUPED, "co", {"row_chunk": 7, "by_chunk": True}),
        (GROUPED, "ow", {"row_chunk": 7, "by_chunk": True}),
        (replace(GROUPED, groups=1), "ow", {"row_chunk": 7, "by_chunk": True}),
        (BORDERED, "co", {"column_block": 2, "column_chunk": 4}),
        (BORDERED, "co", {"column_block": 2, "row_chunk": 4, "column_chunk": 8}),
        (WIDE, "ow", {"column_block": 16, "vector_lanes": 4, "column_chunk": 16}),
        (ONE_ROW, "ow", {"row_chunk": 2, "column_block": 16, "vector_lanes": 4, "column_chunk": 32}),
    ],
)
def test_each_decision_is_exact_at_the_border(spec, lanes, changes, tmp_path):
    first = along(lanes, spec)[0]
    layout = laid_out(first.layout, spec, {"row_chunk": 1, **changes})
    assert is_exact(spec, replace(first, layout=layout), tmp_path / "kernel"), layout


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("lanes", "column_block"), [("co", 4), ("ow", 16)])
@pytest.mark.parametrize("taps", [3, 4])
def test_windows_by_chunk_are_exact_and_sum_to_the_same_bits(lanes, column_block, taps, memory_format, tmp_path):
    """With one band and with two, transposed in registers and not."""
    spec = ConvTranspose2dSpec(
        n=2, ci=24, ih=11, iw=37, co=9, kernel_size=taps, stride=2, padding=1, memory_format=memory_format
    )
    assert len(bands(spec)) == 5 - taps
    first = along(lanes, spec)[0]
    plain = Layout(lanes, 16, row_block=1, column_block=column_block, vector_lanes=8, row_chunk=3)
    choice = replace(first, layout=replace(plain, by_chunk=True))
    assert_exact_and_of_the_same_bits(spec, (replace(first, layout=plain), choice), tmp_path)
    script = lower_choice(spec, HOST, choice).module["convt"].script()
    windows = re.findall(r"window\w* = T.alloc_buffer\(\(1, (\d+)", script)
    assert sorted(map(int, windows)) == sorted(3 + band.rows_beside for band in bands(spec))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_large_images_are_copied_by_chunk_where_that_was_measured(memory_format):
    spec = ConvTranspose2dSpec(
        n=1, ci=64, ih=128, iw=128, co=3, kernel_size=4, stride=2, padding=1, memory_format=memory_format
    )
    assert default_choice(spec, V3).layout.by_chunk
    assert not default_choice(replace(spec, ci=16), V3).layout.by_chunk
    large = replace(spec, ih=256, iw=256)
    assert default_choice(large, V4).layout.by_chunk
    assert not any(choice.layout.by_chunk for choice in choices(replace(spec, ci=4), V4, "llvm_columns"))


def test_large_images_that_are_copied_in_order_are_copied_by_chunk():
    spec = ConvTranspose2dSpec(
        n=1, ci=40, ih=128, iw=128, co=96, kernel_size=(3, 1), padding=(1, 0), memory_format="channels_last"
    )

    def cheapest(spec):
        found = (choice.layout for choice in choices(spec, V4, "llvm_channels"))
        return next(layout for layout in found if not reads_input(spec, layout))

    assert cheapest(spec).by_chunk and not cheapest(replace(spec, ih=32)).by_chunk


def test_positions_of_one_row_are_read_as_they_are_where_tiles_of_several_would_be_copied():
    """They share pages: 64 to 16 channels took 0.89 of the time all the same (ERFNet's last but one)."""
    spec = ConvTranspose2dSpec(
        n=1,
        ci=64,
        ih=128,
        iw=256,
        co=16,
        kernel_size=3,
        stride=2,
        padding=1,
        output_padding=1,
        memory_format="channels_last",
    )
    layout = default_choice(spec, V4).layout
    assert (layout.lanes, layout.row_block) == ("co", 1) and reads_input(spec, layout)


def test_images_that_no_cache_holds_are_transposed_by_chunk():
    spec = ConvTranspose2dSpec(
        n=1, ci=48, ih=320, iw=320, co=8, kernel_size=3, stride=2, padding=1, memory_format="channels_last"
    )
    assert default_choice(spec, V4).layout.by_chunk


def test_blocks_of_channels_that_share_lines_cost_lanes_along_columns():
    spec = ConvTranspose2dSpec(n=1, ci=770, ih=24, iw=32, co=128, kernel_size=4, stride=2, padding=1)
    assert default_choice(replace(spec, memory_format="channels_last"), V4).layout.lanes == "co"


def test_the_last_tile_of_a_row_costs_what_its_scalars_do():
    """48 of 64 columns, and then 16, would load eight scalars for eight sums; 32 and 32 do not."""
    spec = ConvTranspose2dSpec(n=1, ci=256, ih=32, iw=64, co=128, kernel_size=4, stride=2, padding=1)
    found = [choice for choice in choices(spec, V4, "llvm_columns") if not choice.layout.by_chunk]
    assert min(found, key=lambda choice: choice.cycles).layout.column_block == 32


def test_chunks_are_of_a_group_whole_or_for_the_first_cache():
    """Where groups are enough for threads to share, and others are not."""

    def chunks(**changes):
        spec = ConvTranspose2dSpec(n=1, ci=64, ih=64, iw=64, co=64, kernel_size=4, stride=2, padding=1)
        spec = replace(spec, **changes)
        return {choice.layout.row_chunk for choice in choices(spec, V4, "llvm_columns") if choice.layout.by_chunk}

    assert chunks(groups=64) == {64}
    assert chunks() == {1, 4}
    assert chunks(groups=8) == {12, 32}
    assert chunks(n=4) == {1, 16}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_task_copies_the_channels_of_its_group(memory_format):
    spec = ConvTranspose2dSpec(
        n=1, ci=96, ih=96, iw=96, co=20, kernel_size=2, stride=2, groups=2, memory_format=memory_format, padding=1
    )
    choice = next(choice for choice in choices(spec, V3, "llvm_columns") if choice.layout.by_chunk)
    script = lower_choice(spec, V3, choice).module["convt"].script()
    assert re.findall(r"window\w* = T.alloc_buffer\(\(1, \d+, (\d+), ", script) == ["48"]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("lanes", "co_block", "column_block", "shared"),
    [("co", 24, 4, True), ("co", 8, 4, False), ("ow", 21, 16, False), ("ow", 7, 16, True)],
)
def test_chunks_of_columns_are_exact_and_sum_to_the_same_bits(
    lanes, co_block, column_block, shared, memory_format, monkeypatch, tmp_path
):
    """Of one task, whose loop is simplified away, and of several; shared by threads or not."""
    monkeypatch.setattr(schedule, "PARALLEL_CYCLES", 0 if shared else math.inf)
    spec = replace(LONG, memory_format=memory_format)
    first = along(lanes, spec)[0]
    plain = Layout(lanes, co_block, row_block=1, column_block=column_block, vector_lanes=8, row_chunk=1)
    layouts = [replace(plain, column_chunk=tiles * column_block) for tiles in (0, 1, 5)]
    assert_exact_and_of_the_same_bits(spec, [replace(first, layout=layout) for layout in layouts], tmp_path)


@pytest.mark.parametrize("lanes", ["co", "ow"])
@pytest.mark.parametrize("co_block", [24, 8])
def test_chunks_of_columns_are_tasks_that_threads_share(lanes, co_block, monkeypatch):
    monkeypatch.setattr(schedule, "PARALLEL_CYCLES", 0)
    first = along(lanes, LONG)[0]
    layout = Layout(lanes, co_block, row_block=1, column_block=16, vector_lanes=8, row_chunk=1, column_chunk=80)
    # Of 19 tiles one or two, which reach the border or are not filled, are no part of a chunk's five.
    tasks = layout.blocks(LONG) * 4
    lowered = lower_choice(LONG, HOST, replace(first, layout=layout)).module["convt"].script()
    assert f"in T.parallel({tasks})" in lowered


@pytest.mark.parametrize("memory_format", FORMATS)
def test_long_rows_are_in_chunks_that_the_second_cache_holds_and_threads_share(memory_format):
    few = ConvTranspose2dSpec(
        n=1, ci=96, ih=1, iw=2000, co=2, kernel_size=(1, 8), stride=(1, 4), memory_format=memory_format
    )
    layout = choices(few, V3, "llvm_columns")[0].layout
    assert layout.blocks(few) == 1 and layout.column_chunks(few) >= 4
    many = replace(few, ci=128, iw=8192, co=64)
    layout = default_choice(many, V3).layout
    assert 0 < (layout.column_chunk - layout.column_block) * many.ci * 4 < V3.cache_bytes // 2
    several_rows = replace(many, ih=64, iw=128)
    assert not default_choice(several_rows, V3).layout.column_chunk


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_phases_in_a_loop_sum_to_the_bits_of_unrolled_ones(dtype):
    """In a loop there is a condition between a product and its sum, whose one rounding must not become two."""
    spec = ConvTranspose2dSpec(
        n=1, ci=12, ih=2, iw=39, co=68, kernel_size=(3, 5), stride=(5, 4), padding=(1, 5), dilation=4, groups=2,
        dtype=dtype,
    )  # fmt: skip
    inputs, outputs = normal_inputs(spec, seed=1), {}
    unit = DotLayout if choices(spec, HOST, "llvm_dot") else Layout
    for unrolls in (True, False):
        choice = next(
            choice
            for choice in choices(spec, HOST)
            if choice.layout.unrolls_phases(spec) == unrolls and type(choice.layout) is unit
        )
        outputs[unrolls] = build(spec, choice=choice)(*inputs)
    assert torch.equal(bits(outputs[True]), bits(outputs[False]))


def test_of_16_registers_a_tile_leaves_one_beside_those_of_a_step():
    used = set()
    for choice in choices(resolve(["dcgan/4"])[0].spec, V3):
        layout = choice.layout
        rows = layout.row_block * layout.image_block
        positions, channels = rows * layout.column_block, layout.co_block
        along, across = (channels, positions) if layout.lanes == "co" else (positions, channels)
        vectors = along // layout.vector_lanes
        used.add(vectors * across * layout.phases + vectors + 1)
    assert max(used) == 15


@pytest.mark.parametrize(("columns", "waits"), [(32, True), (48, False)])
def test_a_last_tile_of_few_sums_waits_for_each(columns, waits, monkeypatch):
    # Tiles of 3 channels by 3 vectors, of which the last has one where there are 32 columns.
    spec = replace(resolve(["unet/up1"])[0].spec, iw=columns)

    def cycles():
        found = choices(spec, V3, "llvm_columns")
        same = (c for c in found if (c.layout.co_block, c.layout.column_block, c.layout.phases) == (3, 24, 1))
        return next(same).cycles

    whole = cycles()
    monkeypatch.setattr(cost, "FMA_LATENCY", 0)
    assert (cycles() < whole) == waits


def test_taps_of_a_block_come_from_memory_once_where_all_rows_follow():
    found = choices(resolve(["pose/1"])[0].spec, V3, "llvm_channels")
    tile = ("co", 16, 1, 6, 1, "inner", 1)
    cycles = {choice.layout.row_chunk: choice.cycles for choice in found if choice.layout.shape == tile}
    assert cycles[1] > 1.2 * cycles[8]


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_weights_that_no_cache_keeps_are_read_once(memory_format):
    """67 MB of them: all rows are one chunk, where each of several chunks would read them all."""
    sizes = {"kernel_size": 4, "stride": 2, "padding": 1, "memory_format": memory_format}
    spec = ConvTranspose2dSpec(n=1, ci=2048, ih=8, iw=6, co=512, **sizes)
    layout = default_choice(spec, V4).layout
    assert [layout.chunk(band) for band in bands(spec)] == [8]


def test_tiles_keep_the_sums_of_all_column_phases_in_registers_where_the_stack_is_slow():
    """Two phases with 12 products for each sum; a tile of more positions takes as many loads, but what it puts by."""
    sizes = {"kernel_size": 2, "stride": 2, "output_padding": 1, "memory_format": "channels_last"}
    spec = ConvTranspose2dSpec(n=8, ci=12, ih=80, iw=80, co=12, **sizes)
    here, others = (default_choice(spec, target).layout for target in (ZEN4, V4))
    sums, more = (2 * layout.row_block * layout.column_block for layout in (here, others))
    assert sums < ZEN4.vector_registers < more


def test_the_last_tile_sums_no_vector_without_an_output():
    plain = along("ow", WIDE)[0]
    layout = replace(plain.layout, co_block=3, row_block=1, column_block=16, vector_lanes=4, row_chunk=1, phases=1)
    assert layout.last_vectors(WIDE) == 2
    assert layout.column_steps(WIDE) == 2.5 * 3
    assert lower_choice(WIDE, HOST, replace(plain, layout=layout)).module.script().count(_TRIMMED.format(2)) > 0
    # One tile, lanes along channels, code that would be too long.
    for others in ({"column_block": 40}, {"column_block": 40, "lanes": "co"}, {"co_block": 120}):
        other = replace(layout, **others)
        assert other.last_vectors(WIDE) == other.column_block // 4


@pytest.mark.parametrize("name", ["llvm_columns", "llvm_channels"])
def test_images_are_worked_on_one_at_a_time_where_caches_do_not_hold_all(name, monkeypatch, tmp_path):
    spec, target = MANY, Target.parse("llvm").for_dtype("float32")
    choice = choices(spec, target, name)[0]
    windows = choice.layout.window_elements(spec) * 4
    for size, apart in ((2 * windows, False), (2 * windows // 9, True), (windows // 9, False)):
        monkeypatch.setattr(Target, "cache_bytes", size)
        assert images_apart(spec, choice.layout, size, of_any_batch=False) == apart
        assert is_exact(spec, choice, tmp_path / f"{size}")
        window = re.search(r"window = T.alloc_buffer\(\((\d+),", lower_choice(spec, target, choice).module.script())
        assert window and int(window[1]) == (1 if apart else 9)
    assert not images_apart(spec.with_batch(7), choice.layout, 2 * windows // 9, of_any_batch=False)


@pytest.mark.parametrize("name", ["llvm_columns", "llvm_channels"])
def test_a_batch_of_any_size_is_shared_by_images_from_many_on(name, monkeypatch, tmp_path):
    spec = replace(MANY, n=None)
    choice = choices(spec.sized, HOST, name)[0]
    monkeypatch.setattr(Target, "cache_bytes", 2 * choice.layout.window_elements(spec.sized) * 4)
    text = lower_choice(spec, HOST, choice).module["convt"].script()
    assert f"n >= {MANY_IMAGES}" in text or f"{MANY_IMAGES} <= n" in text
    build_artifact(spec, HOST, tmp_path / "kernel", choice=choice)
    kernel = load(tmp_path / "kernel")
    for n in (0, 1, MANY_IMAGES - 1, MANY_IMAGES, MANY_IMAGES + 3):
        inputs = integer_inputs(spec.with_batch(n), seed=n)
        assert torch.equal(kernel(*inputs).double(), reference(spec.with_batch(n), *inputs))


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tile_of_several_small_images_is_exact(dtype, memory_format, tmp_path):
    spec = replace(SMALL, dtype=dtype, memory_format=memory_format)
    found = [
        choice for choice in choices(spec, HOST.for_dtype(dtype), "llvm_channels") if choice.layout.image_block > 1
    ]
    assert {choice.layout.image_block for choice in found} == {2, 3, 4, 7}
    for number, choice in enumerate(found[:: len(found) // 7]):
        assert is_exact(spec, choice, tmp_path / f"{number}")


def test_tiles_take_in_images_that_are_small_in_as_few_as_differ_in_number():
    target = Target.parse("llvm:x86-64-v4")

    def images(**changes):
        return {choice.layout.image_block for choice in choices(replace(SMALL, **changes), target, "llvm_channels")}

    assert images(n=7) == {1, 2, 3, 4, 7}
    assert images(n=17) == {1, 2, 3, 4, 5, 6, 9, 17}
    assert images(n=17, ih=5) == {1, 2, 3, 4, 5, 6, 9, 17}
    assert images(n=64, ih=6) == images(n=1) == {1}


@pytest.mark.parametrize("name", ["llvm_columns", "llvm_channels"])
@pytest.mark.parametrize("batch", [1, 4])
def test_outputs_whose_partial_sums_are_all_left_out_are_plus_zero(name, batch, tmp_path):
    # Of three rows and columns the second meet no tap.
    spec = ConvTranspose2dSpec(n=batch, ci=64, ih=1, iw=1, co=9, kernel_size=2, dilation=2, bias=False)
    assert skips_parts(spec)
    for choice in (found := choices(spec, HOST, name))[:: max(1, len(found) // 3)]:
        inputs = integer_inputs(spec, seed=2)
        build_artifact(spec, HOST, tmp_path / str(found.index(choice)), choice=choice)
        output = load(tmp_path / str(found.index(choice)))(*inputs)
        assert torch.equal(bits(output), bits(reference(spec, *inputs).float()))
        assert output[:, :, 1].count_nonzero() == output[..., 1].count_nonzero() == 0 < output.count_nonzero()


def test_rows_that_meet_the_border_alone_are_the_bias():
    # Hypothesis found that nothing of this could be built with lanes along channels.
    spec = ConvTranspose2dSpec(
        n=1,
        ci=2,
        ih=1,
        iw=1,
        co=1,
        kernel_size=(3, 1),
        stride=(3, 1),
        padding=(1, 0),
        output_padding=(2, 0),
        dilation=(2, 1),
    )
    assert [reaches(spec, band) for band in bands(spec)] == [True, False]
    for choice in choices(spec, HOST):
        assert lower_choice(spec, HOST, choice).code


def test_a_tile_has_rows_where_a_single_one_has_few_sums():
    target = Target.parse("llvm:x86-64-v4")

    def rows(co, iw, stride):
        spec = ConvTranspose2dSpec(n=1, ci=8, ih=14, iw=iw, co=co, kernel_size=4, stride=stride, padding=1)
        found = {choice.layout for choice in choices(spec, target, "llvm_columns")}
        assert all(layout.co_block == co and layout.column_block >= iw for layout in found if layout.row_block > 1)
        return {layout.row_block for layout in found}

    assert rows(1, 14, 2) == {1, 2, 3, 4, 5, 7}
    assert rows(3, 14, 2) == {1, 2}
    assert rows(4, 14, 2) == rows(1, 64, 2) == {1}


def test_outputs_for_memory_pass_the_caches():
    spec = resolve(["seed/square"])[0].spec

    def passing(spec, target=V4):
        layouts = [choice.layout for choice in choices(spec, target) if choice.layout.passes_caches]
        return [{layout.lanes for layout in layouts if getattr(layout, how)} for how in ("gathers", "streams")]

    assert passing(spec) == [{"co", "ow"}, {"ow"}]
    # Of a narrow type or in shorter vectors no vector is a cache line.
    for dtype, target in (("float16", V4), ("bfloat16", V4), ("float32", Target.parse("llvm:x86-64-v3"))):
        assert passing(replace(spec, dtype=dtype), target) == [{"co", "ow"}, set()]
    assert passing(resolve(["dcgan/4"])[0].spec) == [set(), set()]


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        *((dtype, {"gathers": True}) for dtype in ("float32", "float64", "float16", "bfloat16")),
        *((dtype, {"streams": True}) for dtype in ("float32", "float64")),
    ],
)
@pytest.mark.parametrize("offset", [0, 1, 2, 7, 8, 60, 63])
def test_rows_past_the_caches_go_to_any_address_and_nowhere_else(dtype, how, offset, tmp_path):
    spec = replace(ONE_ROW, dtype=dtype, iw=31)
    first = next(choice for choice in along("ow", spec) if choice.space.applies(spec))
    layout = laid_out(first.layout, spec, {"row_chunk": 2, **how})
    inputs = integer_inputs(spec, seed=2)
    size = math.prod(spec.output_shape) * inputs[0].element_size()
    build_artifact(spec, HOST, tmp_path / "kernel", choice=replace(first, layout=layout))
    around = np.full(size + 256, 77, np.uint8)
    start = -around.ctypes.data % 64 + offset
    output = torch.frombuffer(around, dtype=inputs[0].dtype, count=math.prod(spec.output_shape), offset=start)
    load(tmp_path / "kernel")(*inputs, out=output.view(spec.output_shape))
    assert torch.equal(output.view(spec.output_shape).double(), reference(spec, *inputs))
    assert (around[:start] == 77).all()
    assert (around[start + size :] == 77).all()


def test_a_stored_candidate_is_found_whether_it_streams_or_not():
    spec = resolve(["seed/square"])[0].spec
    found = choices(spec, V4, "llvm_columns")
    for streams in (True, False):
        choice = next(choice for choice in found if choice.layout.streams == streams)
        assert find_choice(spec, V4, choice.candidate) == choice
        unknown = {**choice.candidate.layout, "another": 1}
        assert find_choice(spec, V4, replace(choice.candidate, layout=unknown)) is None


@pytest.mark.no_cover
def test_any_batch_size_is_taken_for_few_images_that_outgrow_the_caches():
    k75, square, small = (
        replace(resolve([name])[0].spec, n=None) for name in ("kernelbench/75", "seed/square", "dcgan/4")
    )
    # 12.6, 2.7 and 0.3 MB an image.
    for spec, n in ((k75, 2), (square, 7), (small, 1)):
        assert ranked_choices(spec, V4) == choices(spec.with_batch(n), V4)
    assert default_choice(k75, V4).layout.streams
    for spec, target in ((replace(k75, dtype="float16"), V4), (k75, V3), (replace(k75, co=512, groups=1), V4)):
        assert ranked_choices(spec, target) == choices(spec.sized, target)
    assert ranked_choices(k75.with_batch(3), V4) == choices(k75.with_batch(3), V4)


@pytest.mark.skipif(not HOST.joins_vectors, reason="no vector of this processor is a cache line")
def test_any_batch_size_passes_the_caches_where_it_outgrows_them(monkeypatch, tmp_path):
    spec = replace(ONE_ROW, n=None)
    monkeypatch.setattr(outputs, "PAST_CACHES_BYTES", 2 * spec.sized.size_bytes)
    first = along("ow", spec.sized)[0]
    choice = replace(first, layout=laid_out(first.layout, spec, {"row_chunk": 2, "streams": True}))
    text = lower_choice(spec, HOST, choice).module["convt"].script()
    least = -(-2 * spec.sized.size_bytes // (4 * math.prod(spec.sized.output_shape)))
    assert re.search(rf"n >= {least}\b", text)
    build_artifact(spec, HOST, tmp_path / "kernel", choice=choice)
    kernel = load(tmp_path / "kernel")
    for n in range(least + 2):
        inputs = integer_inputs(spec.with_batch(n), seed=n)
        assert torch.equal(kernel(*inputs).double(), reference(spec.with_batch(n), *inputs))


@hypothesis.given(
    spec=drawn_specs(dtypes=["float32", "float32", "float64", "float16", "bfloat16"]),
    numbers=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    batch=st.integers(1, 3),
)
@hypothesis.settings(max_examples=60, deadline=None)
@pytest.mark.no_cover
def test_every_schedule_batch_size_and_memory_format_gives_the_same_bits(spec, numbers, batch):
    """Of one unit, that is; also those that go past the caches, which otherwise larger outputs do."""
    inputs = normal_inputs(spec.with_batch(3), seed=numbers[0])
    outputs, units = [], set()
    for number, n in zip(numbers, (3, batch), strict=True):
        sized = replace(spec.with_batch(n), memory_format=[spec.memory_format, CONTIGUOUS][len(outputs)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost, "PAST_CACHES_BYTES", 0)
            found = [choice for choice in choices(sized, HOST) if not units or unit_of(choice) in units]
        choice = found[number % len(found)]
        units.add(unit_of(choice))
        kernel = build(sized, choice=choice)
        whole = torch.full((3 * math.prod(sized.output_shape[1:]) + 256,), 77, dtype=inputs[0].dtype)
        output = whole[128 : 128 + math.prod(sized.output_shape)]
        shape = [sized.output_shape[axis] for axis in MEMORY_ORDER[sized.output_axes]]
        output = output.view(shape).movedim(-1, 1) if sized.output_axes == "nhwc" else output.view(shape)
        kernel(inputs[0][:n], *inputs[1:], out=output)
        assert (whole[:128] == 77).all()
        assert (whole[128 + output.numel() :] == 77).all()
        outputs.append(output)
    assert torch.equal(bits(outputs[0][:batch]), bits(outputs[1]))


def along(lanes, spec):
    """Choices whose lanes run along channels or columns, and that sum taps with channels."""
    found = (choice for choice in choices(spec, HOST) if choice.layout.lanes == lanes)
    return [choice for choice in found if not isinstance(choice.layout, TapLayout)]


def unit_of(choice):
    """What sums: those for pairs of bfloat16 round in ways of their own, and channels may come before taps."""
    return type(choice.layout) if isinstance(choice.layout, DotLayout | TileLayout | TapLayout) else Layout


def laid_out(layout, spec, changes):
    """A layout of one row, changed; with ``streams`` its vectors are cache lines."""
    layout = replace(layout, row_block=1, **changes)
    if not layout.streams:
        return layout
    if not HOST.joins_vectors:
        pytest.skip("no vector of this processor is a cache line")
    return replace(layout, column_block=16, vector_lanes=64 // DTYPE_BYTES[spec.dtype])


def is_exact(spec, choice, directory):
    inputs = integer_inputs(spec, seed=2)
    build_artifact(spec, HOST, directory, choice=choice)
    return bool((load(directory)(*inputs).double() == reference(spec, *inputs)).all())


def assert_exact_and_of_the_same_bits(spec, found, directory):
    inputs, answers = normal_inputs(spec, seed=3), []
    for number, choice in enumerate(found):
        assert is_exact(spec, choice, directory / str(number)), choice
        answers.append(bits(load(directory / str(number))(*inputs)))
    assert all(torch.equal(answers[0], answer) for answer in answers[1:])


def test_what_is_worth_measuring_is_the_default_and_others_unlike_it():
    spec = ConvTranspose2dSpec(n=4, ci=32, ih=8, iw=8, co=32, kernel_size=4, stride=2, padding=1, dtype="bfloat16")
    target = Target.parse("cuda:sm_90")
    found = varied_choices(spec, target, 6)
    assert found[0] == default_choice(spec, target)
    assert len({(choice.space.name, choice.layout.shape) for choice in found}) == 6
    assert [choice.cycles for choice in found[1:]] == sorted(choice.cycles for choice in found[1:])
    assert varied_choices(spec, target, 0) == []
