import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from convt_tvm import packed, plan
from convt_tvm.errors import ArgumentTypeError, SpecError, UnsupportedDtypeError
from convt_tvm.nn import ConvTranspose2d, ReplaceReport, SkippedLayer, replace
from convt_tvm.runtime import Kernel

ARGUMENTS = {"kernel_size": 3, "stride": 2, "padding": 1}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 5)


@pytest.fixture
def layer():
    return ConvTranspose2d(3, 2, **ARGUMENTS)


@pytest.fixture
def packs(monkeypatch):
    """Shapes of the weights packed from here on."""
    shapes = []
    pack = Kernel.pack
    monkeypatch.setattr(Kernel, "pack", lambda kernel, w: shapes.append(tuple(w.shape)) or pack(kernel, w))
    return shapes


def _torch_result(layer, x, **arguments):
    """What torch computes, in float64, with the layer's parameters as they are now."""
    twin = tnn.ConvTranspose2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.groups,
        layer.bias is not None,
        layer.dilation,
        dtype=torch.float64,
    )
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        return twin(x.double(), **arguments).to(x.dtype)


def _check(layer, x, **arguments):
    with torch.no_grad():
        torch.testing.assert_close(layer(x, **arguments), _torch_result(layer, x, **arguments))


# Construction.


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
        {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2), "stride": (2, 1), "groups": 2, "bias": False},
        {
            "in_channels": 4,
            "out_channels": 2,
            "kernel_size": 4,
            "dilation": 3,
            "output_padding": 2,
            "dtype": torch.float64,
        },
    ],
)
def test_it_is_torchs_layer_with_the_same_parameters(arguments):
    torch.manual_seed(7)
    theirs = tnn.ConvTranspose2d(**arguments)
    after = torch.rand(1)
    torch.manual_seed(7)
    ours = ConvTranspose2d(**arguments)
    assert torch.equal(torch.rand(1), after)
    assert isinstance(ours, tnn.ConvTranspose2d)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = torch.randn(1, 4, 3, 4, dtype=theirs.weight.dtype)
    _check(ours, x)


def test_positional_arguments_are_in_torchs_order():
    positional = (4, 6, 3, 2, 1, 1, 2, False, 2, "zeros", "meta", torch.bfloat16)
    ours, theirs = ConvTranspose2d(*positional), tnn.ConvTranspose2d(*positional)
    names = ["kernel_size", "stride", "padding", "output_padding", "groups", "bias", "dilation", "padding_mode"]
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert (ours.weight.device.type, ours.weight.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"groups": 2}, SpecError, "ci=3 must be a multiple of groups=2"),
        ({"groups": 0}, SpecError, "groups=0 must be at least 1"),
        ({"padding_mode": "reflect"}, SpecError, "padding_mode='reflect' is not supported"),
        ({"padding": -1}, SpecError, r"padding=\(-1, -1\) must not be negative"),
        ({"stride": (1, 0)}, SpecError, r"stride=\(1, 0\) must be at least 1"),
        ({"dilation": 0}, SpecError, r"dilation=\(0, 0\) must be at least 1"),
        ({"kernel_size": 0}, SpecError, r"kernel_size=\(0, 0\) must be at least 1"),
        ({"out_channels": 0}, SpecError, "co=0 must be at least 1"),
        ({"output_padding": 2}, SpecError, r"output_padding=\(2, 2\) must be smaller than stride=\(2, 2\) or dilation"),
        ({"dtype": torch.complex64}, UnsupportedDtypeError, "dtype='complex64' is not supported"),
        ({"stride": 2.0}, ArgumentTypeError, r"stride=2\.0 must be an integer"),
        ({"padding": "same"}, ArgumentTypeError, "padding='same' must be an integer"),
    ],
)
def test_mistakes_are_named_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        ConvTranspose2d(**{"in_channels": 3, "out_channels": 2, **ARGUMENTS, **arguments})
    if error is not ArgumentTypeError:
        assert issubclass(error, ValueError)
        assert issubclass(error, RuntimeError)


def test_padding_may_crop_more_than_the_smallest_image():
    layer = ConvTranspose2d(3, 2, 3, padding=5)
    with pytest.raises(SpecError, match="the output would be"):
        layer(torch.zeros(1, 3, 4, 4))
    _check(layer, torch.randn(1, 3, 12, 10))


# Calls.


def test_one_image(layer, x):
    with torch.no_grad():
        assert torch.equal(layer(x[:1])[0], layer(x[0]))


@pytest.mark.parametrize("output_size", [(7, 9), (8, 10), (2, 2, 8, 9), torch.Size([2, 2, 7, 10]), [8, 9]])
def test_output_size(layer, x, output_size):
    layer.output_padding = (1, 1)
    _check(layer, x, output_size=output_size)
    if len(output_size) == 2:
        _check(layer, x[0], output_size=output_size)
        _check(layer, x[0], output_size=(2, *output_size))


