"""Layouts: what they count must be what their loops do."""

import itertools
from dataclasses import replace

import pytest

from convt_tvm.errors import SpecError
from convt_tvm.layout import Layout, Window, bands, partial_sum, sums_in_parts, sums_taps_first
from convt_tvm.spec import ConvTranspose2dSpec


def spec_of(k, s, p, d):
    return ConvTranspose2dSpec(
        n=1, ci=2, ih=5, iw=4, co=3, kernel_size=k, stride=s, padding=p, dilation=d, memory_format="channels_last"
    )  # fmt: skip


@pytest.mark.parametrize("row_block", [1, 2, 3])
def test_steps_are_those_that_read_the_image(row_block):
    for k, s, p, d in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 3), (1, 2, 3)):
        try:
            spec = spec_of(k, s, p, d)
        except SpecError:
            continue
        layout = Layout("co", 4, row_block, 12, 4, row_block * 2)
        for band in bands(spec):
            expected = sum(
                any(0 <= row + phase.base - tap * phase.input_step < spec.ih for row in range(first, first + row_block))
                for phase in band.phases
                for tap in range(phase.taps)
                for first in range(0, layout.rows(band), row_block)
            )
            assert band.row_steps(layout, spec.ih) == expected
        # Tiles of columns multiply with the image alone; phases shorter than the longest fill them up.
        for columns in range(1, max(phase.count for phase in spec.axes[1].phases) + 1):
            layout = replace(layout, row_block=1, column_block=columns)
            reads = [
                [
                    0 <= column + phase.base - tap * phase.input_step < spec.iw
                    for phase in spec.axes[1].phases
                    for tap in range(phase.taps)
                    for column in range(first, first + columns)
                ]
                for first in range(0, layout.columns(spec), columns)
            ]
            left, right = layout.border_tiles(spec)
            assert all(map(all, reads[left : len(reads) - right]))
            assert layout.skips_columns(spec) == (left + right > 0)
            assert layout.column_steps(spec) * columns == pytest.approx(sum(map(sum, reads)))
        surplus = round(layout.column_steps(spec) * columns) - spec.axes[1].products
        assert surplus == 0 if s == 1 else 0 <= surplus <= spec.kernel_size[1]


def test_border_tiles_are_no_more_than_reach_the_border():
    # Taps read columns -1 to 8 of an image of 8: in the first tile and in the last, which may be the same.
    spec = ConvTranspose2dSpec(n=1, ci=4, ih=8, iw=8, co=16, kernel_size=3, padding=1)
    tiles = {columns: Layout("co", 16, 1, columns, 16, 1).border_tiles(spec) for columns in (1, 2, 3, 4, 8)}
    assert tiles == {1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (1, 1), 8: (1, 0)}
    assert Layout("co", 16, 1, 3, 16, 1).border_tiles(replace(spec, kernel_size=(3, 1), padding=(1, 0))) == (0, 1)


def test_a_window_holds_no_border_that_tiles_leave_out():
    spec = ConvTranspose2dSpec(n=1, ci=4, ih=8, iw=8, co=16, kernel_size=3, padding=1)
    layout = Layout("co", 16, 1, 4, 16, 1)
    assert Window.of(spec, layout) == Window(0, 0, 8, 8, (0, 8), (0, 8))
    assert Window.of(spec, replace(layout, row_block=2)) == Window(-1, 0, 10, 8, (1, 9), (0, 8))
    assert Window.of(spec, replace(layout, taps="outer")) == Window(0, -1, 8, 10, (0, 8), (1, 9))
    for whole in (replace(layout, lanes="ow"), replace(layout, taps="plain")):
        assert Window.of(spec, whole) == Window(-1, -1, 10, 10, (1, 9), (1, 9))


def test_chunks_cover_a_band_in_whole_tiles():
    band = bands(spec_of(3, 2, 0, 1))[0]
    for row_block, tiles in itertools.product((1, 2, 3), (1, 2, 3, 9)):
        layout = Layout("co", 4, row_block, 2, 2, row_block * tiles)
        assert layout.rows(band) % layout.chunk(band) == 0 == layout.chunk(band) % row_block
        assert band.rows <= layout.rows(band) < band.rows + layout.chunk(band)


@pytest.mark.parametrize(
    ("ci", "co", "kernel_size", "expected"),
    [
        (256, 16, 1, (1, 256, 1)),
        (3, 16, 5, (3, 3, 3)),
        (8, 16, 5, (1, 8, 3)),
        (128, 16, 5, (1, 128, 1)),
        (512, 16, 4, (1, 256, 1)),
        (509, 16, 4, (1, 509, 1)),
        (8, 3, 5, (1, 8, 3)),
        (128, 3, 5, (1, 32, 3)),
    ],
)
def test_partial_sums_are_a_few_times_the_root_of_all_products_long(ci, co, kernel_size, expected):
    spec = ConvTranspose2dSpec(n=1, ci=ci, ih=9, iw=9, co=co, kernel_size=kernel_size, stride=2)
    band = bands(spec)[0]
    assert partial_sum(spec, band) == expected
    assert sums_in_parts(spec, band) == (expected != (band.taps, ci, -(-kernel_size // 2)))


def test_sums_take_taps_first_where_channels_are_few():
    specs = [ConvTranspose2dSpec(n=1, ci=4, ih=9, iw=9, co=co, kernel_size=5, groups=4) for co in (4, 28, 32, 400)]
    assert [sums_taps_first(spec) for spec in specs] == [True, True, False, False]


def test_json_holds_the_whole_layout():
    for layout in (Layout("co", 32, 1, 6, 16, 8, taps="outer"), Layout("ow", 13, 1, 32, 16, 4, 2, gathers=True)):
        assert Layout.from_json(layout.to_json()) == layout
        assert "streams" not in layout.to_json()
        streaming = replace(layout, gathers=False, streams=True)
        assert Layout.from_json(streaming.to_json()) == streaming
