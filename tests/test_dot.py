"""Dot products of bfloat16: layouts, lowering, rounding, and answers where a processor has them."""

import re
from dataclasses import replace

import pytest
import torch

import convt_tvm as ct
from convt_tvm.compiler import lower_choice
from convt_tvm.compute_dot import declare_dot_phases
from convt_tvm.dot_layout import DotLayout, paired
from convt_tvm.fuzz import MEMORY_FORMATS, fuzzed_specs
from convt_tvm.processor import LEVELS, TILE_FEATURES
from convt_tvm.reference import expect, integer_inputs, integer_reference, normal_inputs
from convt_tvm.space import choices
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import resolve

DOTS = Target("llvm", "x86_64", (*LEVELS["x86-64-v4"], "avx512bf16"))
TILES = replace(DOTS, features=(*DOTS.features, *TILE_FEATURES))
WITHOUT = Target.parse("llvm:x86-64-v4")
HOST = Target.parse("llvm")
here = pytest.mark.skipif(not HOST.multiplies_pairs, reason="this processor has no AVX-512 BF16")


def make(**changes):
    given = {"n": 1, "ci": 40, "ih": 5, "iw": 7, "co": 40, "kernel_size": 4, "stride": 2, "padding": 1}
    return ConvTranspose2dSpec(**(given | {"dtype": "bfloat16"} | changes))


def dot_choices(spec, target=DOTS):
    return choices(spec.sized, target, "llvm_dot")


def run(spec, choice, inputs):
    sized = spec if spec.n is not None else spec.with_batch(len(inputs[0]))
    kernel = ct.build(spec, choice=choice)
    packed = kernel.pack(inputs[1])
    assert packed.dtype == torch.bfloat16
    out = torch.full(sized.output_shape, torch.nan, dtype=torch.bfloat16)
    kernel(inputs[0], packed, inputs[2], out=out)
    return out


def test_is_for_bfloat16_and_targets_that_say_so():
    assert choices(make(), DOTS)[0].space.name == "llvm_dot"
    assert not dot_choices(make(), WITHOUT)
    for dtype in ("float32", "float16"):
        assert not dot_choices(make(dtype=dtype))


@pytest.mark.parametrize("workload", resolve(["all"]), ids=lambda workload: workload.name)
def test_is_not_for_processors_with_a_tile_unit(workload):
    names = [choice.space.name for choice in choices(replace(workload.spec, dtype="bfloat16").sized, TILES)]
    assert names.index("llvm_dot") > 0


@pytest.mark.parametrize("n", [16, None])
def test_images_whose_pairs_are_read_as_they_are_need_no_window_to_be_worked_on_apart(n):
    spec = make(n=n, ci=256, ih=14, iw=14, co=256, kernel_size=2, padding=0, memory_format="channels_last")
    for choice in dot_choices(spec)[:2]:
        assert "window" not in lower_choice(spec, DOTS, choice).module["convt"].script()


def test_pairs_are_transposed_with_a_channel_left_over_and_no_border():
    # Lowered on every machine: those without dot products would not see it fail.
    spec = make(ci=3, co=18, ih=6, iw=37, kernel_size=2, padding=0)
    assert lower_choice(spec, DOTS, dot_choices(spec)[0]).code


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("n", [5, 9, None])
def test_tiles_of_several_images_may_be_more_than_are_left(n, memory_format):
    # A single layer of few positions; windows are copied in NCHW, pairs read as they are in channels_last.
    spec = make(n=n, ih=2, iw=2, kernel_size=2, padding=0, memory_format=memory_format)
    several = [choice for choice in choices(spec.with_batch(n or 8), DOTS, "llvm_dot") if choice.layout.image_block > 1]
    choice = next(each for each in several if n is None or n % each.layout.image_block)
    assert lower_choice(spec, DOTS, choice).code
    if set(DOTS.features) <= set(HOST.features):
        kernel = ct.build(spec, DOTS, choice=choice)
        for images in (n,) if n else range(10):
            inputs = integer_inputs(sized := spec.with_batch(images), images)
            assert torch.equal(kernel(*inputs).long(), integer_reference(sized, *inputs))


