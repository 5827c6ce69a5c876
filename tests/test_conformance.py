"""PyTorch's own samples of the operator and the layer, and what PyTorch rejects, taken from it at test time."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from convt_tvm import plan
from convt_tvm.functional import conv_transpose2d
from convt_tvm.nn import ConvTranspose2d

OPERATORS = [op for op in op_db if op.name == "nn.functional.conv_transpose2d"]
MODULES = [info for info in module_db if info.module_cls is torch.nn.ConvTranspose2d]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def _operator_samples():
    # Drawn only when the test runs; here, their number.
    for op, dtype in itertools.product(OPERATORS, DTYPES):
        for i, _ in enumerate(op.sample_inputs("cpu", dtype)):
            yield pytest.param(op, dtype, i, id=f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}-{i}")


def test_torch_has_samples():
    assert len(OPERATORS) == 1
    assert len(MODULES) == 1
    assert len(list(_operator_samples())) >= 4 * 8


@pytest.mark.parametrize("op, dtype, i", list(_operator_samples()))
def test_operator_samples(op, dtype, i):
    sample = next(itertools.islice(op.sample_inputs("cpu", dtype), i, None))
    expected = op(sample.input.double(), *map(_double, sample.args), **sample.kwargs)
    y = conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
    assert y.dtype == dtype
    assert y.stride() == op(sample.input, *sample.args, **sample.kwargs).stride()
    # torch's default tolerance of the dtype. The kernels keep sums in float32 or better, so it holds for float16 too.
    torch.testing.assert_close(y, expected.to(dtype))
    if dtype != torch.bfloat16:
        arrays = [v.numpy() if isinstance(v, torch.Tensor) else v for v in (sample.input, *sample.args)]
        assert torch.equal(torch.from_numpy(conv_transpose2d(*arrays, **sample.kwargs)), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("view", ["noncontiguous", "neg"])
def test_operator_samples_as_views(dtype, view):
    for op in OPERATORS:
        for sample in op.sample_inputs("cpu", dtype):
            if view == "noncontiguous":
                other = sample.noncontiguous()
            else:
                other = sample.transform(lambda t: torch._neg_view(-t) if isinstance(t, torch.Tensor) else t)
            expected = conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
            y = conv_transpose2d(other.input, *other.args, **other.kwargs)
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_module_samples(dtype, training):
    for info in MODULES:
        samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
        assert samples
        for sample in samples:
            make, call = sample.constructor_input, sample.forward_input
            torch.manual_seed(0)
            theirs = info.module_cls(*make.args, **make.kwargs, dtype=dtype).train(training)
            torch.manual_seed(0)
            ours = ConvTranspose2d(*make.args, **make.kwargs, dtype=dtype).train(training)
            for name, value in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], value)
            with torch.no_grad():
                y = ours(*call.args, **call.kwargs)
                torch.testing.assert_close(y, theirs.double()(*map(_double, call.args), **call.kwargs).to(dtype))
                if sample.reference_fn is not None:
                    expected = sample.reference_fn(ours, *call.args, **call.kwargs)
                    torch.testing.assert_close(y, expected)


# torch 2.13 has no error inputs for this operator or module; these follow its checks. N = 1 goes to torch's native
# path and N = 2 to oneDNN, which check different things.


def _error_inputs():
    w, b = torch.randn(4, 6, 3, 3), torch.randn(6)
    for n in (1, 2):
        x = torch.randn(n, 4, 5, 5)
        tensors = {
            "too few dimensions": (x[0, 0], w, b),
            "too many dimensions": (x[None], w, b),
            "3-D weight": (x, w[..., 0], b),
            "other channels": (x[:, :3], w, b),
            "short bias": (x, w, b[:5]),
            "2-D bias": (x, w, b[:, None]),
            "no rows": (x[:, :, :0], w, b),
            "no input channels": (x[:, :0], w[:0], b),
            "no output channels": (x, w[:, :0], None),
            "no kernel": (x, w[:, :, :0], b),
            "dtypes": (x, w.double(), b),
            "dtypes of half": (x, w.half(), None),
            "int32": (x.int(), w.int(), b.int()),
            "int8": (x.char(), w.char(), None),
            "uint8": (x.byte(), w.byte(), None),
            "bool": (x.bool(), w.bool(), None),
            "float8": (x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), None),
            "array as weight": (x, w.numpy(), b),
            "no weight": (x, None, b),
            "number as bias": (x, w, 1.0),
            "sparse": (x.to_sparse(), w, None),
        }
        for name, arguments in tensors.items():
            yield f"{name}, n={n}", arguments, {}
        parameters = [
            {"stride": 0},
            {"stride": -1},
            {"stride": (1, 0)},
            {"stride": (1, 1, 1)},
            {"stride": ()},
            {"stride": 1.0},
            {"stride": (1.0, 1)},
            {"stride": True},
            {"stride": None},
            {"padding": -1},
            {"padding": "same"},
            {"padding": 4},
            {"padding": (0, 5)},
            {"output_padding": -1},
            {"output_padding": 1},
            {"output_padding": (0, 3), "stride": 3, "dilation": 2},
            {"groups": 0},
            {"groups": -2},
            {"groups": 3},
            {"groups": 1.0},
            {"groups": True},
            {"dilation": 0},
            {"dilation": -1},
            {"dilation": (1, 2, 3)},
        ]
        for kwargs in parameters:
            yield f"{kwargs}, n={n}", (x, w, b), kwargs


@pytest.mark.parametrize(
    "arguments, kwargs", [pytest.param(args, kwargs, id=name) for name, args, kwargs in _error_inputs()]
)
def test_error_inputs_raise_torchs_types(arguments, kwargs, monkeypatch):
    monkeypatch.setattr(plan, "cached_kernel", lambda spec: pytest.fail(f"built {spec}"))
    with pytest.raises(Exception) as theirs:
        F.conv_transpose2d(*arguments, **kwargs)
    with pytest.raises(theirs.type):
        conv_transpose2d(*arguments, **kwargs)
    with pytest.raises((ValueError, TypeError)):
        conv_transpose2d(*arguments, **kwargs)


MODULE_ERRORS = [
    {"groups": 0},
    {"groups": -1},
    {"groups": 3},
    {"groups": 2, "out_channels": 5},
    {"padding_mode": "reflect"},
    {"padding_mode": "nonsense"},
    {"padding": -1},
    {"output_padding": 1},
    {"output_padding": -1},
    {"stride": 0},
    {"dilation": 0},
    {"kernel_size": 0},
    {"out_channels": 0},
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("arguments", MODULE_ERRORS, ids=str)
def test_module_errors_raise_torchs_types(arguments):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments}
    with pytest.raises(Exception) as theirs:
        torch.nn.ConvTranspose2d(**arguments)(torch.randn(1, 4, 5, 5))
    # At construction, where torch waits for the first call with some of them.
    with pytest.raises(theirs.type):
        ConvTranspose2d(**arguments)
