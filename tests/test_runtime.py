"""Loading and calling kernels: every kind of argument, every kind of damage."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import convt_tvm
from convt_tvm import artifact, runtime, threads
from convt_tvm.arguments import NUMPY
from convt_tvm.artifact import publish, read_manifest
from convt_tvm.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArtifactCorruptError,
    ArtifactError,
    ArtifactNotFoundError,
    IncompatibleMachineError,
)
from convt_tvm.manifest import KERNEL_FILE, RUNTIME_FILE
from convt_tvm.processor import host_features
from convt_tvm.runtime import Kernel, get_num_threads, load, set_num_threads
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

ROOT = Path(convt_tvm.__file__).parent.parent
SIZES = dict(n=2, ci=4, ih=3, iw=5, co=6, kernel_size=3, stride=2, padding=1, output_padding=1)


def spec_of(**changes):
    return ConvTranspose2dSpec(**SIZES | changes)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """A function from a spec to the directory of its artifact, built once."""
    from convt_tvm.compiler import build_artifact

    made = {}

    def get(spec):
        if spec not in made:
            made[spec] = tmp_path_factory.mktemp("artifact") / spec.name
            build_artifact(spec, "llvm", made[spec])
        return made[spec]

    return get


@pytest.fixture(scope="session")
def directory(artifacts):
    return artifacts(spec_of())


@pytest.fixture(scope="session")
def kernel(directory):
    return load(directory)


@pytest.fixture(autouse=True)
def _threads():
    """Each test starts and ends with the default number of threads."""
    yield
    threads.required.num_threads = None
    threads.required.setting += 1


def draw(spec, seed=0):
    """Small integers, so that every sum is exact in every dtype and bits can be compared."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def make(shape):
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    return make(spec.input_shape), make(spec.weight_shape), make(spec.bias_shape) if spec.bias else None


def expected(spec, input, weight, bias):
    options = dict(stride=spec.stride, padding=spec.padding, output_padding=spec.output_padding)
    result = torch.nn.functional.conv_transpose2d(
        input.double(), weight.double(), None if bias is None else bias.double(), **options
    )
    return result.to(getattr(torch, spec.dtype))


def to_numpy(tensor):
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.uint16).numpy().view(pytest.importorskip("ml_dtypes").bfloat16)


def same(left, right):
    """Equal bit for bit, by kind, shape and dtype too."""
    if isinstance(left, np.ndarray):
        return type(left) is type(right) and left.dtype == right.dtype and np.array_equal(left, right)
    return left.dtype is right.dtype and torch.equal(left, right)


def _fail(*_, **__):
    raise AssertionError("called")


DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_arrays_of_each_dtype_give_the_exact_result_in_kind(artifacts, dtype, bias):
    spec = spec_of(dtype=dtype, bias=bias)
    kernel = load(artifacts(spec))
    arguments = draw(spec)
    wanted = expected(spec, *arguments)
    for convert in (lambda tensor: tensor, to_numpy):
        x, w, b = (None if tensor is None else convert(tensor) for tensor in arguments)
        packed = kernel.pack(w)
        assert type(packed) is type(x)
        assert tuple(packed.shape) == kernel.manifest.packed_shape
        assert str(packed.dtype).removeprefix("torch.") == kernel.manifest.packed_dtype
        for weight in (w, packed):
            assert same(kernel(x, weight, b), convert(wanted))
            out = convert(torch.full(spec.output_shape, 7.0, dtype=wanted.dtype))
            assert kernel(x, weight, b, out=out) is out
            assert same(out, convert(wanted))


def _misaligned(tensor):
    """The same values at an address that is no multiple of the element's size."""
    buffer = bytearray(tensor.nbytes + 1)
    moved = torch.frombuffer(buffer, dtype=torch.uint8)[1:]
    moved.copy_(tensor.contiguous().flatten().view(torch.uint8))
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)


class Subclass(torch.Tensor):
    pass


TENSOR_FORMS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last) if t.ndim == 4 else t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
    "element-aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "misaligned": _misaligned,
    "requires grad": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "subclass": lambda t: t.clone().as_subclass(Subclass),
    "negated view": lambda t: torch._neg_view(-t),
    "conjugate's imaginary part": lambda t: torch.complex(t * 0, -t).conj().imag,
    "unusual strides of size-1 axes": lambda t: t.clone().unsqueeze(0).as_strided((1, *t.shape), (77, *t.stride()))[0],
}


