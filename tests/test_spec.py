import copy
import json
import pickle
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv_transpose2d

from convt_tvm.errors import ConvTError, SpecError, UnsupportedDtypeError
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec

NAME = "n2_ci6_ih5_iw7_co4_k3x2_s2x1_p1x0_op1x0_d1x3_g2_nobias_float16"


def make(**changes):
    return ConvTranspose2dSpec(**{"n": 1, "ci": 4, "ih": 5, "iw": 5, "co": 4, "kernel_size": 3, **changes})


def example():
    return ConvTranspose2dSpec(
        n=2, ci=6, ih=5, iw=7, co=4, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0),
        dilation=(1, 3), groups=2, bias=False, dtype="float16",
    )  # fmt: skip


@st.composite
def specs(draw):
    def pairs(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.integers(1, 4))
    kernel_size, stride, dilation = pairs(1, 7), pairs(1, 6), pairs(1, 5)
    output_padding = tuple(draw(st.integers(0, max(both) - 1)) for both in zip(stride, dilation, strict=True))
    sizes = pairs(1, 12)
    uncropped = [(sizes[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + output_padding[i] for i in range(2)]
    return ConvTranspose2dSpec(
        n=draw(st.integers(0, 3)),
        ci=groups * draw(st.integers(1, 4)),
        ih=sizes[0],
        iw=sizes[1],
        co=groups * draw(st.integers(1, 4)),
        kernel_size=kernel_size,
        stride=stride,
        padding=tuple(draw(st.integers(0, size // 2)) for size in uncropped),
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(DTYPE_BYTES))),
        memory_format=draw(st.sampled_from(["contiguous_format", "channels_last"])),
    )


def test_a_spec_for_any_batch_size_has_a_name_and_no_shapes_of_its_own():
    sizes = dict(ci=4, ih=3, iw=5, co=6, kernel_size=3, stride=2)
    spec = ConvTranspose2dSpec(n=None, **sizes)
    assert spec.name.startswith("nany_ci4_")
    assert ConvTranspose2dSpec.from_name(spec.name) == spec
    assert ConvTranspose2dSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.weight_shape == (4, 6, 3, 3)
    assert spec.shapes == "nx4x3x5 to nx6x7x11"
    assert spec.with_batch(7) == ConvTranspose2dSpec(n=7, **sizes)
    assert spec.sized == spec.with_batch(1)
    assert spec.with_batch(7).sized == spec.with_batch(7)
    for name in ("input_shape", "output_shape", "multiply_adds", "size_bytes"):
        with pytest.raises(SpecError, match=r"nany_ci4_.* has no shapes of its own: it is for any batch size"):
            getattr(spec, name)


def test_memory_formats_are_torchs_and_change_no_shape():
    plain, last = make(), make(memory_format=torch.channels_last)
    assert (plain.memory_format, last.memory_format) == ("contiguous_format", "channels_last")
    assert last.name == f"{plain.name}_channels_last"
    assert ConvTranspose2dSpec.from_name(last.name) == last != plain
    assert (last.input_shape, last.output_shape) == (plain.input_shape, plain.output_shape)
    assert (plain.input_axes, plain.output_axes) == ("nchw", "nchw")
    assert (last.input_axes, last.output_axes) == ("nhwc", "nhwc")
    one = make(ci=1, co=1, memory_format="channels_last")
    assert (one.input_axes, one.output_axes) == ("nchw", "nchw")
    with pytest.raises(SpecError, match="memory_format='preserve_format' is not supported; use contiguous_format or"):
        make(memory_format=torch.preserve_format)


def test_derived_values():
    spec = example()
    assert (spec.oh, spec.ow) == (10, 10)
    assert spec.input_shape == (2, 6, 5, 7)
    assert spec.weight_shape == (6, 2, 3, 2)
    assert spec.bias_shape == (4,)
    assert spec.output_shape == (2, 4, 10, 10)
    assert spec.size_bytes == 2 * (2 * 6 * 5 * 7 + 6 * 2 * 3 * 2 + 2 * 4 * 10 * 10)
    assert make(bias=True).size_bytes - make(bias=False).size_bytes == 4 * 4


def test_defaults_are_those_of_torch():
    spec, layer = make(), torch.nn.ConvTranspose2d(4, 4, 3)
    for name in ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"):
        assert getattr(spec, name) == getattr(layer, name)
    assert spec.bias is True
    assert spec.dtype == "float32"


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "output_padding", "dilation"])
@pytest.mark.parametrize("both", [2, [2], (2,), (2, 2), [2, 2], np.int64(2), torch.Size([2, 2]), torch.tensor(2)])
def test_an_integer_or_two_of_them_become_a_pair(name, both):
    changes = {"stride": 3, name: both}
    pair = getattr(make(**changes), name)
    assert pair == (2, 2)
    assert all(type(value) is int for value in pair)


@pytest.mark.parametrize(
    ("dtype", "size_bytes", "accumulator"),
    [("float32", 4, "float32"), ("float64", 8, "float64"), ("float16", 2, "float32"), ("bfloat16", 2, "float32")],
)
def test_dtypes(dtype, size_bytes, accumulator):
    for given_dtype in (dtype, getattr(torch, dtype)):
        spec = make(dtype=given_dtype)
        assert spec.dtype == dtype
        assert spec.accumulator_dtype == accumulator
        assert spec.size_bytes == size_bytes * (100 + 16 * 9 + 4 + 4 * 49)
    assert getattr(torch, dtype).itemsize == size_bytes


def test_every_dtype_is_tried_above():
    assert list(DTYPE_BYTES) == ["float32", "float64", "float16", "bfloat16"]


REJECTED = [
    ({"dtype": "float8"}, "dtype='float8' is not supported; use one of float32, float64, float16, bfloat16."),
    ({"dtype": torch.int64}, "dtype='int64' is not supported; use one of float32, float64, float16, bfloat16."),
    ({"n": -1}, "n=-1 must not be negative."),
    *(
        ({name: value}, f"{name}={value} must be at least 1.")
        for name in ("ci", "ih", "iw", "co", "groups")
        for value in (0, -2)
    ),
    *(
        ({name: pair}, f"{name}={pair} must be at least 1 on both axes.")
        for name in ("kernel_size", "stride", "dilation")
        for pair in ((0, 1), (1, 0), (-1, 1))
    ),
    *(
        ({name: pair}, f"{name}={pair} must not be negative.")
        for name in ("padding", "output_padding")
        for pair in ((-1, 0), (0, -3))
    ),
    ({"groups": 3}, "ci=4 must be a multiple of groups=3."),
    ({"groups": 2, "co": 5}, "co=5 must be a multiple of groups=2."),
    *(
        (
            {"stride": stride, "dilation": dilation, "output_padding": output_padding},
            f"output_padding={output_padding} must be smaller than stride={stride} or dilation={dilation} on each "
            "axis; lower it or raise the stride.",
        )
        for stride, dilation, output_padding in [
            ((1, 1), (1, 1), (1, 0)),
            ((1, 1), (1, 1), (0, 1)),
            ((2, 2), (1, 1), (2, 2)),
            ((2, 3), (3, 1), (0, 3)),
            ((3, 2), (1, 3), (3, 0)),
        ]
    ),
    (
        {"padding": (4, 0)},
        "the output would be -1x7: input 5x5 with kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1) is smaller than "
        "what padding=(4, 0) crops; lower the padding.",
    ),
    (
        {"iw": 1, "kernel_size": 2, "padding": (0, 1)},
        "the output would be 6x0: input 5x1 with kernel_size=(2, 2), stride=(1, 1), dilation=(1, 1) is smaller than "
        "what padding=(0, 1) crops; lower the padding.",
    ),
    ({"n": 1.0}, "n=1.0 must be an integer; got float."),
    ({"groups": True}, "groups=True must be an integer; got bool."),
    ({"stride": 1.5}, "stride=1.5 must be an integer; got float."),
    ({"stride": (1, 2.0)}, "stride=2.0 must be an integer; got float."),
    ({"padding": "same"}, "padding='same' must be an integer; got str."),
    ({"dilation": None}, "dilation=None must be an integer; got NoneType."),
    ({"kernel_size": (3, 3, 3)}, "kernel_size=(3, 3, 3) must be an integer or two of them, (height, width)."),
    ({"stride": ()}, "stride=() must be an integer or two of them, (height, width)."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REJECTED, ids=lambda value: str(value)[:60])
def test_rejections_name_the_values(changes, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$") as caught:
        make(**changes)
    assert isinstance(caught.value, ConvTError)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, NotImplementedError) == isinstance(caught.value, UnsupportedDtypeError)


def test_only_the_dtype_is_a_dtype_error():
    unsupported = [changes for changes, _ in REJECTED if "dtype" in changes]
    for changes, _ in REJECTED:
        with pytest.raises(SpecError) as caught:
            make(**changes)
        assert isinstance(caught.value, UnsupportedDtypeError) == (changes in unsupported)


def test_parameters_are_named_and_required():
    with pytest.raises(TypeError, match="positional argument"):
        ConvTranspose2dSpec(1, 4, 5, 5, 4, 3)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'kernel_size'"):
        ConvTranspose2dSpec(n=1, ci=4, ih=5, iw=5, co=4)


def test_specs_are_frozen_and_equal_by_value():
    spec = example()
    assert spec == example()
    assert hash(spec) == hash(example())
    assert spec != make()
    with pytest.raises(AttributeError, match="cannot assign to field 'n'"):
        spec.n = 3


def test_a_spec_prints_as_the_call_that_makes_it():
    assert eval(repr(example())) == example()
    assert copy.deepcopy(example()) == pickle.loads(pickle.dumps(example())) == example()


def test_canonical_name():
    assert example().name == NAME
    assert ConvTranspose2dSpec.from_name(NAME) == example()


@pytest.mark.parametrize(
    "name",
    ["", "dcgan/2", f"{NAME} ", f"{NAME}\n", NAME[1:], NAME.replace("k3x2", "k3"), NAME.replace("nobias", "maybe")],
)
def test_other_names_are_rejected(name):
    expected = f"{name!r} is not a canonical spec name such as 'n1_ci512_ih4_iw4_co256_k4x4_s2x2_p1x1_op0x0_d1x1_g1"
    with pytest.raises(SpecError, match=re.escape(expected)) as caught:
        ConvTranspose2dSpec.from_name(name)
    example_name = re.search("such as '(.*)'", str(caught.value)).group(1)
    assert ConvTranspose2dSpec.from_name(example_name).name == example_name


def test_names_of_invalid_specs_are_rejected_for_what_is_wrong():
    with pytest.raises(SpecError, match=r"^ci=0 must be at least 1"):
        ConvTranspose2dSpec.from_name(NAME.replace("ci6", "ci0"))
    with pytest.raises(UnsupportedDtypeError, match=r"^dtype='float8' is not supported"):
        ConvTranspose2dSpec.from_name(NAME.replace("float16", "float8"))


def test_json_has_every_field():
    assert example().to_json() == {
        "n": 2, "ci": 6, "ih": 5, "iw": 7, "co": 4, "kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0],
        "output_padding": [1, 0], "dilation": [1, 3], "groups": 2, "bias": False, "dtype": "float16",
        "memory_format": "contiguous_format",
    }  # fmt: skip


def test_json_with_other_fields_is_rejected():
    values = example().to_json()
    del values["stride"]
    values["strides"] = [1, 1]
    with pytest.raises(SpecError, match=re.escape("missing ['stride'], unknown ['strides'].")):
        ConvTranspose2dSpec.from_json(values)


@given(specs())
def test_name_and_json_round_trip(spec):
    assert ConvTranspose2dSpec.from_name(spec.name) == spec
    assert ConvTranspose2dSpec.from_name(spec.name).name == spec.name
    assert ConvTranspose2dSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert eval(repr(spec)) == spec


@given(specs(), specs())
def test_names_are_equal_only_for_equal_specs(one, other):
    assert (one.name == other.name) == (one == other)


def torch_output(spec):
    """Torch's own answer, all ones in float64 so that each output counts its products."""
    x = torch.ones(spec.input_shape, dtype=torch.float64)
    weight = torch.ones(spec.weight_shape, dtype=torch.float64)
    return conv_transpose2d(
        x, weight, None, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation
    )  # fmt: skip


@given(specs())
def test_output_shape_and_multiply_adds_are_torchs(spec):
    output = torch_output(spec)
    assert spec.output_shape == tuple(output.shape)
    assert spec.multiply_adds == output.sum().item()


def outcome(function, *arguments, **named):
    """The shape that `function` gives, or the exception it raises."""
    try:
        return tuple(function(*arguments, **named))
    except Exception as error:  # torch raises what it likes
        return error


def spec_output_shape(**changes):
    return make(**changes).output_shape


def torch_layer_output_shape(n, ci, co, groups):
    layer = torch.nn.ConvTranspose2d(ci, co, 3, groups=groups, dtype=torch.float64)
    return layer(torch.ones(n, ci, 5, 5, dtype=torch.float64)).shape


def compare_with_torch(ours, theirs):
    if isinstance(theirs, Exception):
        assert isinstance(ours, SpecError), f"torch rejects: {theirs}; the spec gives {ours}"
        assert isinstance(ours, type(theirs))
    else:
        assert ours == theirs


def test_acceptance_is_torchs_on_a_grid_of_one_axis():
    accepted = rejected = 0
    for size, kernel, stride, padding, output_padding, dilation in product(
        (1, 2, 4), (0, 1, 2, 3), (-1, 0, 1, 2, 3), range(-1, 5), range(-1, 4), (-1, 0, 1, 2, 3)
    ):
        both = {"stride": (1, stride), "padding": (0, padding), "dilation": (1, dilation)}
        both["output_padding"] = (0, output_padding)
        x = torch.ones(1, 1, 2, size, dtype=torch.float64)
        weight = torch.ones(1, 1, 2, kernel, dtype=torch.float64)
        theirs = outcome(lambda *tensors, **named: conv_transpose2d(*tensors, **named).shape, x, weight, **both)
        ours = outcome(spec_output_shape, ci=1, ih=2, iw=size, co=1, kernel_size=(2, kernel), **both)
        compare_with_torch(ours, theirs)
        rejected += isinstance(theirs, Exception)
        accepted += not isinstance(theirs, Exception)
    assert accepted > 500
    assert rejected > 500


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_acceptance_of_channels_and_groups_is_torchs():
    for n, ci, co, groups in product((0, 1, 2), range(5), range(5), range(-1, 5)):
        if n == 0 and 0 in (ci, co):
            continue  # nothing of anything: torch fails with an IndexError of its inner workings
        ours = outcome(spec_output_shape, n=n, ci=ci, co=co, groups=groups)
        compare_with_torch(ours, outcome(torch_layer_output_shape, n, ci, co, groups))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool])
def test_dtypes_that_torch_does_not_implement(dtype):
    with pytest.raises(NotImplementedError) as theirs:
        conv_transpose2d(torch.ones(1, 1, 2, 2, dtype=dtype), torch.ones(1, 1, 2, 2, dtype=dtype))
    with pytest.raises(type(theirs.value), match="is not supported; use one of"):
        make(dtype=dtype)


def test_an_empty_batch_does_not_lift_the_limit_on_output_padding():
    x, weight = torch.ones(0, 4, 5, 5, dtype=torch.float64), torch.ones(4, 4, 3, 3, dtype=torch.float64)
    assert conv_transpose2d(x, weight, output_padding=1).shape == (0, 4, 8, 8)  # torch skips its check there
    with pytest.raises(SpecError, match=re.escape("output_padding=(1, 1) must be smaller than stride=(1, 1)")):
        make(n=0, output_padding=1)


def test_an_empty_output_is_rejected_whatever_the_batch():
    for n in (1, 2):
        with pytest.raises(SpecError, match="the output would be 0x0"):
            make(n=n, ih=1, iw=1, kernel_size=2, padding=1)
