"""Kernels for GPUs as a user calls them: on the emulator, whose driver, memory and torch tensors stand in for a GPU's.

Where there is a GPU the tests marked `cuda` run on it.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import convt_tvm as ct
from convt_tvm import gpu_kernel
from convt_tvm.artifact import publish
from convt_tvm.compiler import build_artifact
from convt_tvm.cuda_toolkit import find_toolkit
from convt_tvm.emulated_torch import emulated_gpu, last_stream, launches
from convt_tvm.errors import ArgumentError, ArgumentTypeError, BuildError, IncompatibleMachineError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.gpu import Driver, Gpu, find_driver, newest_architecture
from convt_tvm.reference import integer_inputs, reference
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

try:
    find_toolkit()
    MISSING = "a build of torch without CUDA is what a GPU is emulated for" if torch.version.cuda else ""
except BuildError as error:
    MISSING = str(error)

needs_emulator = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=2)


def on_gpu(spec, seed=0):
    """Integer inputs on the GPU, and the exact answer."""
    inputs = integer_inputs(spec, seed)
    return [None if tensor is None else tensor.cuda() for tensor in inputs], reference(spec, *inputs)


@pytest.fixture
def gpu():
    with emulated_gpu():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "kernel"
    with emulated_gpu():
        ct.build(SPEC, target="cuda").save(directory)
    return directory


# Loading.


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "library").write_bytes(b"no library")
    publish(
        tmp_path / "kernel",
        spec=SPEC,
        target=Target.parse("cuda:sm_80+sm_90"),
        schedule="cuda_direct",
        layout={},
        trace=[],
        packed_shape=(1, 3, 3, 2, 4),
        packed_dtype="float32",
        versions={},
        fingerprint=source_fingerprint(),
        files={"kernel.so": tmp_path / "library"},
    )
    return tmp_path / "kernel"


def drive(monkeypatch, cuda=(13, 0), capability=(9, 0)):
    driver = Driver(cuda, (Gpu("a GPU", capability),))
    monkeypatch.setattr("convt_tvm.target.find_driver", lambda: driver)


def test_without_a_driver_loading_says_what_to_do(directory, monkeypatch):
    monkeypatch.setattr("convt_tvm.target.find_driver", lambda: None)
    with pytest.raises(IncompatibleMachineError, match=r"cannot run here: .*no NVIDIA driver .*check --emulate"):
        ct.load(directory)


def test_an_old_driver_and_an_older_gpu_are_named(directory, monkeypatch):
    drive(monkeypatch, cuda=(12, 4))
    with pytest.raises(IncompatibleMachineError, match=r"CUDA 12.4, and kernels need 13.0; install driver 580"):
        ct.load(directory)
    drive(monkeypatch, capability=(7, 5))
    with pytest.raises(IncompatibleMachineError, match=r"not run on a GPU \(sm_75\); build for target"):
        ct.load(directory)


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)]
)
def test_machine_code_runs_on_its_major_version_and_ptx_on_what_is_newer(capability, runs):
    assert Gpu("a GPU", capability).runs(("sm_80", "sm_90")) is runs


def test_without_ptx_for_it_nothing_older_runs():
    assert not Gpu("a GPU", (8, 9)).runs(("sm_90",))


def test_the_newest_architecture_is_the_one_closest_below():
    assert [newest_architecture(Gpu("a GPU", each)) for each in ((9, 0), (10, 3), (8, 7), (7, 0))] == [
        "sm_90",
        "sm_100",
        "sm_87",
        None,
    ]


@needs_emulator
def test_the_driver_is_asked_for_its_gpus_and_there_is_none_afterwards():
    with emulated_gpu((8, 6)):
        assert find_driver() == Driver((13, 0), (Gpu("emulated", (8, 6)),))
        assert Target.parse("cuda").name == "cuda:sm_86"
    assert find_driver() is None or find_driver().gpus[0].name != "emulated"


@needs_emulator
def test_a_gpu_without_the_code_refuses_it_when_it_is_loaded_and_when_it_is_called(saved):
    with emulated_gpu((8, 0)), pytest.raises(IncompatibleMachineError, match=r"does not run on emulated \(sm_80\)"):
        ct.load(saved)
    with emulated_gpu():
        kernel = ct.load(saved)
    with emulated_gpu((8, 0)):
        tensors, _ = on_gpu(SPEC)
        before = launches()
        with pytest.raises(IncompatibleMachineError, match=r"is for sm_90, and cuda:0, emulated, is sm_80; build one"):
            kernel(*tensors)
        assert launches() == before


# Calling.


@needs_emulator
@pytest.mark.parametrize(
    "changes", [{}, {"groups": 2, "bias": False, "dtype": "float16"}, {"dtype": "bfloat16"}, {"n": 0}]
)
def test_build_and_call(gpu, changes):
    spec = replace(SPEC, **changes)
    tensors, exact = on_gpu(spec)
    kernel = ct.build(spec, target="cuda")
    answer = kernel(*tensors)
    assert (answer.device.type, answer.dtype) == ("cuda", tensors[0].dtype)
    assert torch.equal(answer.cpu().double(), exact)


@needs_emulator
def test_a_saved_kernel_takes_torchs_memory_as_it_is(gpu, saved):
    kernel = ct.load(saved)
    (input, weight, bias), exact = on_gpu(SPEC)
    packed = kernel.pack(weight)
    assert (tuple(packed.shape), packed.device) == (kernel.manifest.packed_shape, input.device)
    seen, call = [], kernel._convt
    kernel._convt = lambda *tensors: (seen.append([tensor.data_ptr() for tensor in tensors]), call(*tensors))
    out = torch.full(SPEC.output_shape, float("nan"), device="cuda")
    assert kernel(input, packed, bias, out=out) is out
    assert seen == [[tensor.data_ptr() for tensor in (input, packed, bias, out)]]
    assert torch.equal(out.cpu().double(), exact)
    assert torch.equal(kernel(input, packed, torch.nn.Parameter(bias)).cpu(), out.cpu())


@needs_emulator
def test_launches_go_to_torchs_current_stream(gpu, saved):
    kernel = ct.load(saved)
    tensors, _ = on_gpu(SPEC)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel(*tensors)
        assert last_stream() == stream.cuda_stream != 0
    kernel.pack(tensors[1])
    assert last_stream() == 0


@needs_emulator
def test_a_call_neither_waits_nor_allocates_but_through_torch(gpu, saved):
    import tvm

    kernel = ct.load(saved)
    (input, weight, bias), exact = on_gpu(SPEC)
    packed = kernel.pack(weight)
    stream = torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        answer = kernel(input, packed, bias)
        assert last_stream() == stream.cuda_stream
        # What the emulator would make of a kernel that did.
        with pytest.raises(RuntimeError, match="stand-in for the CUDA runtime"):
            tvm.runtime.empty((1 << 20,), "float32", tvm.cuda(0))
    assert torch.equal(answer.cpu().double(), exact)


@needs_emulator
def test_strides_alignment_and_overlap_cost_a_copy_and_no_bits(gpu, saved):
    kernel = ct.load(saved)
    (input, weight, bias), exact = on_gpu(SPEC)
    packed = kernel.pack(weight)

    def shifted(tensor):
        memory = torch.empty(tensor.numel() + 1, device="cuda")
        return memory[1:].view(tensor.shape).copy_(tensor)

    seen, call = [], kernel._convt
    kernel._convt = lambda *tensors: (seen.extend(tensor.data_ptr() % 16 for tensor in tensors), call(*tensors))
    last = input.to(memory_format=torch.channels_last)
    assert last.stride() != input.stride() and shifted(packed).data_ptr() % 16
    for arguments in ((last, packed, bias), (shifted(input), packed, bias), (input, shifted(packed), shifted(bias))):
        assert torch.equal(kernel(*arguments).cpu().double(), exact)
    strided = torch.empty(SPEC.output_shape, device="cuda").to(memory_format=torch.channels_last)
    assert torch.equal(kernel(input, packed, bias, out=strided).cpu().double(), exact)
    memory = torch.zeros(SPEC.size_bytes, device="cuda")
    inside = memory[: input.numel()].view(input.shape).copy_(input)
    over = memory[: exact.numel()].view(exact.shape)
    assert torch.equal(kernel(inside, packed, bias, out=over).cpu().double(), exact)
    assert set(seen) == {0}


@needs_emulator
def test_what_a_kernel_for_gpus_refuses(gpu, saved):
    kernel = ct.load(saved)
    x, weight, bias = torch.zeros(SPEC.input_shape), torch.zeros(SPEC.weight_shape), torch.zeros(SPEC.bias_shape)
    with pytest.raises(ArgumentError, match=r"input must be float32 of shape .* on cuda; found float32 .* on cpu"):
        kernel(x, weight, bias)
    with pytest.raises(ArgumentError, match=r"the tensors are on cpu, cuda:0; put them on one GPU"):
        kernel(x.cuda(), weight, bias)
    with pytest.raises(ArgumentError, match=r"weight must be float32 .* on cuda"):
        kernel.pack(weight)
    with pytest.raises(ArgumentError, match="bias is missing"):
        kernel(x.cuda(), weight.cuda())
    with pytest.raises(ArgumentTypeError, match=r"are numpy arrays, and the kernel for cuda:sm_90 takes torch tensors"):
        kernel(np.zeros(SPEC.input_shape, "float32"), weight.numpy(), bias.numpy())


@needs_emulator
def test_the_device_of_the_tensors_is_current_while_the_kernel_is_called(gpu, saved):
    kernel = ct.load(saved)
    tensors, _ = on_gpu(SPEC)
    entered, honest = [], kernel._cuda

    class Elsewhere:
        current_device = staticmethod(lambda: 3)
        get_device_name, get_device_capability = honest.get_device_name, honest.get_device_capability

        @staticmethod
        def device(index):
            entered.append(index)
            return gpu_kernel.nullcontext()

    kernel._cuda = Elsewhere
    kernel(tensors[0], kernel.pack(tensors[1]), tensors[2])
    assert entered == [0, 0]


# In torch.


@needs_emulator
def test_the_function_computes_where_the_tensors_are(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("convt_tvm.plan._plans", plans := {})
    tensors, exact = on_gpu(SPEC)
    before = launches()
    answer = ct.functional.conv_transpose2d(*tensors, stride=2)
    assert (answer.device.type, torch.equal(answer.cpu().double(), exact)) == ("cuda", True)
    assert launches() > before
    (known,) = (plan.kernel.target.name for plan in plans.values())
    assert known == "cuda:sm_90+tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert torch.equal(ct.functional.conv_transpose2d(*tensors, stride=2).cpu().double(), exact)
    assert [plan.kernel.target.name for plan in plans.values()] == [known, "cuda:sm_90"]
    with pytest.raises(ArgumentError, match=r"weight must be float32 .* on cuda; found .* on cpu"):
        ct.functional.conv_transpose2d(tensors[0], tensors[1].cpu(), tensors[2], stride=2)
    with torch.autocast("cuda", dtype=torch.float16):
        assert ct.functional.conv_transpose2d(*tensors, stride=2).dtype == torch.float16


@needs_emulator
def test_a_layer_packs_once_and_moves_to_the_gpu_and_back(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", str(tmp_path))
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 4, 3, 2)).eval()
    tensors, _ = on_gpu(SPEC)
    with torch.inference_mode():
        expected = model(tensors[0].cpu())
    report = ct.nn.replace(model.cuda())
    assert report.replaced == ("0",)
    with torch.inference_mode():
        first = model(tensors[0])
        before = launches()
        assert torch.equal(model(tensors[0]).cpu(), first.cpu())
        once = launches() - before
        model[0].forget_packed()
        model(tensors[0])
        assert launches() - before == 2 * once + 1
        assert torch.allclose(first.cpu(), expected, atol=1e-5)
        assert torch.allclose(model.cpu()(tensors[0].cpu()), expected, atol=1e-5)


# On a GPU.


@pytest.mark.cuda
def test_a_gpu_gives_the_bits_of_the_reference(tmp_path):
    for spec in (SPEC, replace(SPEC, groups=2, bias=False), replace(SPEC, dtype="float16")):
        build_artifact(spec, "cuda", tmp_path / spec.name)
        tensors, exact = on_gpu(spec)
        assert torch.equal(ct.load(tmp_path / spec.name)(*tensors).cpu().double(), exact)


@pytest.mark.cuda
def test_a_gpus_graph_computes_new_inputs_when_it_is_replayed():
    kernel = ct.build(SPEC, target="cuda")
    (input, weight, bias), _ = on_gpu(SPEC)
    packed, out, graph = kernel.pack(weight), torch.empty(SPEC.output_shape, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(input, packed, bias, out=out)
    (other, _, _), _ = on_gpu(SPEC, seed=1)
    input.copy_(other)
    graph.replay()
    assert torch.equal(out.cpu().double(), reference(SPEC, other.cpu(), weight.cpu(), bias.cpu()))
