import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from convt_tvm import plan
from convt_tvm.errors import ArgumentError, ArgumentTypeError, SpecError, UnsupportedDtypeError
from convt_tvm.functional import conv_transpose2d

OPERATOR = torch.ops.convt_tvm.conv_transpose2d.default
PARAMETERS = {"stride": 2, "padding": 1, "output_padding": (0, 1)}
AS_LISTS = ([2, 2], [1, 1], [0, 1], 1, [1, 1])


def _tensors(dtype=torch.float32, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, 3, 4, 5), (3, 2, 3, 3), (2,)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _expected(x, w, b, **parameters):
    return F.conv_transpose2d(x.double(), w.double(), None if b is None else b.double(), **parameters).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tensors_of_every_dtype(dtype):
    x, w, b = _tensors(dtype)
    y = conv_transpose2d(x, w, b, **PARAMETERS)
    assert type(y) is torch.Tensor
    assert not y.requires_grad
    torch.testing.assert_close(y, _expected(x, w, b, **PARAMETERS))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_arrays(dtype):
    x, w, b = (t.numpy().astype(dtype) for t in _tensors())
    expected = _expected(*map(torch.from_numpy, (x, w, b)), **PARAMETERS).numpy()
    y = conv_transpose2d(x, w, b, **PARAMETERS)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, expected, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-3)
    np.testing.assert_array_equal(conv_transpose2d(x, w, b, **PARAMETERS), y)
    assert conv_transpose2d(x[:0], w, b, **PARAMETERS).shape == (0, *y.shape[1:])


def test_a_single_image():
    x, w, b = _tensors(n=1)
    batched = conv_transpose2d(x, w, b, **PARAMETERS)
    assert torch.equal(conv_transpose2d(x[0], w, b, **PARAMETERS), batched[0])
    array = conv_transpose2d(x[0].numpy(), w.numpy(), b.numpy(), **PARAMETERS)
    np.testing.assert_array_equal(array, batched[0].numpy())


def test_parameters_are_positional_in_torchs_order():
    x, w, b = _tensors()
    expected = F.conv_transpose2d(x, w, b, 2, 1, (0, 1), 1, 1)
    torch.testing.assert_close(conv_transpose2d(x, w, b, 2, 1, (0, 1), 1, 1), expected)
    for stride in ([2], (2, 2), [2, 2], torch.tensor(2), np.int64(2), torch.Size([2, 2])):
        torch.testing.assert_close(conv_transpose2d(x, w, b, stride, 1, (0, 1)), expected)


def test_inputs_are_left_alone_and_share_nothing_with_the_result():
    inputs = _tensors()
    before = [t.clone() for t in inputs]
    y = conv_transpose2d(*inputs, **PARAMETERS)
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))
    again = conv_transpose2d(*inputs, **PARAMETERS)
    y.zero_()
    assert all(torch.equal(t, old) for t, old in zip(inputs, before, strict=True))
    torch.testing.assert_close(again, _expected(*inputs, **PARAMETERS))


def test_strides_offsets_and_pending_negation_do_not_change_a_bit():
    x, w, b = _tensors()
    plain = conv_transpose2d(x, w, b, **PARAMETERS)
    strided = torch.zeros(2, 6, 8, 11)[:, ::2, 1::2, 1::2]
    strided.copy_(x)
    offset = torch.zeros(w.numel() + 1)[1:].view_as(w).copy_(w)
    negated = torch.complex(b, -b).conj().imag
    assert negated.is_neg()
    for inputs in ((strided, w, b), (x, offset, b), (x, w, negated), (strided, w.mT.contiguous().mT, b)):
        assert torch.equal(conv_transpose2d(*inputs, **PARAMETERS), plain)
    one = x[:1, :, :1, :1]
    assert torch.equal(
        conv_transpose2d(one.expand(2, 3, 4, 5), w, b, **PARAMETERS),
        conv_transpose2d(one.expand(2, 3, 4, 5).contiguous(), w, b, **PARAMETERS),
    )