@pytest.mark.parametrize("form", TENSOR_FORMS)
def test_tensors_of_every_form_are_read(kernel, form):
    arguments = draw(kernel.spec)
    wanted = expected(kernel.spec, *arguments)
    plain = [arguments[0], kernel.pack(arguments[1]), arguments[2]]
    change = TENSOR_FORMS[form]
    assert same(kernel.pack(change(arguments[1])), plain[1])
    for place in range(3):
        changed = [change(value) if index == place else value for index, value in enumerate(plain)]
        before = changed[place].detach().clone()
        for out in (None, torch.empty(kernel.spec.output_shape)):
            result = kernel(*changed, out=out)
            assert same(result, wanted)
            assert type(result) is torch.Tensor
            assert not result.requires_grad
            assert result.is_contiguous()
        assert torch.equal(changed[place].detach(), before)
    assert same(kernel(change(arguments[0]), change(arguments[1]), change(arguments[2])), wanted)


def test_expanded_tensors_are_read(kernel):
    x, w, b = draw(kernel.spec)
    x, w, b = x[:1].expand(x.shape), w[:, :, :1].expand(w.shape), b[:1].expand(b.shape)
    assert same(kernel(x, w, b), expected(kernel.spec, x, w, b))


def test_size_one_axes_with_any_stride_are_contiguous(artifacts):
    spec = ConvTranspose2dSpec(n=1, ci=1, ih=1, iw=4, co=1, kernel_size=(1, 2), stride=(1, 2))
    kernel = load(artifacts(spec))
    x, w, b = draw(spec)
    wanted = expected(spec, x, w, b)
    odd = x.as_strided(x.shape, (1000, 77, 3, 1))
    out = torch.empty(1000).as_strided(spec.output_shape, (5, 999, 123, 1))
    assert kernel(odd, kernel.pack(w), b, out=out) is out
    assert same(out, wanted)
    array = np.lib.stride_tricks.as_strided(x.numpy(), x.shape, (4000, 4, 12, 4))
    assert same(kernel(array, w.numpy(), b.numpy()), wanted.numpy())


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def _misaligned_array(array):
    data = b"x" + np.ascontiguousarray(array).tobytes()
    return np.frombuffer(data, array.dtype, offset=1).reshape(array.shape)


ARRAY_FORMS = {
    "contiguous": np.copy,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "every second": lambda a: np.stack([a, -a], -1).reshape(*a.shape[:-1], -1)[..., ::2],
    "read-only": _read_only,
    "misaligned and read-only": _misaligned_array,
    "misaligned": lambda a: np.frombuffer(bytearray(b"x" + a.tobytes()), a.dtype, offset=1).reshape(a.shape),
    "element-aligned": lambda a: np.concatenate([np.zeros(1, a.dtype), a.ravel()])[1:].reshape(a.shape),
    "subclass": lambda a: a.copy().view(type("Sub", (np.ndarray,), {})),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ARRAY_FORMS)
def test_arrays_of_every_form_are_read(artifacts, form, dtype):
    spec = spec_of(dtype=dtype)
    kernel = load(artifacts(spec))
    arguments = draw(spec)
    wanted = to_numpy(expected(spec, *arguments))
    x, w, b = map(to_numpy, arguments)
    plain = [x, kernel.pack(w), b]
    change = ARRAY_FORMS[form]
    assert same(kernel.pack(change(w)), plain[1])
    for place in range(3):
        changed = [change(value) if index == place else value for index, value in enumerate(plain)]
        result = kernel(*changed)
        assert same(result, wanted)
        assert result.flags.owndata
        assert result.flags.c_contiguous
    assert same(kernel(change(x), change(w), change(b)), wanted)


def test_memory_maps_are_read(kernel, tmp_path):
    x, w, b = (tensor.numpy() for tensor in draw(kernel.spec))
    np.save(tmp_path / "x.npy", x)
    for mode in ("r", "c", "r+"):
        assert same(kernel(np.load(tmp_path / "x.npy", mmap_mode=mode), w, b), kernel(x, w, b))


def test_arguments_in_place_are_not_copied(kernel, monkeypatch):
    x, w, b = draw(kernel.spec)
    packed, out = kernel.pack(w), torch.empty(kernel.spec.output_shape)
    wanted = expected(kernel.spec, x, w, b)

    for kind in (type(kernel._torch), type(NUMPY)):
        monkeypatch.setattr(kind, "empty", _fail)
    monkeypatch.setattr(torch.Tensor, "clone", _fail)
    read_only = x.numpy().view()
    read_only.flags.writeable = False
    assert kernel(x, packed, b.requires_grad_(), out=out) is out
    assert torch.equal(out, wanted)
    array = np.zeros_like(out.numpy())
    assert kernel(read_only, packed.numpy(), b.detach().numpy(), out=array) is array
    assert np.array_equal(array, wanted.numpy())
    monkeypatch.setattr(Kernel, "_call_checked", _fail)
    assert kernel(x, packed, b, out=out) is out
    assert kernel(x, packed, torch.nn.Parameter(b), out=out) is out


