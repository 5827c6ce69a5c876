"""The two declarations agree with each other and with torch in float64, bit for bit on integers, over the whole
domain."""

import itertools

import hypothesis
import numpy as np
import pytest
import torch
import tvm
from drawn_specs import drawn_specs
from hypothesis import strategies as st

from convt_tvm import compute
from convt_tvm.compute import declare_pack, declare_phases, declare_reference
from convt_tvm.errors import SpecError
from convt_tvm.fuzz import Domain
from convt_tvm.layout import Layout, bands, kernel_columns
from convt_tvm.lower import lower_kernel, lower_pack
from convt_tvm.reference import empty_output, integer_inputs, reference
from convt_tvm.spec import MEMORY_ORDER, ConvTranspose2dSpec
from convt_tvm.target import Target

TARGET = Target.parse("llvm")


def run_phases(spec, layout, inputs, pack=None):
    """What the unscheduled phase form computes, output prefilled with NaN so that an element left out shows."""
    module = tvm.IRModule(
        {
            **lower_kernel(declare_phases(spec, layout, TARGET)).functions,
            **(pack or lower_pack(declare_pack(spec, layout, TARGET))).functions,
        }
    )
    library = tvm.compile(module, target=TARGET.to_tvm())
    data, weight, bias = inputs
    accumulator = getattr(torch, spec.accumulator_dtype)
    packed = torch.full(layout.packed_shape(spec), float("nan"), dtype=accumulator)
    output = empty_output(spec, data)
    library["pack"](weight, packed)
    assert not packed.isnan().any()
    read, written = data.permute(MEMORY_ORDER[spec.input_axes]), output.permute(MEMORY_ORDER[spec.output_axes])
    library["convt"](read, packed, *([bias] if spec.bias else []), written)
    return output


def run_reference(spec, inputs):
    library = tvm.compile(declare_reference(spec), target=TARGET.to_tvm())
    data, weight, bias = inputs
    output = torch.full(spec.output_shape, float("nan"), dtype=getattr(torch, spec.dtype))
    library["main"](data.contiguous(), weight, *([bias] if spec.bias else []), output)
    return output


LAYOUTS = [Layout("co", 4, 2, 3, 2, 4), Layout("co", 4, 2, 16, 4, 2, taps="outer"), Layout("ow", 3, 1, 4, 2, 2)]

GRID = [
    dict(kernel_size=k, stride=s, padding=p, dilation=d, output_padding=op)
    for k, s, p, d, op in [
        (1, 1, 0, 1, 0),
        (2, 2, 0, 1, 1),
        (3, 2, 1, 1, 1),
        (4, 2, 1, 1, 0),
        (3, 1, 2, 2, 0),
        (3, 2, 3, 2, 1),  # gcd 2: odd rows and columns have no taps
        (4, 6, 2, 4, 5),  # gcd 2, stride above the kernel
        (3, 5, 1, 2, 4),
        (5, 3, 5, 1, 2),  # padding above dilation*(kernel-1) crops the image
        (2, 1, 4, 3, 2),
        ((1, 5), (4, 1), (0, 2), (1, 3), (3, 2)),
        ((3, 2), (2, 3), (1, 0), (3, 2), (2, 1)),
    ]
]


@pytest.mark.parametrize("parameters", GRID, ids=str)
def test_phase_form_equals_reference_form_bit_for_bit(parameters):
    for groups, dtype in ((1, "float32"), (2, "float64")):
        spec = ConvTranspose2dSpec(
            n=2, ci=2 * groups, ih=5, iw=7, co=5 * groups, groups=groups, dtype=dtype, **parameters
        )
        inputs = integer_inputs(spec, seed=1)
        expected = reference(spec, *inputs)
        assert torch.equal(run_reference(spec, inputs).double(), expected)
        for layout in LAYOUTS:
            assert torch.equal(run_phases(spec, layout, inputs).double(), expected), layout


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_width_types_accumulate_in_float32(dtype):
    spec = ConvTranspose2dSpec(n=1, ci=4096, ih=1, iw=1, co=1, kernel_size=1, bias=False, dtype=dtype)
    ones = (
        torch.ones(spec.input_shape, dtype=getattr(torch, dtype)),
        torch.ones(spec.weight_shape, dtype=getattr(torch, dtype)),
    )
    for output in (run_reference(spec, (*ones, None)), run_phases(spec, LAYOUTS[0], (*ones, None))):
        assert output.item() == 4096


