"""CUDA kernels where there is no GPU: compiled by nvcc, their resources read, and run on the CPU by the emulator."""

import json
from dataclasses import replace

import pytest
from emulated_kernels import cheapest, is_exact, needs_toolkit, plant

from convt_tvm import emulator
from convt_tvm.artifact import read_manifest
from convt_tvm.cases import FUZZ
from convt_tvm.check import compare
from convt_tvm.cli import main
from convt_tvm.compiler import build, build_artifact, lower_choice
from convt_tvm.conformance import blocks, conform
from convt_tvm.cost_cuda import MAX_REGISTERS, SHARED_BYTES, shared_bytes, thread_layouts
from convt_tvm.cuda_toolkit import find_toolkit
from convt_tvm.emulate import EmulatedKernel, check_emulated
from convt_tvm.errors import BuildError, IncompatibleMachineError
from convt_tvm.findings import read_examinations
from convt_tvm.gpu import find_driver
from convt_tvm.replay import read_reproducer, replay
from convt_tvm.space import default_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.thread_layout import ThreadLayout
from convt_tvm.workloads import Workload, resolve

no_gpu_here = pytest.mark.skipif(find_driver() is not None, reason="this machine has NVIDIA's driver")
TARGET = Target.parse("cuda:sm_80+sm_90")
FATBIN_MAGIC = (0xBA55ED50).to_bytes(4, "little")
SPEC = ConvTranspose2dSpec(n=2, ci=8, ih=5, iw=7, co=6, kernel_size=3, stride=2, padding=1, output_padding=1)


@needs_toolkit
def test_an_artifact_holds_machine_code_for_each_architecture_and_what_it_takes(tmp_path):
    manifest = build_artifact(SPEC, TARGET, tmp_path / "kernel")
    assert read_manifest(tmp_path / "kernel") == manifest
    assert manifest.target == TARGET
    assert {found["arch"] for found in manifest.resources} == {"sm_80", "sm_90"}
    assert {found["function"] for found in manifest.resources} == {"convt_kernel", "convt_kernel_1", "pack_kernel"}
    layout = default_choice(SPEC, TARGET).layout
    for found in manifest.resources:
        assert 0 < found["registers"] <= MAX_REGISTERS
        assert found["shared_bytes"] <= shared_bytes(SPEC, layout)
        assert found["spill_bytes"] == found["stack_bytes"] == 0
    assert FATBIN_MAGIC in (tmp_path / "kernel" / "kernel.so").read_bytes()


@needs_toolkit
@no_gpu_here
def test_a_kernel_cannot_be_built_and_loaded_where_there_is_no_gpu(tmp_path):
    with pytest.raises(IncompatibleMachineError, match=r"no NVIDIA driver .*--emulate --target cuda:sm_80\+sm_90"):
        build(SPEC, TARGET)


def test_what_is_missing_is_named_where_there_is_no_toolkit(monkeypatch, tmp_path):
    monkeypatch.setattr("convt_tvm.cuda_toolkit._candidates", lambda: iter([tmp_path / "bin" / "nvcc"]))
    with pytest.raises(BuildError, match=r"needs nvcc, which was not found; install the CUDA toolkit .*pip install"):
        find_toolkit()


@needs_toolkit
def test_nvcc_names_what_it_refuses():
    from convt_tvm.cuda_toolkit import compile_fatbin

    with pytest.raises(BuildError, match=r"cannot compile for sm_90: .*identifier \"nonsense\" is undefined"):
        compile_fatbin('extern "C" __global__ void f() { nonsense; }', ["sm_90"])


@needs_toolkit
@pytest.mark.parametrize("name", ["cuda_shared", "cuda_direct"])
@pytest.mark.parametrize("descending", [False, True])
def test_emulated_kernels_are_exact(name, descending):
    kernel = EmulatedKernel(SPEC, TARGET, cheapest(SPEC, TARGET, name), descending=descending)
    assert kernel.choice.space.name == name
    assert compare(SPEC, kernel).reason == ""


@needs_toolkit
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_emulated_kernels_keep_sums_in_the_accumulators_type(dtype):
    spec = replace(SPEC, dtype=dtype)
    assert compare(spec, EmulatedKernel(spec, TARGET)).reason == ""