OUT_FORMS = {
    "channels_last": lambda shape: torch.zeros(shape).to(memory_format=torch.channels_last),
    "every second": lambda shape: torch.zeros(*shape, 2)[..., 1],
    "misaligned": lambda shape: _misaligned(torch.zeros(shape)),
    "negated view": lambda shape: torch._neg_view(torch.zeros(shape)),
    "requires grad": lambda shape: torch.zeros(shape, requires_grad=True),
    "parameter": lambda shape: torch.nn.Parameter(torch.zeros(shape)),
}


@pytest.mark.parametrize("form", OUT_FORMS)
def test_results_are_written_to_tensors_of_every_form(kernel, form):
    x, w, b = draw(kernel.spec)
    out = OUT_FORMS[form](kernel.spec.output_shape)
    assert kernel(x, kernel.pack(w), b, out=out) is out
    assert torch.equal(out, expected(kernel.spec, x, w, b))


def test_results_are_written_to_arrays_of_every_form(kernel):
    x, w, b = (tensor.numpy() for tensor in draw(kernel.spec))
    shape = kernel.spec.output_shape
    size = 4 * int(np.prod(shape))
    outs = [
        np.zeros(shape, "f4", order="F"),
        np.zeros((*shape, 2), "f4")[..., 1],
        np.frombuffer(bytearray(size + 1), "f4", offset=1).reshape(shape),
        np.zeros(shape, "f4")[::-1],
    ]
    for out in outs:
        assert kernel(x, kernel.pack(w), b, out=out) is out
        assert np.array_equal(out, kernel(x, w, b))


def test_only_out_is_written(kernel):
    x, w, b = draw(kernel.spec)
    shape = kernel.spec.output_shape
    buffer = torch.full((shape[0] * shape[1] * shape[2] * shape[3] + 64,), 5.0)
    out = buffer[32:-32].view(shape)
    kernel(x, kernel.pack(w), b, out=out)
    assert torch.equal(out, expected(kernel.spec, x, w, b))
    assert (buffer[:32] == 5).all()
    assert (buffer[-32:] == 5).all()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_out_may_overlap_any_argument(directory, place, kind, monkeypatch):
    kernel = load(directory)
    arguments = list(draw(kernel.spec))
    wanted = expected(kernel.spec, *arguments)
    arguments[1] = kernel.pack(arguments[1])
    sizes = [argument.numel() for argument in arguments]
    total = wanted.numel()
    for offset in {0, 1, total - 1, total - sizes[place] // 2, max(total - sizes[place], 0)}:
        buffer = torch.zeros(total + sizes[place])
        changed = list(arguments)
        changed[place] = buffer[offset : offset + sizes[place]].view(arguments[place].shape)
        changed[place].copy_(arguments[place])
        out = buffer[:total].view(wanted.shape)
        if kind == "numpy":
            out, changed = out.numpy(), [argument.numpy() for argument in changed]
        assert kernel(*changed, out=out) is out
        assert np.array_equal(out, wanted)
        # Whether an overlap harms is up to the schedule, so look at what the kernel accepted too.
        convt, accepted = kernel._convt, []

        def record(*tensors, convt=convt, accepted=accepted):
            convt(*tensors)
            accepted.append([tensor.data_ptr() for tensor in tensors])

        with monkeypatch.context() as patch:
            patch.setattr(kernel, "_convt", record)
            kernel(*changed, out=out)
        assert len(accepted) == 1
        assert accepted[0][-1] not in (*accepted[0][:-1], buffer.data_ptr())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_compiled_entries_refuse_memory_that_they_would_write_and_read(kernel, place):
    arguments = list(draw(kernel.spec))
    arguments[1] = kernel.pack(arguments[1])
    size, total = arguments[place].numel(), int(np.prod(kernel.spec.output_shape))
    buffer = torch.zeros(total + 2 * size)
    out = buffer[size : size + total].view(kernel.spec.output_shape)
    for offset, refused in ((0, False), (1, True), (size + total - 1, True), (size + total, False)):
        arguments[place] = buffer[offset : offset + size].view(arguments[place].shape)
        if refused:
            with pytest.raises(ValueError, match=f"{['input', 'packed', 'bias'][place]} shares memory with output"):
                kernel._convt(*arguments, out)
        else:
            kernel._convt(*arguments, out)


def test_modes_of_torch_that_matter_not(kernel):
    x, w, b = draw(kernel.spec)
    wanted = expected(kernel.spec, x, w, b)
    packed, out = kernel.pack(w), torch.empty(kernel.spec.output_shape)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(kernel(x * 1, kernel.pack(w), b, out=out), wanted)
            assert torch.equal(kernel(x, packed, b), wanted)
    with torch.device("meta"):
        for weight in (w, packed):
            assert torch.equal(kernel(x, weight, b), wanted)


def test_an_empty_batch_gives_an_empty_batch(artifacts, monkeypatch):
    spec = spec_of()
    directory = artifacts(spec)
    manifest = read_manifest(directory)
    kernel = load(directory)
    empty_spec = spec_of(n=0)
    fields = {name: getattr(manifest, name) for name in ("target", "schedule", "layout", "trace", "versions")}
    shape = {name: getattr(manifest, name) for name in ("packed_shape", "packed_dtype", "fingerprint")}
    publish(
        directory.parent / "empty", spec=empty_spec, **fields, **shape, files={KERNEL_FILE: directory / KERNEL_FILE}
    )
    empty = load(directory.parent / "empty")
    monkeypatch.setattr(empty, "_convt", _fail)
    _, w, b = draw(spec)
    x, out = torch.empty(empty_spec.input_shape), torch.empty(empty_spec.output_shape)
    for weight in (w, kernel.pack(w)):
        assert empty(x, weight, b).shape == empty_spec.output_shape
        assert empty(x, weight, b, out=out) is out
        assert empty(x.numpy(), weight.numpy(), b.numpy()).shape == empty_spec.output_shape
    with pytest.raises(ArgumentError, match="bias is missing"):
        empty(x, w)
    with pytest.raises(
        ArgumentError, match=r"input must be float32 of shape \(0, 4, 3, 5\) on cpu; found float32 of shape"
    ):
        empty(torch.empty(spec.input_shape), w, b)


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"ci": 40, "co": 33, "iw": 9}])
def test_one_kernel_takes_any_batch_size(artifacts, changes):
    spec = spec_of(n=None, **changes)
    kernel = load(artifacts(spec))
    for n in (0, 1, 2, 5):
        sized = spec.with_batch(n)
        x, w, b = draw(sized, seed=n)
        wanted = expected(sized, x, w, b)
        for weight in (w, kernel.pack(w)):
            assert same(kernel(x, weight, b), wanted)
            out = torch.full(sized.output_shape, 7.0, dtype=wanted.dtype)
            assert kernel(x, weight, b, out=out) is out
            assert same(out, wanted)
            assert same(kernel(to_numpy(x), to_numpy(weight), to_numpy(b)), to_numpy(wanted))