@pytest.mark.parametrize("output_size", [(6, 9), (7, 11), (7,), (2, 2, 2, 7, 9)])
def test_output_sizes_that_torch_refuses(layer, x, output_size):
    with pytest.raises(ValueError, match=r"output_size|output size"):
        layer(x, output_size=output_size)


def test_the_memory_format_follows_the_input_and_the_weight(layer, x):
    with torch.no_grad():
        # Integers: kernels for the two formats may sum in different orders.
        x = (4 * x).round()
        for parameter in layer.parameters():
            parameter.copy_((16 * parameter).round())
        assert layer(x).is_contiguous()
        last = layer(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, layer(x))
        assert last.any()
        layer.to(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_arrays_are_refused_as_by_torch(layer, x):
    with pytest.raises(TypeError, match="weight is a Parameter and input a numpy array"):
        layer(x.numpy())


def test_hooks_run(layer, x):
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), _torch_result(layer, x) + 1)


def test_training_is_refused_at_the_backward_pass(layer, x):
    y = layer(x)
    assert y.requires_grad
    torch.testing.assert_close(y.detach(), _torch_result(layer, x))
    with pytest.raises(NotImplementedError, match=r"train with torch\.nn\.ConvTranspose2d"):
        y.sum().backward()
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


# Packed weights.


def test_the_weight_is_packed_once(layer, x, packs):
    with torch.no_grad():
        for _ in range(3):
            layer(x)
            layer(x[:1])
    with torch.inference_mode():
        layer(x)
    layer(x)
    assert len(packs) <= 2  # one for each of the two kernels, or one if they want the same order


def _optimiser_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def _in_place(layer):
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] += 1


def _share_memory(layer):
    layer.share_memory()
    _in_place(layer)


def _set_data_twice(layer):
    # The allocator is likely to give the second one the address of the weight that was packed.
    shape = layer.weight.shape
    layer.weight.data = torch.zeros(1)
    layer.weight.data = torch.randn(shape)


CHANGES = {
    "in place": _in_place,
    "load_state_dict": lambda layer: layer.load_state_dict(ConvTranspose2d(3, 2, **ARGUMENTS).state_dict()),
    "load_state_dict(assign)": lambda layer: layer.load_state_dict(
        ConvTranspose2d(3, 2, **ARGUMENTS).state_dict(), assign=True
    ),
    "optimiser": _optimiser_step,
    "new Parameter": lambda layer: setattr(layer, "weight", tnn.Parameter(torch.randn_like(layer.weight))),
    "data replaced": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "data replaced twice": _set_data_twice,
    "data drawn again": lambda layer: layer.weight.data.normal_(0.0, 0.02),
    "data copied": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "share_memory": _share_memory,
    "bias": lambda layer: layer.bias.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_of_the_parameters_are_noticed(layer, x, change):
    _check(layer, x)
    change(layer)
    _check(layer, x)
    change(layer)
    _check(layer, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_can_change(layer, x, dtype):
    _check(layer, x)
    layer.to(dtype)
    _check(layer, x.to(dtype))
    layer.weight.data.mul_(2)
    _check(layer, x.to(dtype))
    layer.float()
    _check(layer, x)


def test_a_change_that_cannot_be_noticed_can_be_announced(layer, x):
    large = ConvTranspose2d(16, 16, 3)
    image = torch.randn(1, 16, 3, 3)
    _check(large, image)
    large.weight.data[1, 1, 0, 0] += 1
    large.forget_packed()
    _check(large, image)


def test_a_weight_made_in_inference_mode_is_packed_at_each_call(x):
    with torch.inference_mode():
        layer = ConvTranspose2d(3, 2, **ARGUMENTS)
        before = layer(x)
        layer.weight[0, 0, 0, 0] += 1
        assert not torch.equal(layer(x), before)


def test_many_image_sizes_keep_few_packed_weights(layer, monkeypatch):
    monkeypatch.setattr(packed, "_PACKINGS_KEPT", 1)
    for size in (2, 9, 20):
        _check(layer, torch.randn(1, 3, size, size))
        assert len(layer._packed._packed) == 1


def test_packed_weights_are_no_part_of_the_state(layer, x):
    fresh = pickle.dumps(layer)
    _check(layer, x)
    assert layer._packed is not None
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert "_packed" not in layer.__getstate__()
    assert abs(len(pickle.dumps(layer)) - len(fresh)) < 100
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), _saved_and_loaded(layer)):
        assert type(twin) is ConvTranspose2d
        assert twin._packed is None
        assert torch.equal(twin.weight, layer.weight)
        with torch.no_grad():
            twin.weight.zero_()
        _check(twin, x)
        _check(layer, x)