@needs_toolkit
@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 2, "bias": False},
        {"ci": 6, "co": 6, "groups": 6},
        {"stride": (3, 1), "kernel_size": (2, 5), "dilation": (2, 3), "padding": (0, 4), "output_padding": (1, 0)},
        {"kernel_size": 1, "stride": 3, "padding": 0, "output_padding": 2},
        {"stride": 8, "kernel_size": 16, "padding": 4, "output_padding": 0, "ih": 2, "iw": 2},
    ],
)
def test_emulated_defaults_are_exact_for_odd_specs(changes):
    spec = replace(SPEC, **changes)
    assert is_exact(EmulatedKernel(spec, TARGET))


def command(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(["check", SPEC.name, "--emulate", *arguments])
    return exit.value.code


@needs_toolkit
def test_the_command_checks_on_the_emulator(capsys):
    assert command("--target", TARGET.name, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["verdict"], row["exact"], row["target"], row["latency_us"]) == ("good", True, TARGET.name, None)


@needs_toolkit
def test_a_wrong_kernel_is_a_bad_row(monkeypatch):
    plant(monkeypatch, "__syncthreads();", ";")
    row = check_emulated(Workload(name=SPEC.name, source="", spec=SPEC), TARGET)
    assert row.verdict == "bad"
    assert "integer inputs:" in row.reason


def test_the_command_emulates_only_what_is_for_gpus(capsys):
    assert command("--target", "llvm") == 2
    assert "the emulator runs code for GPUs, not for llvm:" in capsys.readouterr().err


def test_layouts_stay_within_the_limits_of_a_launch():
    for workload in resolve(["dcgan/4", "fcn8s/up8", "bilinear/depthwise"]):
        for staged in (True, False):
            for layout in thread_layouts(workload.spec, TARGET, staged=staged):
                assert layout.threads <= 512
                assert layout.co_block == layout.channel_threads * layout.channel_tile
                assert shared_bytes(workload.spec, layout) <= SHARED_BYTES


LAYOUT = ThreadLayout("ow", 4, 2, 8, 1, 2, 2, channel_threads=4, column_threads=8, ci_block=4)


def staged(**changes):
    return replace(cheapest(SPEC, TARGET, "cuda_shared"), layout=replace(LAYOUT, **changes))


@needs_toolkit
def test_the_honest_kernel_of_the_planted_faults_is_exact():
    assert is_exact(EmulatedKernel(SPEC, TARGET, staged()))


@needs_toolkit
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", ["cuda_shared", "cuda_direct"])
@pytest.mark.parametrize("depth_threads", [2, 4, 8])
def test_threads_that_share_input_channels_add_up_all_of_them(name, depth_threads, descending):
    ci_block = depth_threads if name == "cuda_shared" else 0
    layout = replace(LAYOUT, ci_block=ci_block, depth_threads=depth_threads)
    choice = replace(cheapest(SPEC, TARGET, name), layout=layout)
    assert compare(SPEC, EmulatedKernel(SPEC, TARGET, choice, descending=descending)).reason == ""


@needs_toolkit
@pytest.mark.parametrize(("ci_block", "depth_threads"), [(6, 2), (5, 1), (16, 4)])
def test_the_last_step_may_have_fewer_channels(ci_block, depth_threads):
    assert is_exact(EmulatedKernel(SPEC, TARGET, staged(ci_block=ci_block, depth_threads=depth_threads)))


@needs_toolkit
@pytest.mark.parametrize("channels", [8, 96])
def test_a_step_is_fetched_ahead_or_in_batches(channels):
    spec = replace(SPEC, ci=2 * channels)
    choice = replace(cheapest(spec, TARGET, "cuda_shared"), layout=replace(LAYOUT, ci_block=channels))
    code = str(lower_choice(spec, TARGET, choice).module)
    ahead = "fetched1" in code
    assert ahead == (channels == 8)
    assert ("batch" in code) != ahead
    assert is_exact(EmulatedKernel(spec, TARGET, choice))


@needs_toolkit
def test_adding_up_before_all_have_summed_is_caught(monkeypatch):
    choice = staged(ci_block=8, depth_threads=2)
    assert is_exact(EmulatedKernel(SPEC, TARGET, choice))
    plant(monkeypatch, "__syncthreads();", ";")
    assert not is_exact(EmulatedKernel(SPEC, TARGET, choice))


@needs_toolkit
@pytest.mark.parametrize("descending", [False, True])
def test_a_missing_barrier_is_caught(monkeypatch, descending):
    plant(monkeypatch, "__syncthreads();", ";")
    assert not is_exact(EmulatedKernel(SPEC, TARGET, staged(), descending=descending))


@needs_toolkit
def test_a_barrier_that_some_threads_skip_is_caught(monkeypatch):
    plant(monkeypatch, "__syncthreads();", "if (threadIdx.x) __syncthreads();")
    with pytest.raises(RuntimeError, match="barrier that not all threads of a block reach"):
        is_exact(EmulatedKernel(SPEC, TARGET, staged()))


@needs_toolkit
def test_an_index_beyond_shared_memory_is_caught(monkeypatch):
    plant(monkeypatch, "window0_shared_ptr[(", "window0_shared_ptr[1000 + (")
    with pytest.raises(RuntimeError, match="access outside of its memory"):
        is_exact(EmulatedKernel(SPEC, TARGET, staged()))


@needs_toolkit
def test_a_write_beyond_the_output_is_caught(monkeypatch):
    plant(monkeypatch, "output_ptr[(", f"output_ptr[{2 * 6 * 10 * 14 - 8} + (")
    with pytest.raises(RuntimeError, match="access outside of its memory"):
        is_exact(EmulatedKernel(SPEC, TARGET, staged()))


@needs_toolkit
def test_a_tap_read_one_column_too_far_is_caught(monkeypatch):
    plant(monkeypatch, "acc0_local_ptr[0] + (window0_shared_ptr[(", "acc0_local_ptr[0] + (window0_shared_ptr[1 + (")
    try:
        exact = is_exact(EmulatedKernel(SPEC, TARGET, staged()))
    except RuntimeError:
        exact = False
    assert not exact


@needs_toolkit
def test_inline_assembly_is_refused():
    with pytest.raises(BuildError, match="neither inline assembly nor shared memory sized at the launch"):
        emulator.compile_emulated('extern "C" __global__ void f() { asm volatile("exit;"); }')


@needs_toolkit
def test_the_lab_examines_one_image_of_a_batch_on_the_emulator(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--target", "cuda:sm_90", "--dtype", "float16", "--report", str(tmp_path), "--json")
    assert command(*arguments) == 0
    row = json.loads(capsys.readouterr().out)
    (finding,) = row["findings"]
    assert (finding["implementation"], finding["stage"], finding["status"]) == ("ours/emulated", "exactness", "pass")
    assert finding["reason"] == f"batch of 1 in place of {SPEC.n}"
    assert row["spec"] == finding["spec"] == replace(SPEC, n=1, dtype="float16").name
    assert [found.to_json() for found in read_examinations(tmp_path / "rows.jsonl")] == [row]


@needs_toolkit
def test_a_failure_on_the_emulator_can_be_replayed(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plant(monkeypatch, "__syncthreads();", ";")
    assert command("--target", "cuda:sm_90", "--report", str(tmp_path / "r"), "--failures", str(tmp_path / "f")) == 1
    monkeypatch.undo()
    (path,) = (tmp_path / "f").iterdir()
    assert replay(read_reproducer(path)).finding.status == "pass"


@needs_toolkit
def test_drawn_specs_are_tried_on_the_emulator(monkeypatch):
    monkeypatch.setattr("convt_tvm.conformance.BLOCK", 2)
    wanted = blocks([FUZZ], seed=0, fuzz=2)
    ((tally,),) = conform(wanted, Target.parse("cuda:sm_90"), peers=False, emulate=True, jobs=1, commit=None)
    assert (tally.implementation, tally.passed, tally.failed) == ("ours/emulated", 2, 0)


def test_the_emulator_examines_only_what_is_for_gpus(capsys):
    assert command("--target", "llvm", "--report", "nowhere") == 2
    assert "the emulator runs code for GPUs, not for llvm:" in capsys.readouterr().err