def test_the_batch_of_the_output_is_that_of_the_input(artifacts):
    spec = spec_of(n=None)
    kernel = load(artifacts(spec))
    x, w, b = draw(spec.with_batch(2))
    for weight in (w, kernel.pack(w)):
        for n in (0, 1, 3):
            with pytest.raises(ArgumentError, match=r"out must be float32 of shape \(2, 6, .*built for nany_ci4"):
                kernel(x, weight, b, out=torch.empty(spec.with_batch(n).output_shape))
        with pytest.raises(ArgumentError, match=r"input must be float32 of shape \(2, 4, 3, 5\).* \(2, 4, 3, 6\)"):
            kernel(torch.zeros(2, 4, 3, 6), weight, b)
        with pytest.raises(ArgumentError, match=r"input must be float32 of shape \(1, 4, 3, 5\).* of shape \(\)"):
            kernel(torch.tensor(1.0), weight, b)


def test_a_batch_that_indices_cannot_count_is_refused(monkeypatch, tmp_path):
    from convt_tvm import compiler

    spec = spec_of(n=None, ih=30, iw=30)
    monkeypatch.setattr(compiler, "MAX_ELEMENTS", 2 * 6 * 60 * 60 + 5)
    compiler.build_artifact(spec, "llvm", tmp_path / "kernel")
    kernel = load(tmp_path / "kernel")
    x, w, b = draw(spec.with_batch(3))
    assert kernel(x[:2], w, b).shape[0] == 2
    for weight in (w, kernel.pack(w)):
        with pytest.raises(ArgumentError, match="refuses the arguments: the batch has more than 2 images; split it"):
            kernel(x, weight, b)


