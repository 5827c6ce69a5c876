from dataclasses import replace
from math import prod

import pytest
from machine_code import disassemble, innermost_loops

from convt_tvm import roofline, runtime
from convt_tvm.roofline import ACCUMULATORS, ROW_VECTORS, Limits, Loop, Loops, bound, measure, processor_loops
from convt_tvm.roofline_torch import GPU_WORKING_SETS, LEAST_BYTES, _working_set, torch_loops
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

SPEC = ConvTranspose2dSpec(n=1, ci=16, ih=8, iw=8, co=4, kernel_size=2, stride=2, bias=False)
LIMITS = Limits(1, "float32", 1e9, 1e9)
LARGE = ConvTranspose2dSpec(n=4, ci=64, ih=32, iw=32, co=64, kernel_size=4, stride=2, padding=1, bias=False)
"""Reads 1.25 MiB and writes 4 MiB in float32: multiples of any row and of any number of threads here."""


def test_the_larger_time_binds():
    found = bound(SPEC, LIMITS)
    assert found.flops == 2 * 16 * 4 * 16 * 16
    assert found.size_bytes == 4 * (16 * 64 + 16 * 4 * 4 + 4 * 16 * 16)
    assert found.compute_secs == pytest.approx(32768e-9)
    assert found.memory_secs == pytest.approx(9216e-9)
    assert (found.by, found.secs) == ("compute", found.compute_secs)
    slow = Limits(1, "float32", 1e12, 1e9)
    assert (bound(SPEC, slow).by, bound(SPEC, slow).secs) == ("memory", found.memory_secs)


def test_limits_are_amounts_over_one_number_of_the_samples():
    loops = Loops(2, "float32", Loop(int, 6e6), (Loop(int, 8e3), Loop(int, 8e3)))
    assert set(loops.functions.values()) == {int} and len(loops.functions) == 3
    assert not any(name.isidentifier() for name in loops.functions)
    samples = dict(zip(loops.functions, ([1.0, 3.0, 8.0], [2.0, 4.0, 5.0], [1.0, 5.0, 6.0]), strict=True))
    assert loops.limits({"ours": [1.0], **samples}) == Limits(2, "float32", 2e12, 2e9)
    assert loops.limits(samples, min) == Limits(2, "float32", 6e12, 8e9)


def test_loops_alone_take_turns_and_the_best_counts():
    calls = []
    loops = Loops(
        1, "float32", Loop(lambda: calls.append("flops"), 100.0), (Loop(lambda: calls.append("bytes"), 10.0),)
    )
    secs = {"flops": iter([9.0, 2.0, 4.0, 4.0, 4.0, 4.0]), "bytes": iter([9.0, 4.0, 1.0, 4.0, 4.0, 4.0])}

    def time_calls(function, count):
        function()
        return next(secs[calls[-1]])

    assert measure(loops, settle_secs=0.0, time_calls=time_calls) == Limits(1, "float32", 50.0, 10.0)


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    path = tmp_path_factory.mktemp("limits") / "limits.so"
    roofline._compile("float32", 1, path)
    return disassemble(path)


def function_text(listing, function):
    return listing[listing.index(f"<__tvm_ffi_{function}>:") :].split("\n\n")[0]


def loop_body(listing, function, mnemonic):
    """Mnemonics and operands of the innermost loop of `function` that has the most `mnemonic`."""
    loops = innermost_loops(function_text(listing, function))
    return max(loops, key=lambda body: sum(name.startswith(mnemonic) for name, _ in body))


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
@pytest.mark.parametrize("function", ["move", "move_past_caches"])
def test_moving_reads_whole_vectors_and_nothing_else(listing, function):
    body = loop_body(listing, function, "vaddps")
    loads = [operands for name, operands in body if name == "vaddps" and "(" in operands]
    register = {64: "%zmm", 32: "%ymm"}[Target.parse("llvm").vector_bytes]
    assert len(loads) % ROW_VECTORS == 0 and loads
    assert len({operands.split(",")[-1] for operands in loads}) == ROW_VECTORS
    assert all(operands.count(register) == 2 for operands in loads)
    assert not any(name.startswith("v") for name, _ in body if name != "vaddps")