def test_a_tap_read_from_the_wrong_place_is_noticed(monkeypatch):
    spec = ConvTranspose2dSpec(n=1, ci=2, ih=4, iw=4, co=3, kernel_size=3, stride=2, padding=1)
    inputs = integer_inputs(spec, seed=0)
    honest = kernel_columns
    swapped = lambda spec: tuple(reversed(honest(spec)))  # noqa: E731
    monkeypatch.setattr("convt_tvm.lower.kernel_columns", swapped)
    assert not torch.equal(run_phases(spec, LAYOUTS[0], inputs).double(), reference(spec, *inputs))


def test_bands_hold_every_row_once_and_are_at_most_six():
    for k, s, p, d in itertools.product((1, 2, 3, 5), (1, 2, 3, 5), (0, 1, 3), (1, 2, 3)):
        for op in range(max(s, d)):
            try:
                spec = ConvTranspose2dSpec(
                    n=1, ci=1, ih=4, iw=1, co=1, kernel_size=(k, 1), stride=(s, 1), padding=(p, 0),
                    dilation=(d, 1), output_padding=(op, 0),
                )  # fmt: skip
            except SpecError:
                continue
            found = bands(spec)
            rows = [s * q + phase.residue for band in found for phase in band.phases for q in range(band.rows)]
            assert sorted(rows) == list(range(spec.oh))
            assert len(found) <= 6


@pytest.mark.parametrize(
    "values", [(3,), (2, 2, 2), (0, 1), (1, 1, 0, 0, 5), (4, 3, 2, 1, 0), (7, 1, 4, 9, 0, 3, 6, 9), (2, 5, 8, 1)]
)
@pytest.mark.parametrize("select", [compute.lookup, compute.phase_value])
def test_each_value_is_selected(select, values):
    index = tvm.tirx.Var("index", "int32")
    function = tvm.te.create_prim_func([tvm.te.compute((len(values),), lambda i: select(values, i), name="out")])
    out = torch.zeros(len(values), dtype=torch.int32)
    tvm.compile(function, target=TARGET.to_tvm())["main"](out)
    assert out.tolist() == list(values)
    if len(set(values)) == 1:
        assert isinstance(select(values, index), tvm.tirx.IntImm)


def test_many_phases_are_no_chain_of_selects():
    """Each of which TVM simplifies wherever a phase's rows, columns or weights are named."""
    index = tvm.tirx.Var("index", "int32")
    assert str(compute.phase_value(range(32), index)) == "index"
    places = kernel_columns(ConvTranspose2dSpec(n=1, ci=1, ih=2, iw=2, co=1, kernel_size=64, stride=32))
    assert str(compute.phase_value(places, index)).count("Select") == 1


def test_parameters_may_start_at_any_address():
    spec = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=2, kernel_size=2)
    for function in (declare_phases(spec, LAYOUTS[0], TARGET), declare_reference(spec)):
        assert {int(buffer.ty.data_alignment) for buffer in function.params} == {1}


# The text-book form multiplies the zeros too, so these are smaller than the kernels'.
SMALL = Domain(n=2, groups=3, ci=3, ih=6, iw=9, co=6, kernel_size=5, stride=5)


@hypothesis.given(spec=drawn_specs(domain=SMALL), seed=st.integers(0, 3))
@hypothesis.settings(max_examples=60, deadline=None)
@pytest.mark.no_cover
def test_declarations_agree_with_torch_on_drawn_configurations(spec, seed):
    inputs = integer_inputs(spec, seed=seed)
    expected = reference(spec, *inputs)
    assert torch.equal(run_reference(spec, inputs).double(), expected)
    assert torch.equal(run_phases(spec, LAYOUTS[seed % 2], inputs).double(), expected)
    assert np.prod(expected.shape) > 0