WRONG = {
    "shape": (lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1), r"must be float32 of shape {shape} on cpu; found"),
    "rank": (lambda t: t[None, None], r"must be float32 of shape .* on cpu; found float32 of shape \(1, 1, "),
    "scalar": (lambda t: torch.zeros(()), r"must be float32 of shape .* on cpu; found float32 of shape \(\) on cpu"),
    "dtype": (lambda t: t.double(), r"must be float32 .* found float64 of shape {shape} on cpu"),
    "integers": (lambda t: t.int(), r"must be float32 .* found int32 of shape"),
    "device": (lambda t: t.to("meta"), r"must be float32 .* found float32 of shape {shape} on meta"),
    "layout": (lambda t: t.to_sparse(), r"must be float32 .* found a tensor of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("name", ["input", "weight", "packed weight", "bias", "out"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tensor_is_named_with_what_was_asked_and_found(kernel, name, wrong):
    x, w, b = draw(kernel.spec)
    packed, out = kernel.pack(w), torch.zeros(kernel.spec.output_shape)
    right = {"input": x, "weight": w, "packed weight": packed, "bias": b, "out": out}
    change, message = WRONG[wrong]
    changed = right | {name: change(right[name])}
    weight = changed[name] if "weight" in name else packed
    told = "(packed )?weight" if "weight" in name else name
    shape = r"\(.*\)" if "weight" in name and wrong in ("rank", "scalar") else str(tuple(right[name].shape))
    message = message.format(shape=shape.replace("(", r"\(").replace(")", r"\)") if shape[0] == "(" else shape)
    with pytest.raises(ArgumentError, match=rf"^{told} {message}.*The kernel was built for n2_ci4") as caught:
        kernel(changed["input"], weight, changed["bias"], out=changed["out"])
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal(out, torch.zeros_like(out))


def test_a_wrong_array_is_named_with_what_was_asked_and_found(kernel):
    x, w, b = (tensor.numpy() for tensor in draw(kernel.spec))
    with pytest.raises(
        ArgumentError, match=r"input must be float32 of shape \(2, 4, 3, 5\) on cpu; found float64 of shape"
    ):
        kernel(x.astype("f8"), w, b)
    with pytest.raises(ArgumentError, match=r"weight must be float32 .* found float32 \(byte-swapped\) of shape"):
        kernel(x, w.astype(">f4"), b)
    with pytest.raises(
        ArgumentError, match=r"bias must be float32 of shape \(6,\) on cpu; found float32 of shape \(6, 1\)"
    ):
        kernel(x, w, b[:, None])
    with pytest.raises(
        ArgumentError, match=r"packed weight must be float32 of shape .* found float32 of shape \(1, 4, 6"
    ):
        kernel(x, w[None], b)
    with pytest.raises(ArgumentError, match="out is a read-only array; pass one that can be written to"):
        kernel(x, w, b, out=_read_only(np.zeros(kernel.spec.output_shape, "f4")))
    with pytest.raises(ArgumentError, match=r"weight must be .* of shape \(4, 6, 3, 3\)"):
        kernel.pack(kernel.pack(w))


def test_an_out_whose_elements_share_memory_is_refused(kernel):
    x, w, b = draw(kernel.spec)
    with pytest.raises(ArgumentError, match=r"out has strides \(0, .*several elements share one place in memory"):
        kernel(x, w, b, out=torch.zeros(kernel.spec.output_shape)[:1].expand(kernel.spec.output_shape))


def test_bias_is_given_exactly_when_the_kernel_adds_one(kernel, artifacts):
    x, w, b = draw(kernel.spec)
    out = torch.empty(kernel.spec.output_shape)
    without = load(artifacts(spec_of(bias=False)))
    for weight in (w, kernel.pack(w)):
        with pytest.raises(ArgumentError, match=r"bias is missing: the kernel adds one of shape \(6,\)"):
            kernel(x, weight, out=out)
        with pytest.raises(ArgumentError, match="bias is superfluous: the kernel adds none"):
            without(x, weight, b, out=out)


@pytest.mark.parametrize("name", ["input", "weight", "bias", "out"])
def test_kinds_are_not_mixed(kernel, name):
    x, w, b = draw(kernel.spec)
    for weight in (w, kernel.pack(w)):
        right = {"input": x, "weight": weight, "bias": b, "out": torch.empty(kernel.spec.output_shape)}
        right[name] = right[name].numpy()
        with pytest.raises(
            ArgumentTypeError, match=f"must all be torch tensors or all be numpy arrays; .*{name} is a numpy"
        ):
            kernel(**right)


@pytest.mark.parametrize("wrong", [None, 3, [1.0], "x", np.float32(1), np.ma.zeros((2, 4, 3, 5), dtype="f4")])
def test_what_is_no_tensor_is_a_type_error(kernel, wrong):
    x, w, b = draw(kernel.spec)
    with pytest.raises(
        ArgumentTypeError, match=r"input must be a torch tensor or a numpy array; found \w+\."
    ) as caught:
        kernel(wrong, w, b)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(ArgumentTypeError, match="weight must be a torch tensor or a numpy array"):
        kernel(x, wrong, b)
    with pytest.raises(ArgumentTypeError, match="weight must be a torch tensor or a numpy array"):
        kernel.pack(wrong)
    if wrong is not None:
        with pytest.raises(ArgumentTypeError, match="out must be a torch tensor or a numpy array"):
            kernel(x, kernel.pack(w), b, out=wrong)


def test_tensors_without_memory_are_refused(kernel):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, b = draw(kernel.spec)
    packed, out = kernel.pack(w), torch.empty(kernel.spec.output_shape)
    with FakeTensorMode():
        fake = torch.empty(kernel.spec.input_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ArgumentError, match=r"input has no memory: it is a FakeTensor inside"):
            kernel(fake, packed, b, out=out)
    for call in (
        lambda: kernel(fake, packed, b, out=out),
        lambda: torch.vmap(lambda item: kernel(item, packed, b, out=out))(x[None]),
        lambda: torch.func.grad(lambda item: kernel(item, packed, b, out=out).sum())(x),
    ):
        with pytest.raises(ArgumentError, match=r"input has no memory: it is a .*call the kernel on ordinary tensors"):
            call()


def _foreign(array, offset, value, field=ctypes.c_int32):
    """An array as a DLPack tensor with a field of the struct DLManagedTensorVersioned overwritten."""
    import tvm_ffi

    capsule = array.__dlpack__(max_version=(1, 0))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    field.from_address(pointer(capsule, b"dltensor_versioned") + offset).value = value
    return tvm_ffi.from_dlpack(capsule)


@pytest.mark.parametrize(
    ("offset", "value", "what"), [(40, 2, "device_type"), (52, 0, "dtype"), (54, 4, "dtype"), (48, 3, "ndim")]
)
def test_compiled_entries_check_what_the_fast_path_leaves_to_them(kernel, offset, value, what):
    x, w, b = (tensor.numpy() for tensor in draw(kernel.spec))
    arguments = [x, kernel.pack(w), b, np.zeros(kernel.spec.output_shape, "f4")]
    field = ctypes.c_uint16 if offset == 54 else ctypes.c_uint8 if offset == 52 else ctypes.c_int32
    for place in range(4):
        changed = list(arguments)
        changed[place] = _foreign(arguments[place], offset, value, field)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=what):
            kernel._convt(*changed)
    assert not arguments[3].any()


