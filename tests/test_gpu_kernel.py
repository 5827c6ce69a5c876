"""Everything about calling a kernel on a GPU that can be tried without one; the driver and the kernel are stand-ins."""

from dataclasses import replace

import pytest
import torch

from convt_tvm import load
from convt_tvm.artifact import publish, source_fingerprint
from convt_tvm.errors import ArgumentError, ArgumentTypeError, ArtifactError, IncompatibleMachineError
from convt_tvm.gpu import Driver, Gpu
from convt_tvm.gpu_kernel import GpuKernel, load_gpu
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=2)


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


class Module:
    def get_function(self, name):
        return lambda *tensors: None


def test_without_a_driver_loading_says_what_to_do(directory, monkeypatch):
    monkeypatch.setattr("convt_tvm.target.find_driver", lambda: None)
    for function in (load, load_gpu):
        with pytest.raises(IncompatibleMachineError, match=r"cannot run here: .*no NVIDIA driver .*check --emulate"):
            function(directory)


def test_an_old_driver_and_an_older_gpu_are_named(directory, monkeypatch):
    drive(monkeypatch, cuda=(12, 4))
    with pytest.raises(IncompatibleMachineError, match=r"CUDA 12.4, and kernels need 13.0; install driver 580"):
        load_gpu(directory)
    drive(monkeypatch, capability=(7, 5))
    with pytest.raises(IncompatibleMachineError, match=r"not run on a GPU \(sm_75\); build for target"):
        load_gpu(directory)


def test_each_loader_names_the_other(directory, monkeypatch):
    drive(monkeypatch)
    with pytest.raises(ArtifactError, match=r"is for GPUs; load it with convt_tvm\.gpu_kernel\.load_gpu"):
        load(directory)


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)]
)
def test_machine_code_runs_on_its_major_version_and_ptx_on_what_is_newer(capability, runs):
    assert Gpu("a GPU", capability).runs(("sm_80", "sm_90")) is runs


def test_without_ptx_for_it_nothing_older_runs():
    assert not Gpu("a GPU", (8, 9)).runs(("sm_90",))


def test_tensors_elsewhere_than_on_a_gpu_are_refused(directory):
    from convt_tvm.artifact import read_manifest

    kernel = GpuKernel(read_manifest(directory), directory, Module())
    x, weight, bias = torch.zeros(SPEC.input_shape), torch.zeros(SPEC.weight_shape), torch.zeros(SPEC.bias_shape)
    with pytest.raises(ArgumentError, match=r"input must be float32 of shape .* on cuda; found float32 .* on cpu"):
        kernel(x, weight, bias)
    with pytest.raises(ArgumentError, match="weight must be float32"):
        kernel.pack(weight)
    with pytest.raises(ArgumentError, match="bias is missing"):
        kernel(x, weight)
    with pytest.raises(ArgumentTypeError, match="input must be a torch tensor on a GPU; found ndarray"):
        kernel(x.numpy(), weight, bias)


@pytest.mark.cuda
def test_a_gpu_gives_the_bits_of_the_reference(tmp_path):
    from convt_tvm.compiler import build_artifact
    from convt_tvm.reference import integer_inputs, reference

    for spec in (SPEC, replace(SPEC, groups=2, bias=False), replace(SPEC, dtype="float16")):
        build_artifact(spec, "cuda", tmp_path / spec.name)
        kernel = load_gpu(tmp_path / spec.name)
        inputs = integer_inputs(spec, seed=0)
        answer = kernel(*(None if tensor is None else tensor.cuda() for tensor in inputs))
        assert torch.equal(answer.cpu().double(), reference(spec, *inputs))