def _layouts():
    x, w, _ = _tensors()
    last = torch.channels_last
    yield "both contiguous", x, w
    yield "input channels_last", x.to(memory_format=last), w
    yield "weight channels_last", x, w.to(memory_format=last)
    yield "slice of channels_last", torch.randn(2, 6, 8, 9).to(memory_format=last)[:, ::2, 2:6, 2:7], w
    yield "one image", x[0], w
    yield "one image, weight channels_last", x[0], w.to(memory_format=last)
    yield "one input channel", torch.randn(2, 1, 4, 5), torch.randn(1, 2, 3, 3)
    yield "one input channel, channels_last", torch.randn(2, 1, 4, 5).to(memory_format=last), torch.randn(1, 2, 3, 3)
    yield "one output channel", x, torch.randn(3, 1, 3, 3)
    yield "one output channel, channels_last", x, torch.randn(3, 1, 3, 3).to(memory_format=last)
    yield "one pixel", x[:, :, :1, :1].contiguous(), w
    yield "expanded", x[:, :, :1, :1].expand(2, 3, 4, 5), w
    yield "transposed", x.mT, w


@pytest.mark.parametrize("x, w", [pytest.param(x, w, id=name) for name, x, w in _layouts()])
def test_the_memory_format_is_torchs(x, w):
    expected = F.conv_transpose2d(x, w, None, stride=2)
    y = conv_transpose2d(x, w, None, stride=2)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)
    fake = conv_transpose2d(x.to("meta"), w.to("meta"), None, stride=2)
    assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())


@pytest.mark.parametrize(
    "shape, parameters",
    [
        ((0, 3, 4, 5), {}),
        ((0, 3, 4, 5), {"output_padding": 7}),
        ((0, 3, 0, 5), {}),
        ((0, 3, 1, 1), {"padding": (1, 1)}),
    ],
)
def test_an_empty_batch(shape, parameters):
    x, w, b = torch.empty(shape), *_tensors()[1:]
    if parameters.get("padding"):
        w = w[:, :, :2, :2]
    expected = F.conv_transpose2d(x, w, b, **parameters)
    y = conv_transpose2d(x, w, b, **parameters)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert conv_transpose2d(x.numpy(), w.numpy(), b.numpy(), **parameters).shape == expected.shape
    assert conv_transpose2d(x.to("meta"), w, b, **parameters).shape == expected.shape


def _error_cases():
    x, w, b = _tensors()
    yield (x[0, 0], w, b), {}, ArgumentError, r"input of shape \(4, 5\) must be \(n, ci, ih, iw\)"
    yield (x, w[0], b), {}, ArgumentError, r"weight of shape \(2, 3, 3\) must be \(ci, co/groups, kh, kw\)"
    yield (x[:, :2], w, b), {}, ArgumentError, r"\(2, 2, 4, 5\) has 2 channels and weight of shape .* takes 3"
    yield (x, w, b[:1]), {}, ArgumentError, r"bias of shape \(1,\) must be \(2,\)"
    yield (x, w.double(), b), {}, ArgumentError, r"weight is torch.float64 and input torch.float32; .*weight.to\("
    yield (x, w, b.half()), {}, ArgumentError, r"bias is torch.float16 and input torch.float32"
    yield (x.to_sparse(), w, b), {}, ArgumentError, r"input has the layout torch.sparse_coo"
    yield (x.numpy(), w.double().numpy(), None), {}, ArgumentError, r"weight is float64 and input float32; .*astype"
    yield (x, w.numpy(), b), {}, ArgumentTypeError, "weight is a ndarray; pass input, weight and bias as torch tensors"
    yield (x.numpy(), w, None), {}, ArgumentTypeError, "weight is a Tensor and input a numpy array"
    yield (x.numpy(), w.numpy(), b), {}, ArgumentTypeError, "bias is a Tensor and input a numpy array"
    yield ([1.0], w, b), {}, ArgumentTypeError, "input is a list"
    yield (x, None, b), {}, ArgumentTypeError, "weight is a NoneType"
    yield (x, w, 1.0), {}, ArgumentTypeError, "bias is a float"
    yield (
        (x.long(), w.long(), b.long()),
        {},
        UnsupportedDtypeError,
        "dtype='int64' is not supported; use one of float32",
    )
    yield (x.cfloat(), w.cfloat(), None), {}, UnsupportedDtypeError, "'complex64'"
    yield (x.numpy().astype(">f4"), w.numpy().astype(">f4"), None), {}, UnsupportedDtypeError, "'>f4'"
    yield (x, w, b), {"groups": 0}, SpecError, "groups=0 must be at least 1"
    yield (x, w, None), {"groups": 2}, SpecError, "ci=3 must be a multiple of groups=2"
    yield (x, w, b), {"stride": 0}, SpecError, r"stride=\(0, 0\)"
    yield (x, w, b), {"dilation": (1, 0)}, SpecError, r"dilation=\(1, 0\)"
    yield (x, w, b), {"padding": -1}, SpecError, r"padding=\(-1, -1\) must not be negative"
    yield (x, w, b), {"output_padding": (0, 2), "stride": 2}, SpecError, r"output_padding=\(0, 2\) must be smaller"
    yield (x[:0], w, b), {"output_padding": -1}, SpecError, r"output_padding=\(-1, -1\) must not be negative"
    yield (x, w, b), {"padding": 9}, SpecError, "the output would be -12x-11"
    yield (x[:0], w, b), {"padding": 9}, SpecError, "the output would be -12x-11"
    yield (x, w, b), {"stride": (1, 2, 3)}, SpecError, r"stride=\(1, 2, 3\) must be an integer or two of them"
    yield (x, w, b), {"stride": 1.0}, ArgumentTypeError, "stride=1.0 must be an integer, not float"
    yield (x, w, b), {"stride": (1, True)}, ArgumentTypeError, "stride=True must be an integer, not bool"
    yield (x, w, b), {"padding": "same"}, ArgumentTypeError, "padding='same' must be an integer, not str"
    yield (x, w, b), {"groups": True}, ArgumentTypeError, "groups=True must be an integer, not bool"