def test_the_bits_do_not_depend_on_the_number_of_threads(artifacts):
    spec = spec_of(ih=17, iw=19)
    kernel = load(artifacts(spec))
    x, w, b = (torch.randn(shape) for shape in (spec.input_shape, spec.weight_shape, spec.bias_shape))
    results = []
    for n in range(1, len(threads._usable_cpus()) + 1):
        set_num_threads(n)
        assert get_num_threads() == n
        results.append(kernel(x, w, b))
    assert all(torch.equal(results[0], result) for result in results)


def test_calls_from_many_threads_at_once_are_right(kernel):
    arguments = [draw(kernel.spec, seed) for seed in range(4)]
    failures = []

    def work(x, w, b):
        packed, wanted, out = kernel.pack(w), expected(kernel.spec, x, w, b), torch.empty(kernel.spec.output_shape)
        for _ in range(50):
            if not torch.equal(kernel(x, packed, b, out=out), wanted):
                failures.append((x, w, b))

    workers = [threading.Thread(target=work, args=item) for item in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_the_number_of_threads_is_checked():
    limit = len(os.sched_getaffinity(0))
    for wrong in (0, -1, limit + 1, 1.5, True, "2", None):
        with pytest.raises(ArgumentError, match=rf"n={wrong!r} must be an integer from 1 to {limit}, the CPUs"):
            set_num_threads(wrong)


def test_the_default_number_of_threads(monkeypatch, tmp_path):
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "_CPU", tmp_path)
    assert threads._default([0, 1, 2]) == 3
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert threads._default([0, 1, 2, 3]) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads._default([0, 1, 2, 3]) == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "9")
    assert threads._default([0, 1, 2, 3]) == 4
    monkeypatch.setenv("TVM_NUM_THREADS", "0")
    assert threads._default([0, 1, 2, 3]) == 3