def _saved_and_loaded(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_weights_that_share_memory_do_not_share_packed_ones(x):
    first, second = ConvTranspose2d(3, 2, **ARGUMENTS), ConvTranspose2d(3, 2, **ARGUMENTS)
    second.weight = first.weight
    _check(first, x)
    _check(second, x)
    _in_place(first)
    _check(first, x)
    _check(second, x)


def test_threads_share_a_layer(layer, x):
    expected = _torch_result(layer, x)
    with torch.no_grad():
        before = layer(x)

    def call(i):
        with torch.inference_mode():
            if i % 5 == 0:
                layer.forget_packed()
            return layer(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(40)))
    assert all(torch.equal(result, before) for result in results)
    torch.testing.assert_close(before, expected)


# Compiled and exported.


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_to_one_graph(layer, x, dynamic):
    model = tnn.Sequential(layer, tnn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), _torch_result(layer, x).relu())
        _in_place(layer)
        torch.testing.assert_close(compiled(x), _torch_result(layer, x).relu())


def test_torch_compile_with_inductor(layer, x):
    # The operator alone: with more around it inductor spends 20 s on compiling C++.
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), _torch_result(layer, x))
        last = compiled(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, _torch_result(layer, x))
        assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_with_any_batch_and_image(layer, x, strict):
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": sizes}, strict=strict)
    other = torch.randn(3, 3, 6, 2)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), _torch_result(layer, other))


def test_tracing_keeps_the_operator(layer, x):
    traced = torch.jit.trace(layer, (x,))
    assert "convt_tvm::conv_transpose2d" in str(traced.graph)
    fx = torch.fx.symbolic_trace(tnn.Sequential(layer))
    with torch.no_grad():
        other = x + 1
        assert torch.equal(traced(other), layer(other))
        assert torch.equal(fx(other), layer(other))


# from_torch.


def test_from_torch_shares_the_parameters(x):
    theirs = tnn.ConvTranspose2d(3, 2, 3, 2, 1, 1, bias=False).eval()
    ours = ConvTranspose2d.from_torch(theirs)
    assert type(ours) is ConvTranspose2d
    assert ours.weight is theirs.weight
    assert ours.bias is None
    assert not ours.training
    _check(ours, x)
    assert isinstance(ConvTranspose2d.from_torch(ours), ConvTranspose2d)


def test_from_torch_refuses_what_it_cannot_share():
    with pytest.raises(ArgumentTypeError, match=r"Conv2d is no torch\.nn\.ConvTranspose2d"):
        ConvTranspose2d.from_torch(tnn.Conv2d(3, 2, 3))
    with pytest.raises(ArgumentTypeError, match="cannot be taken over: it is parametrised"):
        ConvTranspose2d.from_torch(parametrizations.weight_norm(tnn.ConvTranspose2d(3, 2, 3)))


# replace.


class Model(tnn.Module):
    """Two layers, one of them used twice under two names, and batch normalisation."""

    def __init__(self):
        super().__init__()
        self.up = tnn.Sequential(tnn.ConvTranspose2d(3, 4, 2, 2), tnn.BatchNorm2d(4), tnn.ReLU())
        self.head = tnn.ConvTranspose2d(4, 4, 3)
        self.again = self.head
        self.held = [self.head]

    def forward(self, x):
        return {"y": self.again(self.head(self.up(x))), "n": x.shape[0]}


def test_replace_swaps_layers_in_place_and_restore_brings_them_back(x):
    model = Model()
    before = model.eval()(x)["y"].detach()
    parameters = list(model.parameters())
    report = replace(model)
    assert report.replaced == ("up.0", "head", "again")
    assert report.skipped == ()
    assert report.max_difference is None
    assert type(model.head) is ConvTranspose2d
    assert model.head is model.again is model.held[0]
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(x)["y"], before)
    assert replace(model) == ReplaceReport((), ())
    report.restore()
    report.restore()
    assert type(model.head) is type(model.up[0]) is tnn.ConvTranspose2d
    assert "_packed" not in vars(model.head)
    assert torch.equal(model(x)["y"].detach(), before)


def test_replace_takes_the_model_itself(x):
    model = tnn.ConvTranspose2d(3, 2, 3)
    report = replace(model, x)
    assert report.replaced == ("",)
    assert type(model) is ConvTranspose2d
    assert "(the model itself)" in str(report)
    _check(model, x)


def test_replace_keeps_hooks_and_changes_made_in_between(x):
    model = tnn.Sequential(tnn.ConvTranspose2d(3, 2, 3))
    calls = []
    before = model[0].register_forward_hook(lambda *_: calls.append("before"))
    report = replace(model)
    model[0].register_forward_hook(lambda *_: calls.append("after"))
    weight = model[0].weight = tnn.Parameter(torch.ones_like(model[0].weight))
    with torch.no_grad():
        model(x)
        report.restore()
        before.remove()
        model(x)
    assert calls == ["before", "after", "after"]
    assert model[0].weight is weight


