"""Sums stay in registers while products are added to them."""

import pytest
import torch
from machine_code import disassemble, innermost_loops

from convt_tvm import space
from convt_tvm.compiler import build, build_artifact
from convt_tvm.processor import host_architecture, host_features
from convt_tvm.reference import error_bound, normal_inputs, reference
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

AVX2 = Target.parse("llvm:x86-64-v3")
SPECS = [
    ConvTranspose2dSpec(n=1, ci=256, ih=16, iw=30, co=64, kernel_size=2, stride=2),
    ConvTranspose2dSpec(n=1, ci=32, ih=28, iw=28, co=32, kernel_size=3, stride=2, padding=1, output_padding=1),
    ConvTranspose2dSpec(n=1, ci=128, ih=32, iw=48, co=8, kernel_size=2, stride=2),
]


FEW_CHANNELS = [
    # Phases that begin in different columns, with as many taps each or not, or all in the same one.
    ConvTranspose2dSpec(n=1, ci=64, ih=32, iw=32, co=3, kernel_size=4, stride=2, padding=1),
    ConvTranspose2dSpec(n=1, ci=56, ih=8, iw=64, co=1, kernel_size=9, stride=3, padding=4, output_padding=2),
    ConvTranspose2dSpec(n=1, ci=56, ih=8, iw=64, co=1, kernel_size=9, stride=2, padding=4, output_padding=1),
    ConvTranspose2dSpec(n=1, ci=96, ih=1, iw=200, co=2, kernel_size=(1, 8), stride=(1, 4)),
]


def loops_of(directory):
    return innermost_loops(disassemble(directory / "kernel.so"))


def count_products(loop):
    return sum(name.startswith("vfmadd") for name, _ in loop)


def accesses_to_stack(loops):
    """Of loops with 12 multiply-adds and more, the operands of instructions with a vector on the stack."""
    summing = [loop for loop in loops if count_products(loop) >= 12]
    assert summing
    parts = [operands for loop in summing for _, operands in loop]
    return [operands for operands in parts if "ymm" in operands and ("(%rsp" in operands or "(%rbp" in operands)]


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_of_16_registers_none_is_taken_from_a_loop_for_sums_that_wait(spec, tmp_path):
    # The cheapest tile of 12 sums in each of several phases, which are stored together.
    tiles = [c for c in space.choices(spec, AVX2) if c.layout.phases == 1 and c.layout.taps == "inner"]
    choice = next(c for c in tiles if c.layout.co_block * c.layout.row_block * c.layout.column_block == 12 * 8)
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    assert not accesses_to_stack(loops_of(tmp_path / "kernel"))


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize("spec", FEW_CHANNELS, ids=lambda spec: spec.name)
def test_of_16_registers_none_is_taken_from_sums_for_a_vector_that_is_read_again(spec, tmp_path):
    choice = next(c for c in space.choices(spec, AVX2, "llvm_columns") if c.layout.phases > 1)
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    loops = loops_of(tmp_path / "kernel")
    assert not accesses_to_stack(loops)

    columns = {phase.base - tap for phase in spec.axes[1].phases for tap in range(phase.taps)}
    loop = max(loops, key=count_products)
    loads = [part for part in loop if "ymm" in part[1] and "(" in part[1] and part[0] != "vbroadcastss"]
    assert len(loads) == len(columns) * (choice.layout.held_vectors - 1)


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
def test_of_16_registers_none_is_taken_from_sums_for_values_of_later_taps(tmp_path):
    # Six columns side by side meet seven taps each: twelve values, and so few channels that LLVM unrolls their loop.
    spec = ConvTranspose2dSpec(n=1, ci=3, ih=16, iw=64, co=64, kernel_size=7, padding=3, memory_format="channels_last")
    choice = next(c for c in space.choices(spec, AVX2, "llvm_channels") if c.layout.row_chunk > 1)
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    # Of one step two weights and a value, so few of them that some of the sums of all parts stay in registers.
    loops = loops_of(tmp_path / "kernel")
    assert len(accesses_to_stack(loops)) < sum(map(count_products, loops)) / 2


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize("name", ["llvm_channels", "llvm_columns"])
def test_whether_a_phase_has_a_tap_is_asked_once_for_all_its_products(name, tmp_path):
    # Two of four column phases have taps, in a loop; asked before each product it took three times as long.
    spec = ConvTranspose2dSpec(n=1, ci=96, ih=8, iw=64, co=40, kernel_size=12, stride=4, padding=11, dilation=2)
    found = (c for c in space.choices(spec, AVX2, name) if c.layout.taps == "inner")
    choice = next(c for c in found if not c.layout.unrolls_phases(spec) and c.layout.tile_vectors >= 8)
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    summing = [loop for loop in loops_of(tmp_path / "kernel") if count_products(loop) >= choice.layout.tile_vectors]
    assert summing
    assert all(sum(mnemonic.startswith("j") for mnemonic, _ in loop) == 1 for loop in summing)


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
def test_a_loop_over_few_channels_is_not_unrolled_for_loads_ahead(tmp_path):
    spec = ConvTranspose2dSpec(n=1, ci=12, ih=24, iw=24, co=48, kernel_size=6, stride=2, padding=2)
    tiles = space.choices(spec, AVX2, "llvm_channels")
    choice = next(c for c in tiles if (c.layout.co_block, c.layout.column_block) == (16, 5))
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    assert {count_products(loop) for loop in loops_of(tmp_path / "kernel")} == {0, 2 * 5}


@pytest.mark.skipif(not host_features().issuperset(AVX2.features), reason="runs code for AVX2")
@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (4, 3, 0), (5, 4, 3), (7, 3, 2), (2, 3, 1), (6, 2, 5)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 2), (24, 5)])
def test_phases_in_step_sum_to_the_bits_of_each_on_its_own(channels, kernel, stride, padding):
    ci, co = channels
    spec = ConvTranspose2dSpec(n=1, ci=ci, ih=5, iw=23, co=co, kernel_size=kernel, stride=stride, padding=padding)
    by_phases = {c.layout.phases: c for c in reversed(space.choices(spec, AVX2, "llvm_columns"))}
    assert len(by_phases) > 1
    input, weight, bias = normal_inputs(spec, seed=1)
    outputs = []
    for choice in by_phases.values():
        built = build(spec, AVX2, choice=choice)
        outputs.append(built(input, built.pack(weight), bias))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    error = (outputs[0].double() - reference(spec, input, weight, bias)).abs()
    assert (error <= error_bound(spec, input, weight, bias)).all()
