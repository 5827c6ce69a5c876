"""Sums stay in registers while products are added to them."""

import pytest
from machine_code import disassemble, innermost_loops

from convt_tvm import space
from convt_tvm.compiler import build_artifact
from convt_tvm.processor import host_architecture
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

AVX2 = Target.parse("llvm:x86-64-v3")
SPECS = [
    ConvTranspose2dSpec(n=1, ci=256, ih=16, iw=30, co=64, kernel_size=2, stride=2),
    ConvTranspose2dSpec(n=1, ci=32, ih=28, iw=28, co=32, kernel_size=3, stride=2, padding=1, output_padding=1),
    ConvTranspose2dSpec(n=1, ci=128, ih=32, iw=48, co=8, kernel_size=2, stride=2),
]


@pytest.mark.skipif(host_architecture() != "x86_64", reason="reads x86 code")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_of_16_registers_none_is_taken_from_a_loop_for_sums_that_wait(spec, tmp_path):
    # The cheapest tile of 12 sums in each of several phases, which are stored together.
    tiles = [c for c in space.choices(spec, AVX2) if c.layout.phases == 1 and c.layout.taps == "inner"]
    choice = next(c for c in tiles if c.layout.co_block * c.layout.row_block * c.layout.column_block == 12 * 8)
    build_artifact(spec, AVX2, tmp_path / "kernel", choice=choice)
    loops = innermost_loops(disassemble(tmp_path / "kernel" / "kernel.so"))
    summing = [loop for loop in loops if sum(name.startswith("vfmadd") for name, _ in loop) >= 12]
    assert summing
    for loop in summing:
        assert not [part for part in loop if "ymm" in part[1] and ("(%rsp" in part[1] or "(%rbp" in part[1])]