def run_python(code, *arguments, env=None):
    """Run code in a new process, from the checkout; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_threads_are_not_bound_to_cpus_and_number_what_is_asked(directory):
    code = """
        import os, sys, threading, numpy as np
        from convt_tvm.runtime import *
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[-2:])
        kernel = load(sys.argv[1])
        spec = kernel.spec
        x, w, b = (np.ones(s, "f4") for s in (spec.input_shape, spec.weight_shape, spec.bias_shape))
        def call():
            kernel(x, w, b)
            found.append((get_num_threads(), sorted(os.sched_getaffinity(0)) == cpus[-2:]))
        found = []
        call()
        other = threading.Thread(target=call); other.start(); other.join()
        set_num_threads(1); call()
        set_num_threads(len(cpus[-2:])); call()
        tasks = [sorted(os.sched_getaffinity(int(t))) == cpus[-2:] for t in os.listdir("/proc/self/task")]
        print(found, all(tasks))
    """
    n = min(len(os.sched_getaffinity(0)), 2)
    out = run_python(code, directory, env={"TVM_NUM_THREADS": str(n)})
    assert out == f"[({n}, True), ({n}, True), (1, True), ({n}, True)] True"


def test_a_forked_child_computes_too(directory):
    code = """
        import os, sys, threading, numpy as np
        from convt_tvm.runtime import *
        kernel = load(sys.argv[1])
        spec = kernel.spec
        x, w, b = (np.ones(s, "f4") for s in (spec.input_shape, spec.weight_shape, spec.bias_shape))
        y = kernel(x, w, b)
        child = os.fork()
        if not child:
            same = np.array_equal(kernel(x, w, b), y) and get_num_threads() == 1
            results = []
            other = threading.Thread(target=lambda: results.append(np.array_equal(kernel(x, w, b), y)))
            other.start(); other.join()
            os._exit(0 if same and results == [True] else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(kernel(x, w, b), y))
    """
    assert run_python(code, directory) == "0 True"


@pytest.mark.skipif(len(threads._usable_cpus()) < 2, reason="needs two CPUs")
def test_idle_workers_soon_sleep(directory):
    code = """
        import sys, time, numpy as np
        from convt_tvm.runtime import load, set_num_threads
        set_num_threads(2)
        kernel = load(sys.argv[1])
        kernel.pack(np.ones(kernel.spec.weight_shape, "f4"))  # on all threads, whatever its size
        before = time.process_time()
        time.sleep(0.3)
        print(time.process_time() - before < 0.05)
    """
    assert run_python(code, directory) == "True"


CALL = """
    import sys, numpy as np
    {before}
    from convt_tvm.runtime import load
    kernel = load(sys.argv[1])
    x, w, b = (np.ones(s, "f4") for s in (kernel.spec.input_shape, kernel.spec.weight_shape, kernel.spec.bias_shape))
    y = kernel(x, w, b)
    {after}
    print(float(kernel(x, kernel.pack(w), b).sum()) == float(y.sum()) > 0, "tvm" in sys.modules)
"""


@pytest.mark.parametrize(
    ("before", "after", "imported"), [("", "", False), ("import tvm", "", True), ("", "import tvm", True)]
)
def test_the_compiler_is_not_imported_and_may_be_before_or_after(directory, tmp_path, before, after, imported):
    """Also with a runtime library beside the kernel: two in one process would abort it."""
    load(directory).save(tmp_path / "saved", with_runtime=True)
    for path in (directory, tmp_path / "saved"):
        assert run_python(CALL.format(before=before, after=after), path) == f"True {imported}"


@pytest.fixture
def isolated(tmp_path):
    """A function that runs code where nothing but numpy, apache-tvm-ffi and this package can be imported."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("numpy", "tvm_ffi", "typing_extensions"):
        origin = Path(find_spec(name).origin)
        origin = origin.parent if origin.name == "__init__.py" else origin
        (site / origin.name).symlink_to(origin)
        for beside in (*origin.parent.glob("numpy.libs"), *origin.parent.glob("apache_tvm_ffi-*")):
            if not (site / beside.name).exists():
                (site / beside.name).symlink_to(beside)
    (site / "convt_tvm").symlink_to(ROOT / "convt_tvm")

    def run(code, *arguments):
        prefix = f"import sys; sys.path.insert(0, {str(site)!r})\n"
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", prefix + textwrap.dedent(code), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


BARE_CALL = CALL.format(
    before="", after="assert not {'tvm', 'torch'} & set(sys.modules); from importlib.util import find_spec"
)


def test_an_artifact_with_its_runtime_needs_only_numpy_and_tvm_ffi(directory, tmp_path, isolated):
    load(directory).save(tmp_path / "saved", with_runtime=True)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    done = isolated(BARE_CALL + "    print(find_spec('tvm'), find_spec('torch'))", tmp_path / "saved")
    assert (done.returncode, done.stdout) == (0, "True False\nNone None\n"), done.stderr


def test_a_runtime_put_beside_the_kernel_by_hand_is_used(directory, tmp_path, isolated):
    shutil.copytree(directory, tmp_path / "saved")
    shutil.copy(runtime.find_runtime(tmp_path), tmp_path / "saved")
    done = isolated(BARE_CALL, tmp_path / "saved")
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_without_a_runtime_the_error_says_what_to_do(directory, isolated):
    done = isolated(CALL.format(before="", after=""), directory)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("convt_tvm.errors.ArtifactNotFoundError: the kernel ")
    assert "needs libtvm_runtime.so, which is neither beside it nor in an installed apache-tvm; install" in done.stderr


def test_a_runtime_that_is_none_is_an_artifact_error(directory, tmp_path, isolated):
    shutil.copytree(directory, tmp_path / "saved")
    (tmp_path / "saved" / RUNTIME_FILE).write_bytes(b"\x7fELF")
    done = isolated(CALL.format(before="", after=""), tmp_path / "saved")
    assert done.returncode == 1
    assert "ArtifactError: " in done.stderr
    assert "libtvm_runtime.so cannot be opened: " in done.stderr


