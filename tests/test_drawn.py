"""What `check --conformance` draws, and that nothing of it is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from convt_tvm.compiler import lower_choice
from convt_tvm.dot_layout import DotLayout
from convt_tvm.fuzz import Domain, fuzzed_specs
from convt_tvm.implementations import _drawn
from convt_tvm.layout import Layout
from convt_tvm.space import choices, default_choice, spaces
from convt_tvm.target import Target

AMX = Target.parse("llvm:x86_64+amx-bf16+avx512f+avx512bf16+avx512vl+avx512dq")
PROCESSORS = {
    "AVX": "llvm:x86_64+avx",
    "AVX2": "llvm:x86-64-v3",
    "AVX-512": "llvm:x86-64-v4",
    "AVX-512 BF16": "llvm:x86_64+avx2+fma+avx512f+avx512bf16+avx512vl+avx512dq",
    "AMX": AMX.name,
    "NEON": "llvm:aarch64+neon",
}
"""None has to be what the tests run on: kernels are made for others as well."""


@pytest.mark.no_cover
def test_outputs_pass_the_caches_where_their_schedules_can():
    gathering, streaming, chunked, copying = set(), set(), set(), set()
    for number, (_, spec) in enumerate(fuzzed_specs(1, range(60))):
        target = AMX.for_dtype(spec.dtype)
        for space in spaces():
            found = choices(spec, target, space.name)
            if found and (choice := _drawn(found, spec, target)).layout.passes_caches:
                (gathering if choice.layout.gathers else streaming).add(space.name)
                assert type(choice.layout) in (Layout, DotLayout)
            elif found and (choice.layout.column_chunk or choice.layout.by_chunk):
                (copying if choice.layout.by_chunk else chunked).add(space.name)
        if number < 10:
            # Finding all for a GPU takes a second: of few specs, but none of them.
            found = choices(spec, Target.parse("cuda:sm_90").for_dtype(spec.dtype))
            assert not any(choice.layout.passes_caches for choice in found)
    assert gathering == {"llvm_channels", "llvm_columns", "llvm_dot"}
    assert streaming == {"llvm_columns"}
    assert copying == {"llvm_channels", "llvm_columns"}
    assert chunked == {*copying, "llvm_amx"}


@pytest.mark.parametrize("schedule", ["llvm_amx", "llvm_amx_taps"])
def test_what_is_drawn_for_a_tile_unit_is_lowered(schedule):
    specs = [spec for _, spec in fuzzed_specs(1, range(60)) if choices(spec, AMX.for_dtype(spec.dtype), schedule)]
    assert len(specs) > 5
    for spec in specs[:6]:
        target = AMX.for_dtype(spec.dtype)
        assert lower_choice(spec, target, _drawn(choices(spec, target, schedule), spec, target)).code


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_would_run_on_another_processor_is_lowered(name):
    target = Target.parse(PROCESSORS[name])
    domain = Domain(n=9, ci=40, co=40, ih=3, iw=4, kernel_size=4, stride=3)
    for number, spec in fuzzed_specs(3, range(9), dtypes=("float32", "bfloat16", "bfloat16", "float16"), domain=domain):
        own = replace(spec, n=None) if number % 2 else spec
        processor = target.for_dtype(spec.dtype)
        assert lower_choice(own, processor, default_choice(own, processor)).code, own.name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks a process up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from convt_tvm.conformance import _begin
from convt_tvm.target import Target

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, _begin, (Target.parse("llvm"), False, False))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(100)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    try:
        deadline = time.monotonic() + 20
        while runs(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not runs(worker)
    finally:
        if runs(worker):
            os.kill(worker, signal.SIGKILL)


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
