"""Tile units: layouts, lowering, the operating system's leave, and answers where there is one."""

import ctypes
import errno
from dataclasses import replace

import pytest
import torch

import convt_tvm as ct
from convt_tvm import tile_unit
from convt_tvm.compiler import lower_choice
from convt_tvm.errors import IncompatibleMachineError
from convt_tvm.layout import bands
from convt_tvm.machine import Machine, machine
from convt_tvm.processor import LEVELS, TILE_FEATURES, host_features
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.runtime import load
from convt_tvm.space import choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.tile_layout import TileLayout

TILES = Target("llvm", "x86_64", (*LEVELS["x86-64-v4"], *TILE_FEATURES))
WITHOUT = Target.parse("llvm:x86-64-v4")
here = pytest.mark.skipif(not host_features() >= TILE_FEATURES, reason="this processor has no tile unit (AMX)")


def make(**changes):
    given = {"n": 1, "ci": 40, "ih": 5, "iw": 7, "co": 40, "kernel_size": 4, "stride": 2, "padding": 1}
    return ConvTranspose2dSpec(**(given | {"dtype": "bfloat16"} | changes))


def tile_choices(spec, target=TILES):
    return choices(spec.sized, target, "llvm_amx")


def test_is_for_bfloat16_and_targets_that_say_so():
    assert choices(make(), TILES)[0].space.name == "llvm_amx"
    assert not tile_choices(make(), WITHOUT)
    for dtype in ("float32", "float16"):
        assert not tile_choices(make(dtype=dtype))
    # One channel in a group would use a five-hundredth of a product.
    assert choices(make(ci=64, co=64, groups=64), TILES)[0].space.name != "llvm_amx"


def test_other_dtypes_need_no_tile_unit():
    assert TILES.for_dtype("bfloat16") == TILES
    assert TILES.for_dtype("float32") == TILES.for_dtype("float16") == WITHOUT
    assert Target.parse("cuda:sm_80").for_dtype("float32") == Target.parse("cuda:sm_80")


def test_a_machine_keeps_its_key():
    found = machine()
    with_tiles, without = (
        replace(found, features=tuple(sorted({*found.features, *TILE_FEATURES} - removed)))
        for removed in (frozenset(), TILE_FEATURES)
    )
    assert isinstance(found, Machine)
    assert with_tiles.key == without.key
    assert replace(found, features=()).key != without.key


def test_a_row_shares_its_border_with_the_next():
    layout = tile_choices(make())[0].layout
    assert isinstance(layout, TileLayout)
    window = layout.window(make())
    # Columns -1 to 7 are read, and -1 of one row is 7 of the row before.
    assert (window.first_column, window.width, layout.pitch(make())) == (-1, 9, 8)
    # 40 channels in three tiles of 14.
    assert layout.packed_shape(make()) == (1, 4, 4, 2, 42 * 20)
    assert layout.packed_dtype(make()) == "bfloat16"


READ_AS_IT_IS = make(ci=64, ih=4, iw=16, kernel_size=2, padding=0, memory_format="channels_last")

ONE_ROW = make(ih=1, iw=1001, kernel_size=(1, 4), stride=(1, 2), padding=(0, 1))
READ_IN_CHUNKS = replace(READ_AS_IT_IS, ih=1, iw=1024)


@pytest.mark.parametrize(
    "spec",
    [
        *(make(**changes) for changes in ({}, {"kernel_size": 2, "stride": 3}, {"ci": 33, "padding": 3})),
        make(iw=1, ih=1),
        make(memory_format="channels_last"),
        READ_AS_IT_IS,
        replace(READ_AS_IT_IS, padding=1),
        replace(READ_AS_IT_IS, ih=5, padding=(1, 0)),
        replace(READ_AS_IT_IS, ih=5, iw=10),
        ONE_ROW,
        replace(ONE_ROW, memory_format="channels_last"),
        READ_IN_CHUNKS,
        replace(READ_IN_CHUNKS, iw=1021),  # whose last chunk is not full
    ],
)
def test_tiles_read_nothing_outside_the_window(spec):
    for choice in tile_choices(spec):
        layout, pitch = choice.layout, choice.layout.pitch(spec)
        first = layout.window(spec)
        size = spec.ih * spec.iw if layout.reads_input(spec) else layout.image_rows(spec) * pitch
        for band in bands(spec):
            last = (layout.rows(band) - layout.chunk(band)) * pitch + layout.columns(spec) - layout.chunk_columns(spec)
            end = last + layout.chunk_tiles(spec, band) * layout.positions
            if layout.reads_input(spec):
                end = last + max(layout.positions, layout.chunk_positions(spec, band))
            for row in band.phases:
                for column in spec.axes[1].phases:
                    if row.taps and column.taps:
                        reads = [
                            (row.base - u * row.input_step - first.first_row) * pitch
                            + column.base
                            - v * column.input_step
                            - first.first_column
                            for u in range(row.taps)
                            for v in range(column.taps)
                        ]
                        assert min(reads) >= 0
                        assert max(reads) + end <= size