@pytest.mark.parametrize("arguments, parameters, error, message", list(_error_cases()))
def test_mistakes_are_named_before_any_work(arguments, parameters, error, message, monkeypatch):
    x, w, b = _tensors()
    # A valid call that is equal to some of the mistakes, as 1 == 1.0 == True, must not open the way for them.
    conv_transpose2d(x, w, b)
    monkeypatch.setattr(plan, "cached_kernel", lambda spec, target: pytest.fail(f"built {spec}"))
    with pytest.raises(error, match=message):
        conv_transpose2d(*arguments, **parameters)


def test_another_device_is_named():
    with FakeTensorMode():
        inputs = [torch.empty(t.shape, device="xpu") for t in _tensors()]
        with pytest.raises(ArgumentError, match=r"input is on xpu:0; the kernels run on CPUs and CUDA GPUs: move it"):
            conv_transpose2d(*inputs)


def test_a_compiler_sees_the_device_of_the_output():
    with FakeTensorMode():
        assert conv_transpose2d(*(torch.empty(t.shape, device="cuda") for t in _tensors())).device.type == "cuda"


def test_the_default_device_does_not_matter():
    # Integers: a kernel for another format may sum in another order.
    x, w, b = ((4 * tensor).round() for tensor in _tensors())
    expected = conv_transpose2d(x, w, b, **PARAMETERS)
    with torch.device("meta"):
        assert torch.equal(conv_transpose2d(x, w, b, **PARAMETERS), expected)
        w = w.to(memory_format=torch.channels_last)
        assert torch.equal(conv_transpose2d(x, w, b, **PARAMETERS), expected)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"padding": 9}, "the output would be -12x-11"),
        ({"output_padding": 3}, "output_padding"),
        ({"groups": 0}, "groups"),
    ],
)
def test_the_fake_kernel_makes_the_same_checks(parameters, message):
    x, w, b = (t.to("meta") for t in _tensors())
    with pytest.raises(SpecError, match=message):
        conv_transpose2d(x, w, b, **parameters)
    with pytest.raises(ArgumentError, match="takes 3"):
        conv_transpose2d(x[:, :2], w, b)
    with pytest.raises(ArgumentError, match=r"weight is torch\.float64"):
        conv_transpose2d(x, w.double(), b)