def test_an_example_builds_the_kernels_and_compares_the_outputs(x, monkeypatch):
    model = Model().train()
    model.up[1].eval()
    statistics = model.up[1].running_mean.clone()
    random = torch.get_rng_state()
    report = replace(model, x)
    assert 0 <= report.max_difference < 1e-5
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.up[1].running_mean, statistics)
    assert (model.training, model.up[1].training, model.head.training) == (True, False, True)
    monkeypatch.setattr(plan, "cached_kernel", lambda spec: pytest.fail(f"built {spec}"))
    model(x)


@pytest.mark.parametrize("given", ["tensor", "tuple", "mapping"])
def test_examples_can_be_a_tensor_arguments_or_keywords(x, given):
    example = {"tensor": x, "tuple": (x,), "mapping": {"x": x}}[given]
    assert replace(Model(), example).max_difference is not None


def test_a_wrong_result_would_show(x, monkeypatch):
    monkeypatch.setattr(Kernel, "pack", lambda kernel, w, pack=Kernel.pack: pack(kernel, w * 1.5))
    assert replace(Model(), x).max_difference > 1e-2


def test_equal_infinities_are_no_difference():
    model = tnn.Sequential(tnn.ConvTranspose2d(1, 1, 1, bias=False))
    image = torch.tensor([[[[float("inf"), float("nan")]]]])
    assert replace(model, image).max_difference == 0.0


def test_a_failing_example_restores_the_model(x):
    model = Model()
    with pytest.raises(RuntimeError, match="channels"):
        replace(model, x[:, :2])
    assert type(model.head) is tnn.ConvTranspose2d

    def fail(module, *_):
        if isinstance(module, ConvTranspose2d):
            raise KeyError("hook")

    model.head.register_forward_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        replace(model, x)
    assert type(model.head) is type(model.up[0]) is tnn.ConvTranspose2d


def _replaced_forward():
    module = tnn.ConvTranspose2d(3, 2, 3)
    module.forward = lambda x: x
    return module


class Subclass(tnn.ConvTranspose2d):
    pass


class Double(tnn.Module):
    def forward(self, weight):
        return 2 * weight


def _parametrised():
    module = tnn.ConvTranspose2d(3, 2, 3)
    parametrize.register_parametrization(module, "weight", Double())
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "make, reason",
    [
        (_parametrised, "it is parametrised; remove_parametrizations first"),
        (lambda: weight_norm(tnn.ConvTranspose2d(3, 2, 3)), "its weight is computed at each call; fold it first"),
        (lambda: prune.l1_unstructured(tnn.ConvTranspose2d(3, 2, 3), "weight", 0.5), "its weight is computed"),
        (lambda: prune.l1_unstructured(tnn.ConvTranspose2d(3, 2, 3), "bias", 0.5), "its weight is computed"),
        (lambda: Subclass(3, 2, 3), "it is a Subclass, a subclass that may compute something else"),
        (lambda: tnn.LazyConvTranspose2d(2, 3), "it is a LazyConvTranspose2d"),
        (_replaced_forward, "its forward was replaced by another function"),
        (lambda: tnn.ConvTranspose2d(3, 2, 3, device="meta"), "it is on meta; the kernels run on CPUs and CUDA GPUs"),
        (lambda: tnn.ConvTranspose2d(3, 2, 3, dtype=torch.complex64), "dtype='complex64' is not supported"),
        (lambda: tnn.ConvTranspose2d(3, 2, 3, output_padding=5), r"output_padding=\(5, 5\) must be smaller"),
    ],
)
def test_layers_that_cannot_be_replaced_are_named_with_the_reason(make, reason):
    model = tnn.Sequential(make(), tnn.ConvTranspose2d(2, 2, 3))
    kind = type(model[0])
    report = replace(model)
    assert type(model[0]) is kind
    assert report.replaced == ("1",)
    assert [skipped.name for skipped in report.skipped] == ["0"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.skipped[0].reason)


def test_replace_wants_a_module():
    with pytest.raises(ArgumentTypeError, match=r"model is a list; pass a torch\.nn\.Module"):
        replace([tnn.ConvTranspose2d(3, 2, 3)])


def test_the_report_prints_as_text():
    report = ReplaceReport(("up.0", "head"), (SkippedLayer("norm", "it is odd"),), 1.25e-6)
    assert str(report) == (
        "replaced 2 layers\n  up.0\n  head\nskipped 1\n  norm: it is odd\nlargest difference of the outputs: 1.25e-06"
    )
    assert str(ReplaceReport(("a",), ())) == "replaced 1 layer\n  a"
    assert "_layers" not in repr(report)
