"""Layouts: what they count must be what their loops do."""

import itertools
from dataclasses import replace

import pytest

from convt_tvm.errors import SpecError
from convt_tvm.layout import Layout, bands, partial_sum, sums_in_parts, sums_taps_first
from convt_tvm.spec import ConvTranspose2dSpec


def spec_of(k, s, p, d):
    return ConvTranspose2dSpec(
        n=1, ci=2, ih=5, iw=4, co=3, kernel_size=k, stride=s, padding=p, dilation=d, bias=False
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
        # One tile of columns multiplies with the image alone; phases shorter than the longest fill it up.
        layout = replace(layout, column_block=max(phase.count for phase in spec.axes[1].phases))
        assert layout.skips_columns(spec)
        surplus = layout.column_steps(spec) * layout.column_block - spec.axes[1].products
        assert surplus == 0 if s == 1 else 0 <= surplus <= spec.kernel_size[1]


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
        (512, 16, 4, (1, 128, 1)),
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
