import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convt_tvm.phases import Axis

# Every combination of small parameters: gcd(stride, dilation) above 1, stride above the kernel, padding above
# dilation*(kernel-1), output_padding up to its limit. An axis whose output would be empty describes nothing.
AXES = [
    axis
    for size, kernel, stride, dilation in product((1, 2, 5), range(1, 6), range(1, 7), range(1, 5))
    for padding in range(dilation * (kernel - 1) + 3)
    for output_padding in range(max(stride, dilation))
    if (axis := Axis(size, kernel, stride, padding, output_padding, dilation)).output_size > 0
]


@st.composite
def axes(draw):
    kernel, stride, dilation = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    output_padding = draw(st.integers(0, max(stride, dilation) - 1))
    size = draw(st.integers(1, 20))
    uncropped = (size - 1) * stride + dilation * (kernel - 1) + output_padding + 1
    return Axis(size, kernel, stride, draw(st.integers(0, (uncropped - 1) // 2)), output_padding, dilation)


def scattered(axis):
    """The definition: every (input, tap) adds to output stride*input - padding + dilation*tap, where there is one."""
    reached = (
        (i * axis.stride - axis.padding + t * axis.dilation, i, t)
        for i, t in product(range(axis.input_size), range(axis.kernel_size))
    )
    return sorted(triple for triple in reached if 0 <= triple[0] < axis.output_size)


def gathered(axis, phases):
    """The same triples from the phases."""
    return sorted(
        (axis.stride * q + phase.residue, q + phase.base - u * phase.input_step, t)
        for phase in phases
        for q in range(phase.count)
        for u, t in enumerate(phase.kernel_indices)
        if 0 <= q + phase.base - u * phase.input_step < axis.input_size
    )


def check(axis):
    triples = scattered(axis)
    assert gathered(axis, axis.phases) == triples
    assert axis.products == len(triples)
    outputs = sorted(axis.stride * q + phase.residue for phase in axis.phases for q in range(phase.count))
    assert outputs == list(range(axis.output_size))
    taps = [tap for phase in axis.phases for tap in phase.kernel_indices]
    assert len(taps) == len(set(taps))
    assert set(taps) <= set(range(axis.kernel_size))
    if len(axis.phases) == axis.stride:
        assert len(taps) == axis.kernel_size


def test_the_grid_reaches_the_corners_of_the_domain():
    assert len(AXES) > 8_000
    assert any(math.gcd(axis.stride, axis.dilation) > 1 for axis in AXES)
    assert any(axis.stride > axis.kernel_size for axis in AXES)
    assert any(axis.padding > axis.dilation * (axis.kernel_size - 1) for axis in AXES)
    assert any(axis.output_padding == axis.stride - 1 >= axis.dilation for axis in AXES)
    assert any(axis.output_padding == axis.dilation - 1 > axis.stride for axis in AXES)
    assert any(axis.output_size < axis.stride for axis in AXES)


def test_phases_gather_what_the_definition_scatters_on_a_grid():
    for axis in AXES:
        check(axis)


@given(axes())
def test_phases_gather_what_the_definition_scatters(axis):
    check(axis)


@pytest.mark.parametrize("field", ["base", "first_tap", "residue", "taps", "tap_step", "input_step"])
def test_a_wrong_number_in_a_phase_is_noticed(field):
    axis = Axis(input_size=5, kernel_size=5, stride=2, padding=1, output_padding=0, dilation=1)
    first, *others = axis.phases
    wrong = replace(first, **{field: getattr(first, field) + 1})
    assert gathered(axis, [wrong, *others]) != scattered(axis)


def test_tap_counts_of_the_phases_differ_by_at_most_one():
    for axis in AXES:
        counts = {phase.taps for phase in axis.phases} - {0}
        group = axis.kernel_size * math.gcd(axis.stride, axis.dilation) / axis.stride
        assert counts <= {math.floor(group), math.ceil(group)}


def test_bases_are_constants_within_reach_of_the_padding():
    for axis in AXES:
        limit = axis.padding + axis.stride + axis.dilation * axis.kernel_size
        assert all(abs(phase.base) * axis.stride <= limit for phase in axis.phases)


def test_three_taps_at_stride_two_make_two_phases():
    even, odd = Axis(input_size=4, kernel_size=3, stride=2, padding=1, output_padding=1, dilation=1).phases
    assert (even.residue, even.count, list(even.kernel_indices), even.base, even.input_step) == (0, 4, [1], 0, 1)
    assert (odd.residue, odd.count, list(odd.kernel_indices), odd.base, odd.input_step) == (1, 4, [0, 2], 1, 1)


@pytest.mark.parametrize(
    ("stride", "dilation", "kernel", "empty"),
    [(2, 2, 3, [1]), (4, 2, 3, [1, 3]), (5, 1, 3, [3, 4]), (5, 2, 3, [1, 3]), (3, 3, 2, [1, 2])],
)
def test_phases_without_taps_are_those_no_product_reaches(stride, dilation, kernel, empty):
    axis = Axis(3, kernel, stride, 0, max(stride, dilation) - 1, dilation)
    assert [phase.residue for phase in axis.phases if phase.taps == 0] == empty


def test_a_short_output_has_only_the_phases_it_shows():
    axis = Axis(input_size=1, kernel_size=3, stride=7, padding=0, output_padding=0, dilation=1)
    assert [phase.residue for phase in axis.phases] == [0, 1, 2]
