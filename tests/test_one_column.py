"""Images of one column: layers in one dimension, which processors compute turned on their side."""

import re
from dataclasses import replace

import pytest
import torch

from convt_tvm.check import bits
from convt_tvm.compiler import build, lower_choice
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.space import choices, declared, default_choice
from convt_tvm.spec import CHANNELS_LAST, CONTIGUOUS, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import resolve

HOST, GPU = Target.parse("llvm"), Target.parse("cuda:sm_90")
COLUMN = ConvTranspose2dSpec(
    n=2, ci=6, ih=67, iw=1, co=10, kernel_size=(5, 1), stride=(3, 2), padding=(2, 0), output_padding=(1, 0), groups=2
)


def run(kernel, spec, seed=0):
    """The kernel's output for integers, given a packed weight, and what it should be."""
    inputs = image, weight, bias = integer_inputs(spec, seed)
    return kernel(image, kernel.pack(weight), bias), reference(spec, *inputs)


def test_images_of_one_column_are_turned_and_others_are_not():
    turned = COLUMN.turned
    assert (turned.ih, turned.iw, turned.oh, turned.ow) == (1, 67, 1, COLUMN.oh)
    assert (turned.kernel_size, turned.stride, turned.padding) == ((1, 5), (2, 3), (0, 2))
    assert (turned.output_padding, turned.dilation) == ((0, 1), (1, 1))
    assert turned.multiply_adds == COLUMN.multiply_adds and turned.size_bytes == COLUMN.size_bytes
    for changes in ({"iw": 2}, {"kernel_size": (5, 3), "padding": (2, 1)}, {"output_padding": (1, 1)}):
        spec = replace(COLUMN, **changes)
        assert spec.turned is spec


def test_processors_declare_them_turned_unless_weights_are_many():
    assert declared(COLUMN, HOST) == COLUMN.turned
    assert declared(COLUMN, GPU) is COLUMN
    many = resolve(["hifigan/up1"])[0].spec
    assert many.turned is not many and declared(many, HOST) is many
    assert all(choice.layout.row_block == 1 for choice in choices(COLUMN, HOST, "llvm_columns"))


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 1, "bias": False},
        {"ci": 1, "co": 1, "groups": 1},
        {"stride": 7, "dtype": "float64"},
        {"dilation": 2, "dtype": "bfloat16"},
    ],
)
def test_kernels_take_tensors_of_one_column(memory_format, changes):
    spec = replace(COLUMN, memory_format=memory_format, **changes)
    kernel = build(spec)
    output, expected = run(kernel, spec)
    assert tuple(output.shape) == spec.output_shape
    assert torch.equal(output.double(), expected.double())
    assert output.is_contiguous(memory_format=getattr(torch, memory_format))
    _, weight, bias = integer_inputs(spec, 0)
    with pytest.raises(ValueError, match=rf"input must be {spec.dtype} of shape {re.escape(str(spec.input_shape))}"):
        kernel(torch.zeros(spec.turned.input_shape, dtype=output.dtype), weight, bias)


def test_one_kernel_for_any_batch_size_takes_them():
    spec = replace(COLUMN, n=None)
    kernel = build(spec)
    for count in (0, 1, 3, 9):
        sized = spec.with_batch(count)
        output, expected = run(kernel, sized)
        assert torch.equal(output.double(), expected.double())


@pytest.mark.parametrize("schedule", ["llvm_channels", "llvm_columns"])
def test_every_schedule_sums_to_the_same_bits_for_them(schedule):
    spec = replace(COLUMN, ci=96, groups=1)
    found = choices(spec, HOST, schedule)
    torch.manual_seed(0)
    image, weight, bias = torch.randn(spec.input_shape), torch.randn(spec.weight_shape), torch.randn(spec.bias_shape)
    first = choices(spec, HOST, "llvm_channels")[-1]
    outputs = [build(spec, choice=choice)(image, weight, bias) for choice in (first, *found[:2])]
    assert all(torch.equal(bits(outputs[0]), bits(output)) for output in outputs[1:])


def test_other_images_are_lowered_to_the_shapes_they_were_declared_in():
    spec = resolve(["dcgan/5"])[0].spec
    module = lower_choice(spec, HOST, default_choice(spec, HOST)).module
    assert "T.decl_buffer" not in module.script()
    module = lower_choice(COLUMN, HOST, default_choice(COLUMN, HOST)).module
    assert "T.decl_buffer" in module.script()
    assert [tuple(map(int, buffer.shape)) for buffer in module["convt"].params][::3] == [
        COLUMN.input_shape,
        COLUMN.output_shape,
    ]
