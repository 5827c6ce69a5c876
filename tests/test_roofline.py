import re
import shutil
import subprocess

import pytest

from convt_tvm import roofline
from convt_tvm.roofline import ACCUMULATORS, Bandwidth, Limits, bound, measure_limits
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

SPEC = ConvTranspose2dSpec(n=1, ci=16, ih=8, iw=8, co=4, kernel_size=2, stride=2, bias=False)
LIMITS = Limits(1, "float32", 1e9, (Bandwidth(1 << 10, 9e9), Bandwidth(1 << 20, 1e9), Bandwidth(1 << 30, 5e8)))


def test_the_larger_time_binds():
    found = bound(SPEC, LIMITS)
    assert found.flops == 2 * 16 * 4 * 16 * 16
    assert found.size_bytes == 4 * (16 * 64 + 16 * 4 * 4 + 4 * 16 * 16)
    assert found.compute_secs == pytest.approx(32768e-9)
    assert found.memory_secs == pytest.approx(9216e-9)
    assert (found.by, found.secs) == ("compute", found.compute_secs)
    slow = Limits(1, "float32", 1e12, LIMITS.bandwidths)
    assert (bound(SPEC, slow).by, bound(SPEC, slow).secs) == ("memory", found.memory_secs)


@pytest.mark.parametrize(
    ("size", "chosen"), [(1, 1 << 10), (1 << 10, 1 << 10), ((1 << 10) + 1, 1 << 20), (1 << 40, 1 << 30)]
)
def test_the_working_set_is_the_smallest_that_holds_the_tensors(size, chosen):
    assert LIMITS.bandwidth_for(size).size_bytes == chosen


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    path = tmp_path_factory.mktemp("limits") / "limits.so"
    roofline._compile("float32", 1, path)
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loop_body(listing, function, mnemonic):
    """Mnemonics and operands of the innermost loop of `function` that has the most `mnemonic`."""
    text = listing[listing.index(f"<__tvm_ffi_{function}>:") :].split("\n\n")[0]
    lines = [re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line) for line in text.splitlines()]
    code = [(int(line[1], 16), line[2], line[3]) for line in lines if line]
    loops = []
    for at, name, operands in code:
        target = re.match(r"([0-9a-f]+) ", operands)
        if name.startswith("j") and target and int(target[1], 16) < at:
            body = [entry for entry in code if int(target[1], 16) <= entry[0] <= at]
            loops.append([entry[1:] for entry in body])
    return max(loops, key=lambda body: (sum(name.startswith(mnemonic) for name, _ in body), -len(body)))


@pytest.mark.skipif("fma" not in Target.parse("llvm").features, reason="looks for x86's fused multiply-adds")
def test_the_peak_kernel_is_independent_multiply_adds_on_registers(listing):
    body = loop_body(listing, "multiply_add", "vfmadd")
    products = [operands for name, operands in body if name.startswith("vfmadd")]
    register = {64: "%zmm", 32: "%ymm"}[Target.parse("llvm").vector_bytes]
    assert len(products) % ACCUMULATORS == 0 and products
    assert len({operands.split(",")[-1] for operands in products}) == ACCUMULATORS
    assert all(operands.count(register) == 3 for operands in products)
    # The rest of the loop counts and jumps.
    assert len(body) - len(products) <= 3


@pytest.mark.skipif("avx" not in Target.parse("llvm").features, reason="looks for x86's vector additions")
def test_the_reading_kernel_reads_whole_vectors_and_stores_nothing(listing):
    body = loop_body(listing, "read", "vaddps")
    loads = [operands for name, operands in body if name == "vaddps" and "(" in operands]
    assert len(loads) >= roofline.READ_ACCUMULATORS
    assert not any(name.startswith("vmov") and operands.endswith(")") for name, operands in body)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_this_machine_has_limits(monkeypatch, dtype):
    monkeypatch.setattr(roofline, "WORKING_SETS", (1 << 16, 1 << 18))
    monkeypatch.setattr(roofline, "_SAMPLE_SECS", 0.001)
    found = measure_limits(dtype, 1)
    assert (found.threads, found.dtype) == (1, dtype)
    assert 1e8 < found.flops_per_sec < 1e13
    assert [each.size_bytes for each in found.bandwidths] == [1 << 16, 1 << 18]
    assert all(1e7 < each.bytes_per_sec < 1e13 for each in found.bandwidths)


@pytest.mark.skipif(not Target.parse("llvm").multiplies_pairs, reason="looks for AVX-512 BF16")
def test_dot_products_count_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "WORKING_SETS", ())
    monkeypatch.setattr(roofline, "_best_secs", lambda function: 2.0)
    assert measure_limits("bfloat16", 1).flops_per_sec == 2 * measure_limits("float32", 1).flops_per_sec
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    roofline._compile("bfloat16", 1, tmp_path / "limits.so")
    command = ["objdump", "-d", "--no-show-raw-insn", str(tmp_path / "limits.so")]
    body = loop_body(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout, "multiply_add", "vdpbf16ps"
    )
    products = [operands for name, operands in body if name == "vdpbf16ps"]
    assert len({operands.split(",")[-1] for operands in products}) == ACCUMULATORS
    assert len(body) - len(products) <= 3


def test_the_peak_counts_both_operations_of_every_lane_and_thread(monkeypatch):
    monkeypatch.setattr(roofline, "WORKING_SETS", ())
    monkeypatch.setattr(roofline, "_best_secs", lambda function: 2.0)
    lanes = Target.parse("llvm").vector_bytes // 4
    assert measure_limits("float32", 1).flops_per_sec == 2 * ACCUMULATORS * lanes * 100_000 / 2.0