def test_saving_makes_the_same_artifact(kernel, tmp_path):
    kernel.save(tmp_path / "deep" / "saved")
    again = load(str(tmp_path / "deep" / "saved"))
    assert (again.manifest, again.spec, again.target) == (kernel.manifest, kernel.spec, kernel.target)
    assert again.directory == (tmp_path / "deep" / "saved").resolve()
    kernel.save(tmp_path / "deep" / "saved", with_runtime=True)
    assert set(read_manifest(tmp_path / "deep" / "saved").files) == {KERNEL_FILE, RUNTIME_FILE}
    arguments = draw(kernel.spec)
    assert torch.equal(load(tmp_path / "deep" / "saved")(*arguments), kernel(*arguments))


def test_artifacts_load_by_relative_paths_too(kernel, directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    arguments = draw(kernel.spec)
    assert torch.equal(load(directory.name)(*arguments), kernel(*arguments))


def test_a_directory_loaded_before_and_replaced_gives_the_new_kernel(artifacts, tmp_path):
    first, second = artifacts(spec_of()), artifacts(spec_of(bias=False, padding=0))
    place = tmp_path / "place"
    for directory in (first, second, first, second):
        load(directory).save(place)
        kernel = load(place)
        arguments = draw(kernel.spec)
        assert torch.equal(kernel(*arguments), expected(kernel.spec, *arguments))


def test_a_loaded_kernel_outlives_its_directory(artifacts, tmp_path):
    load(artifacts(spec_of())).save(tmp_path / "gone")
    kernel = load(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    arguments = draw(kernel.spec)
    assert torch.equal(kernel(*arguments), expected(kernel.spec, *arguments))
    with pytest.raises(ArtifactNotFoundError, match="gone: no such directory"):
        kernel.save(tmp_path / "saved")


def republished(directory, to, **changes):
    """The artifact with other fields, and the digest that belongs to them."""
    manifest = read_manifest(directory)
    names = ("spec", "target", "schedule", "layout", "trace", "packed_shape", "packed_dtype", "versions", "fingerprint")
    fields = {name: getattr(manifest, name) for name in names}
    publish(to, **fields | {"files": {KERNEL_FILE: directory / KERNEL_FILE}} | changes)
    return to


@pytest.fixture
def no_opening(monkeypatch):
    monkeypatch.setattr(runtime, "_dlopen", _fail)
    monkeypatch.setattr(runtime, "open_runtime", _fail)


@pytest.mark.usefixtures("no_opening")
def test_features_this_machine_lacks_are_named_before_anything_is_opened(directory, tmp_path, monkeypatch):
    republished(directory, tmp_path / "x", target=Target.parse("llvm:x86_64+avx512fp16+fma"))
    monkeypatch.setattr("convt_tvm.target.host_features", lambda: host_features() - {"avx512fp16"})
    with pytest.raises(
        IncompatibleMachineError, match=r"x cannot run here: this machine lacks the CPU features .*avx512fp16"
    ):
        load(tmp_path / "x")


@pytest.mark.usefixtures("no_opening")
def test_another_architecture_is_named_before_anything_is_opened(directory, tmp_path):
    republished(directory, tmp_path / "x", target=Target.parse("llvm:aarch64+neon"))
    with pytest.raises(IncompatibleMachineError, match="code for aarch64 does not run on this machine"):
        load(tmp_path / "x")


@pytest.mark.usefixtures("no_opening")
def test_damage_is_found_before_anything_is_opened(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "x")
    path = tmp_path / "x" / KERNEL_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(ArtifactCorruptError, match=r"kernel\.so .* is not the file that was published"):
        load(tmp_path / "x")
    (tmp_path / "x" / artifact.MANIFEST_FILE).write_text("{")
    with pytest.raises(ArtifactCorruptError, match="is not JSON"):
        load(tmp_path / "x")
    with pytest.raises(ArtifactNotFoundError, match="no such directory"):
        load(tmp_path / "y")


def test_a_library_that_is_none_is_an_artifact_error(directory, tmp_path):
    (tmp_path / "text").write_text("no library")
    republished(directory, tmp_path / "x", files={KERNEL_FILE: tmp_path / "text"})
    with pytest.raises(ArtifactError, match=r"kernel\.so cannot be opened: .*; build it on this machine"):
        load(tmp_path / "x")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_library_without_the_functions_is_corrupt(directory, tmp_path):
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "lib.so", tmp_path / "empty.c"], check=True)
    republished(directory, tmp_path / "x", files={KERNEL_FILE: tmp_path / "lib.so"})
    with pytest.raises(
        ArtifactCorruptError, match=r"kernel\.so is no kernel: Module has no function 'convt'; build it"
    ):
        load(tmp_path / "x")


def test_the_representation_says_what_it_is(kernel, directory):
    text = repr(kernel)
    packed = f"float32{list(kernel.manifest.packed_shape)}"
    for part in (kernel.spec.name, kernel.target.key, kernel.manifest.schedule, str(directory), packed):
        assert part in text