def test_a_known_call_asks_for_no_kernel(monkeypatch):
    asked = []
    find = plan.cached_kernel
    monkeypatch.setattr(plan, "cached_kernel", lambda spec, target: asked.append(spec) or find(spec, target))
    monkeypatch.setattr(plan, "_plans", {})
    x, w, b = _tensors()
    for _ in range(3):
        conv_transpose2d(x, w, b, **PARAMETERS)
        conv_transpose2d(x.numpy(), w.numpy(), b.numpy(), **PARAMETERS)
    assert len(asked) == 2
    assert len(plan._plans) == 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_PLANS_KEPT", 2)
    _, w, b = _tensors()
    for size in range(1, 6):
        conv_transpose2d(torch.empty(0, 3, size, size), w, b)
        assert len(plan._plans) <= 2


# Gradients are refused, never wrong.


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(
    "call", [conv_transpose2d, lambda x, w, b: OPERATOR(x, w, b, [1, 1], [0, 0], [0, 0], 1, [1, 1])]
)
def test_the_backward_pass_is_refused(which, call):
    inputs = list(_tensors())
    inputs[which].requires_grad_()
    y = call(*inputs)
    assert y.requires_grad
    with pytest.raises(NotImplementedError, match=r"no derivatives of conv_transpose2d: train with torch\.nn"):
        y.sum().backward()
    with torch.no_grad():
        assert not call(*inputs).requires_grad
    with torch.inference_mode():
        assert call(*inputs).is_inference()
    assert torch.equal(y, call(*inputs).detach())


def test_forward_mode_is_refused():
    x, w, b = _tensors()
    with forward_ad.dual_level():
        conv_transpose2d(x, w, b)
        with pytest.raises(NotImplementedError, match="weight is being differentiated"):
            conv_transpose2d(x, forward_ad.make_dual(w, w), b)


def test_function_transforms_are_refused():
    x, w, b = _tensors()
    with pytest.raises(NotImplementedError, match="input is being differentiated"):
        torch.func.jvp(lambda x: conv_transpose2d(x, w, b), (x,), (x,))
    with pytest.raises(NotImplementedError, match="bias is being differentiated"):
        torch.func.grad(lambda b: conv_transpose2d(x, w, b).sum())(b)


# Through torch's dispatcher.


def _operator_samples():
    x, w, b = _tensors()
    yield "batch", (x, w, b, *AS_LISTS)
    yield "one image", (x[0], w, b, *AS_LISTS)
    yield "no bias", (x, w, None, *AS_LISTS)
    yield "channels_last", (x.to(memory_format=torch.channels_last), w, b, *AS_LISTS)
    yield "empty", (x[:0], w, b, *AS_LISTS)
    yield "bfloat16", (x.bfloat16(), w.bfloat16(), b.bfloat16(), *AS_LISTS)


@pytest.mark.parametrize("arguments", [pytest.param(arguments, id=name) for name, arguments in _operator_samples()])
def test_opcheck(arguments):
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_to_one_graph(dynamic):
    x, w, b = _tensors()
    compiled = torch.compile(
        lambda x: conv_transpose2d(x.relu(), w, b, **PARAMETERS) + 1,
        backend="aot_eager",
        fullgraph=True,
        dynamic=dynamic,
    )
    torch.testing.assert_close(compiled(x), _expected(x.relu(), w, b, **PARAMETERS) + 1)


def test_autocast():
    x, w, b = _tensors()
    expected = conv_transpose2d(x.bfloat16(), w.bfloat16(), b.bfloat16(), **PARAMETERS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv_transpose2d(x, w, b, **PARAMETERS), expected)
        assert torch.equal(conv_transpose2d(x.bfloat16(), w, b, **PARAMETERS), expected)
        double = conv_transpose2d(x.double(), w.double(), b.double(), **PARAMETERS)
    assert double.dtype == torch.float64


def test_vmap():
    x, w, b = _tensors()
    y = torch.func.vmap(lambda image: conv_transpose2d(image, w, b, **PARAMETERS))(x)
    torch.testing.assert_close(y, conv_transpose2d(x, w, b, **PARAMETERS))


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_and_subclasses_see_the_operator():
    x, w, b = _tensors()
    with _Names() as seen:
        conv_transpose2d(x, w, b, **PARAMETERS)
    assert "convt_tvm.conv_transpose2d.default" in seen.names

    class Subclass(torch.Tensor):
        pass

    y = conv_transpose2d(x.as_subclass(Subclass), w, b, **PARAMETERS)
    assert type(y) is Subclass
    assert torch.equal(y.as_subclass(torch.Tensor), conv_transpose2d(x, w, b, **PARAMETERS))