@pytest.mark.skipif("avx" not in Target.parse("llvm").features, reason="looks for x86's vector stores")
@pytest.mark.parametrize(("function", "store"), [("move", "vmovaps"), ("move_past_caches", "vmovntp")])
def test_moving_writes_whole_vectors_and_nothing_else(listing, function, store):
    body = loop_body(listing, function, store)
    stores = [operands for name, operands in body if name.startswith(store) and operands.endswith(")")]
    register = {64: "%zmm", 32: "%ymm"}[Target.parse("llvm").vector_bytes]
    assert len(stores) % ROW_VECTORS == 0 and stores
    assert all(operands.startswith(register) for operands in stores)
    assert len({operands.split(",")[0] for operands in stores}) == ROW_VECTORS
    assert not any(name.startswith("v") and not name.startswith(store) for name, _ in body)
    assert ("sfence" in function_text(listing, function)) == (function == "move_past_caches")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = runtime.get_num_threads()
    try:
        runtime.set_num_threads(request.param)
    except ValueError:
        pytest.skip("needs as many CPUs")
    yield request.param
    runtime.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_row_is_read_and_written_once_a_pass(dtype, threads):
    """Rows of ones: each pass adds their number to the accumulators, which is written."""
    library, lanes = roofline._library(dtype, threads), roofline._lanes(dtype)
    row_bytes = ROW_VECTORS * lanes * (4 if dtype == "float32" else 8)
    for reads, writes, blocks, passes in ((5, 3, 1, 1), (7, 2, 4, 2), (1, 30, 16, 3), (30, 1, 16, 1), (2, 2, 9, 1)):
        source, target = (roofline._rows(threads * rows * row_bytes, dtype, threads) for rows in (reads, writes))
        assert (source.shape, target.shape) == tuple((threads, n, ROW_VECTORS, lanes) for n in (reads, writes))
        assert (source == 1).all()
        for move in (library.move, library.move_past_caches):
            move(source, target.fill_(-1), blocks, passes)
            before = [(passes - 1) * reads + reads * (block + 1) // blocks for block in range(blocks)]
            for block, expected in enumerate(before):
                assert (target[:, writes * block // blocks : writes * (block + 1) // blocks] == expected).all()


@pytest.mark.parametrize(("dtype", "value_bytes"), [("float32", 4), ("float64", 8), ("bfloat16", 2), ("float16", 2)])
def test_the_bytes_are_the_specs(dtype, value_bytes, threads):
    spec = replace(LARGE, dtype=dtype)
    loops = processor_loops(spec, spec.accumulator_dtype, threads)
    once = spec.size_bytes
    assert once == value_bytes * (4 * 64 * 32 * 32 + 64 * 64 * 16 + 4 * 64 * 64 * 64)
    passes = -(-roofline.CALL_BYTES * threads // once)
    for move in loops.moves:
        source, target, blocks, found = move.run.args
        assert (source.nbytes + target.nbytes, target.nbytes) == (once, value_bytes * prod(spec.output_shape))
        assert (found, move.amount) == (passes, passes * once)
        assert blocks * threads * roofline.BLOCK_ROWS * source[0, 0].nbytes >= once


def test_tiny_tensors_are_rounded_up_to_a_row_and_moved_often(threads):
    loops = processor_loops(SPEC, "float32", threads)
    source, target, _, passes = loops.moves[0].run.args
    row_bytes = source[0, 0].nbytes
    written = 4 * prod(SPEC.output_shape)
    assert 0 <= source.nbytes - (SPEC.size_bytes - written) < threads * row_bytes
    assert 0 <= target.nbytes - written < threads * row_bytes
    assert passes * (source.nbytes + target.nbytes) >= roofline.CALL_BYTES * threads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_this_machine_has_limits(monkeypatch, dtype):
    monkeypatch.setattr(roofline, "_SAMPLE_SECS", 0.001)
    runtime.set_num_threads(1)
    found = measure(processor_loops(SPEC, dtype, 1))
    assert (found.threads, found.dtype) == (1, dtype)
    assert 1e8 < found.flops_per_sec < 1e13
    assert 1e7 < found.bytes_per_sec < 1e13


@pytest.mark.skipif(not Target.parse("llvm").multiplies_pairs, reason="looks for AVX-512 BF16")
def test_dot_products_count_twice(tmp_path):
    pairs, single = (processor_loops(SPEC, dtype, 1).multiply_adds.amount for dtype in ("bfloat16", "float32"))
    assert pairs == 2 * single
    roofline._compile("bfloat16", 1, tmp_path / "limits.so")
    body = loop_body(disassemble(tmp_path / "limits.so"), "multiply_add", "vdpbf16ps")
    products = [operands for name, operands in body if name == "vdpbf16ps"]
    assert len({operands.split(",")[-1] for operands in products}) == ACCUMULATORS
    assert len(body) - len(products) <= 3


def test_the_peak_counts_both_operations_of_every_lane_and_thread(threads):
    lanes = Target.parse("llvm").vector_bytes // 4
    found = processor_loops(SPEC, "float32", threads).multiply_adds
    assert found.run.args[1] == roofline.STEPS
    assert found.amount == 2 * threads * ACCUMULATORS * lanes * roofline.STEPS


def test_torchs_loops_multiply_matrices_and_copy_the_specs_bytes():
    loops = torch_loops(LARGE, "cpu", "bfloat16", 1)
    assert (loops.threads, loops.dtype) == (1, "bfloat16")
    assert loops.multiply_adds.amount == 2 * 1024**3
    (copy,) = loops.moves
    assert copy.amount == LARGE.size_bytes
    for run in loops.functions.values():
        run()
    assert torch_loops(SPEC, "cpu", "float32", 1).moves[0].amount == LEAST_BYTES


@pytest.mark.parametrize(
    ("size", "chosen"), [(1, 0), (GPU_WORKING_SETS[0], 0), (GPU_WORKING_SETS[0] + 1, 1), (1 << 40, 2)]
)
def test_on_a_gpu_the_copy_is_the_smallest_that_holds_the_tensors(size, chosen):
    assert _working_set(size, "cuda") == GPU_WORKING_SETS[chosen]