def test_shapes_count_pairs():
    layout = dot_choices(make(ci=33))[0].layout
    assert isinstance(layout, DotLayout)
    assert (paired(make(ci=33)).ci, paired(make(ci=66, co=2, groups=2)).ci) == (17, 34)
    assert layout.packed_shape(make(ci=33)) == (layout.blocks(make()), 4, 4, 17, 2 * layout.co_block)
    assert layout.packed_dtype(make()) == "bfloat16"
    assert layout == DotLayout.from_json(layout.to_json())
    function = declare_dot_phases(make(ci=33), layout, DOTS)
    assert "window" in str(function) and "uint32" in str(function)


def test_sums_are_dot_products_and_outputs_rounded_in_pairs():
    text = str(lower_choice(make(), DOTS, dot_choices(make())[0]).module["convt"])
    assert "convt_dot16" in text and "convt_pair16" in text
    # What is added is never a product in float32.
    assert not [line for line in text.splitlines() if "partial" in line and "*" in line.split("] = ")[-1][:20]]


def test_a_target_without_the_instructions_calls_none():
    text = str(lower_choice(make(), WITHOUT, choices(make(), WITHOUT)[0]).module["convt"])
    assert not re.findall("convt_(?:dot|pair|narrow)", text)
    assert "convt_float32_at" in text


CASES = [
    make(),
    make(n=None, ci=33, co=21, kernel_size=3, padding=0),  # taps differ, pairs and blocks are filled up
    make(n=2, ci=14, co=70, groups=2, kernel_size=(2, 5), stride=(3, 2), dilation=(2, 1), bias=False),
    make(ci=3, co=1, iw=1, stride=5, kernel_size=2, output_padding=3),
    make(ci=6, groups=2, co=18, iw=37, kernel_size=3),  # an odd number of channels in each group
    make(ci=64, iw=33, ih=9, co=16, kernel_size=2, padding=0),  # more columns than a piece of them
]


@here
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_answers_are_exact(spec):
    found = dot_choices(spec, HOST)
    sized = spec.with_batch(3) if spec.n is None else spec
    inputs = integer_inputs(sized, 0)
    for choice in (found[0], found[len(found) // 2], found[-1]):
        assert torch.equal(run(spec, choice, inputs).long(), integer_reference(sized, *inputs))


@here
@pytest.mark.parametrize(("taps", "gathers"), [("outer", False), ("inner", True)])
def test_answers_of_large_layers_are_exact(taps, gathers):
    large = {"ci": 1024, "co": 64} if taps == "outer" else {"ci": 4, "co": 16, "ih": 400, "iw": 700}
    spec = make(**large)
    found = [each for each in dot_choices(spec) if (each.layout.taps, each.layout.gathers) == (taps, gathers)]
    inputs = integer_inputs(spec, 0)
    assert torch.equal(run(spec, found[0], inputs).long(), integer_reference(spec, *inputs))


@here
@pytest.mark.parametrize(("number", "spec"), list(fuzzed_specs(5, range(6), dtypes=("bfloat16",))))
def test_fuzzed_specs_are_exact_and_within_the_bound(number, spec):
    found = dot_choices(spec, HOST)
    if not found:
        pytest.skip("no tap reaches an output")
    choice, inputs = found[number % len(found)], integer_inputs(spec, number)
    assert torch.equal(run(spec, choice, inputs).long(), integer_reference(spec, *inputs))
    inputs = normal_inputs(spec, number)
    assert float(expect(spec, *inputs).ratio(run(spec, choice, inputs)).max()) <= 1


@here
def test_subnormal_numbers_may_count_as_zero_and_nothing_else_does():
    spec = make(ci=2, co=32, ih=3, iw=3)
    inputs = normal_inputs(spec, 0)
    tiny = (inputs[0] * 2.0**-130, inputs[1], inputs[2])
    for given in (tiny, inputs):
        output = run(spec, dot_choices(spec)[0], given)
        assert float(expect(spec, *given).ratio(output).max()) <= 1


@here
def test_non_finite_inputs_stay_where_their_kernel_reaches():
    spec = make(ci=3)
    inputs = normal_inputs(spec, 0)
    inputs[0][0, 2, 2, 3] = torch.inf
    output = run(spec, dot_choices(spec)[0], inputs)
    expected = torch.nn.functional.conv_transpose2d(*(each.float() for each in inputs), stride=2, padding=1)
    assert torch.equal(output.isfinite(), expected.isfinite())