def test_long_rows_are_shared_in_chunks_of_columns():
    """So many that all threads have some, and that the sums of each stay in a quarter of the second cache."""
    for spec in (ONE_ROW, replace(ONE_ROW, memory_format="channels_last"), READ_IN_CHUNKS):
        found = tile_choices(spec)
        assert all(choice.layout.column_chunks(spec) * choice.layout.blocks(spec) >= 3 for choice in found)
    assert all(choice.layout.reads_input(READ_IN_CHUNKS) for choice in tile_choices(READ_IN_CHUNKS))
    for ih in (1, 2, 300):
        spec = make(ih=ih, iw=40_000)
        band = bands(spec)[0]
        for layout in (choice.layout for choice in tile_choices(spec)):
            sums = 2 * layout.co_block * layout.chunk_tiles(spec, band) * layout.positions
            assert 0 < 4 * sums <= TILES.cache_bytes // 4
    assert not any(choice.layout.column_chunk for choice in tile_choices(make(ih=64, iw=100)))


@pytest.mark.parametrize("spec", [make(), make(memory_format="channels_last"), READ_AS_IT_IS, ONE_ROW])
def test_sums_are_tile_products(spec):
    text = str(lower_choice(spec, TILES, tile_choices(spec)[0]).module["convt"])
    names = ("ldtilecfg", "tilezero", "tileloadd64", "tdpbf16ps", "tilestored64", "tilerelease")
    assert [name for name in names if f"llvm.x86.{name}" not in text] == []
    assert "acc0_local[" not in text


def test_the_input_itself_is_read_where_no_tile_reaches_beyond_it():
    chunks = {
        choice.layout.row_chunk for choice in tile_choices(READ_AS_IT_IS) if choice.layout.reads_input(READ_AS_IT_IS)
    }
    assert chunks == {1, 2, 4}
    uneven = replace(READ_AS_IT_IS, iw=20)
    for layout in (choice.layout for choice in tile_choices(uneven)):
        # A tile that begins earlier still needs as many positions before the end of its chunk.
        whole = uneven.ih % layout.row_chunk == 0
        assert layout.reads_input(uneven) == (whole and layout.positions <= 20 * layout.row_chunk)
    others = ({"output_padding": 1}, {"ci": 65}, {"iw": 3}, {"kernel_size": 3}, {"memory_format": "contiguous_format"})
    for changes in others:
        spec = replace(READ_AS_IT_IS, **changes)
        assert tile_choices(spec)
        assert not any(choice.layout.reads_input(spec) for choice in tile_choices(spec))


@pytest.mark.parametrize(
    ("code", "why"), [(errno.EPERM, "Operation not permitted"), (errno.ENOSPC, "signal stack is too small")]
)
def test_refusal_says_why(monkeypatch, code, why):
    class Refusing:
        def __init__(self, *_, **__):
            pass

        def syscall(self, *_):
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(tile_unit.ctypes, "CDLL", Refusing)
    with pytest.raises(IncompatibleMachineError, match=rf"tile registers \(AMX\): .*{why}.*'llvm:x86-64-v4'"):
        tile_unit.require_tiles()


@here
@pytest.mark.parametrize(
    "spec",
    [
        make(),
        make(n=None, ci=33, co=21, kernel_size=3, padding=0),  # taps differ, steps and blocks are filled up
        make(n=2, ci=12, co=70, groups=2, kernel_size=(2, 5), stride=(3, 2), dilation=(2, 1), bias=False),
        make(ci=3, co=1, iw=1, stride=5, kernel_size=2, output_padding=3),
        make(memory_format="channels_last"),
        make(n=None, ci=33, co=21, kernel_size=3, padding=0, memory_format="channels_last"),
        make(n=2, ci=12, co=70, groups=2, stride=(3, 2), dilation=(2, 1), bias=False, memory_format="channels_last"),
        replace(READ_AS_IT_IS, n=2, groups=2),
        replace(READ_AS_IT_IS, n=2, ih=5, iw=10),  # a last tile that begins earlier
        replace(ONE_ROW, n=None),
        replace(ONE_ROW, n=2, ci=12, groups=2, memory_format="channels_last"),
        replace(ONE_ROW, n=2, ih=2, kernel_size=3, output_padding=(0, 1)),  # two rows, in several bands
        replace(READ_IN_CHUNKS, n=2, iw=1000),
    ],
    ids=lambda spec: spec.name,
)
def test_answers_are_exact(spec):
    found = tile_choices(spec, Target.parse("llvm"))
    sized = spec.with_batch(3) if spec.n is None else spec
    inputs = integer_inputs(sized, 0)
    for choice in (found[0], found[-1]):
        kernel = ct.build(spec, choice=choice)
        packed = kernel.pack(inputs[1])
        assert packed.dtype == torch.bfloat16
        out = torch.full(sized.output_shape, torch.nan, dtype=torch.bfloat16)
        kernel(inputs[0], packed, inputs[2], out=out)
        assert torch.equal(out.double(), reference(sized, *inputs).double())


@here
def test_an_artifact_says_that_it_needs_tiles(tmp_path, monkeypatch):
    kernel = ct.build(make())
    kernel.save(tmp_path / "kernel")
    assert set(kernel.manifest.target.features) >= TILE_FEATURES
    assert TILE_FEATURES.isdisjoint(ct.build(make(dtype="float32")).manifest.target.features)

    def refuse():
        raise IncompatibleMachineError("refused")

    monkeypatch.setattr("convt_tvm.runtime.require_tiles", refuse)
    with pytest.raises(IncompatibleMachineError, match="cannot run here: refused"):
        load(tmp_path / "kernel")
