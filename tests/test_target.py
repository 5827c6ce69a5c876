"""Targets: parsing, canonical names, what LLVM makes of them, and the machine's description."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convt_tvm import processor
from convt_tvm.errors import IncompatibleMachineError, TargetError
from convt_tvm.machine import machine, package_versions
from convt_tvm.processor import LEVELS, TILE_FEATURES, host_features
from convt_tvm.target import Target

_SPR = """processor\t: 0
model name\t: Some   Processor
flags\t\t: fpu sse2 sse4_2 popcnt avx avx2 f16c fma bmi1 bmi2 abm movbe avx512f avx512bw avx512_bf16 avx512_vnni

processor\t: 1
flags\t\t: fpu
"""


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """A function that makes a text this machine's /proc/cpuinfo."""

    def set_text(text, arch="x86_64"):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(processor, "_CPUINFO", path)
        monkeypatch.setattr(processor.platform, "machine", lambda: arch)
        host_features.cache_clear()

    yield set_text
    monkeypatch.undo()
    host_features.cache_clear()


def test_host_features_reads_the_first_processor_under_llvm_names(cpuinfo):
    cpuinfo(_SPR)
    assert host_features() == {
        *("sse4.2", "popcnt", "avx", "avx2", "f16c", "fma", "bmi", "bmi2", "lzcnt", "movbe"),
        *("avx512f", "avx512bw", "avx512bf16", "avx512vnni"),
    }
    assert machine().cpu == "Some Processor"


def test_host_features_drops_what_needs_a_masked_feature(cpuinfo):
    cpuinfo(_SPR.replace(" fma ", " "))
    assert not {"avx512f", "avx512bw", "avx512bf16", "avx512vnni"} & host_features()
    assert "avx2" in host_features()


def test_host_features_on_arm_and_without_cpuinfo(cpuinfo, monkeypatch, tmp_path):
    cpuinfo("Features\t: fp asimd asimdhp asimddp bf16 sve\n", "aarch64")
    assert host_features() == {"fp-armv8", "neon", "fullfp16", "dotprod", "bf16"}
    assert Target.parse("llvm").vector_registers == 32
    assert Target.parse("llvm").level is None
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "absent")
    host_features.cache_clear()
    assert host_features() == frozenset()
    assert Target.parse("llvm").name == "llvm:aarch64"


def test_unknown_processor_is_a_target_error(cpuinfo):
    cpuinfo("", "riscv64")
    with pytest.raises(TargetError, match=r"'riscv64', is not supported; use an x86_64 or aarch64"):
        Target.parse("llvm")


def test_the_host_target_has_the_hosts_features_and_runs_here():
    target = Target.parse("llvm")
    assert set(target.features) == host_features()
    target.require_host()


def test_what_this_machine_cannot_run_is_refused_by_name(cpuinfo):
    cpuinfo("flags: sse4_2 popcnt avx")
    with pytest.raises(
        IncompatibleMachineError, match=r"lacks the CPU features avx2, fma; .*'llvm:x86-64-v2', 'llvm'\.$"
    ):
        Target.parse("llvm:x86_64+avx2+fma").require_host()
    with pytest.raises(
        IncompatibleMachineError, match="code for aarch64 does not run on this machine, which is x86_64"
    ):
        Target.parse("llvm:aarch64").require_host()
    Target.parse("llvm:x86-64-v2").require_host()


@pytest.mark.parametrize(
    "text", ["llvm", "llvm:x86_64", *(f"llvm:{level}" for level in LEVELS), "llvm:aarch64+neon+bf16"]
)
def test_names_and_json_round_trip(text):
    target = Target.parse(text)
    assert Target.parse(target.name) == target
    assert Target.from_json(target.to_json()) == target
    assert Target.parse(target) is target
    assert eval(repr(target)) == target
    assert re.fullmatch(r"[a-z0-9_.-]+", target.key)


def test_features_are_sorted_unique_and_closed():
    assert Target("llvm", "x86_64", ("fma", "avx2", "fma")).features == ("avx", "avx2", "fma", "sse4.2")
    assert "avx512vl" in Target.parse("llvm:x86_64+avx512fp16").features
    assert Target.parse("llvm:x86_64+avx2+fma") == Target.parse("llvm:x86_64+sse4.2+fma+avx+avx2")


def test_levels_are_closed_and_nested():
    for level, features in LEVELS.items():
        target = Target.parse(f"llvm:{level}")
        assert target.features == features
        assert target.level == level
        assert target.key == f"llvm-{level}"
    assert set(LEVELS["x86-64-v2"]) < set(LEVELS["x86-64-v3"]) < set(LEVELS["x86-64-v4"])


def test_keys_differ_where_targets_differ():
    texts = [
        "llvm:x86_64",
        "llvm:x86_64+avx2",
        "llvm:x86_64+avx2+fma",
        "llvm:x86-64-v3",
        "llvm:x86-64-v4",
        "llvm:aarch64",
    ]
    assert len({Target.parse(text).key for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("text", "size", "registers"),
    [
        ("llvm:x86_64", 16, 16),
        ("llvm:x86-64-v2", 16, 16),
        ("llvm:x86-64-v3", 32, 16),
        ("llvm:x86-64-v4", 64, 32),
        ("llvm:aarch64+neon", 16, 32),
    ],
)
def test_vector_registers(text, size, registers):
    assert Target.parse(text).vector_bytes == size
    assert Target.parse(text).vector_registers == registers
    assert Target.parse(text).has_few_registers == (registers == 16)


@pytest.mark.parametrize(
    "text", ["", "cuda:", "opencl", "llvm:", "llvm:x86-64-v5", "llvm -mcpu=znver4", "llvm:sparc+vis", "v3"]
)
def test_what_is_not_understood_is_told_the_forms(text):
    with pytest.raises(TargetError, match=re.escape(f"target {text!r} is not understood; write llvm, llvm:x86-64-v2")):
        Target.parse(text)


def test_unknown_features_list_the_known_ones():
    with pytest.raises(
        TargetError, match=r"'avx10' is not a known feature of x86_64; use any of amx-bf16, amx-tile, avx, avx2"
    ):
        Target.parse("llvm:x86_64+avx10")
    with pytest.raises(TargetError, match=r"'avx2' is not a known feature of aarch64"):
        Target("llvm", "aarch64", ("avx2",))
    with pytest.raises(TargetError, match="kind 'opencl' is not supported"):
        Target("opencl", "x86_64", ())
    with pytest.raises(TargetError, match="'sm_1', 'x86_64' is not a known CUDA architecture; use any of sm_75, sm_80"):
        Target("cuda", "x86_64", ("sm_1", "sm_90"))
    with pytest.raises(TargetError, match="architecture 'mips' is not supported; use one of aarch64, x86_64"):
        Target("llvm", "mips", ())


@pytest.mark.parametrize(
    "values",
    [[], {}, {"kind": "llvm", "arch": "x86_64"}, {"kind": "llvm", "arch": "x86_64", "features": [], "mcpu": "x"}],
)
def test_json_with_other_fields_is_refused(values):
    with pytest.raises(TargetError, match="a target has the fields"):
        Target.from_json(values)


@pytest.mark.parametrize("features", ["avx2", [1], None, {"avx2": 1}])
def test_json_with_ill_typed_features_is_refused(features):
    with pytest.raises(TargetError, match="features are a list of names"):
        Target.from_json({"kind": "llvm", "arch": "x86_64", "features": features})


def test_machine_describes_this_one_and_is_json():
    here = machine()
    assert here.cores >= 1
    assert here.python.startswith("3.")
    assert here.versions["numpy"]
    assert here.to_json()["features"] == sorted(host_features())


def test_absent_packages_have_no_version():
    assert package_versions(["no-such-package"]) == {"no-such-package": None}


def test_importing_and_describing_needs_neither_tvm_nor_torch():
    code = (
        "import sys; from convt_tvm.machine import machine; from convt_tvm.target import Target;"
        "machine(); Target.parse('llvm');"
        "print([m for m in ('tvm', 'torch', 'numpy') if m in sys.modules])"
    )
    root = Path(processor.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


_DISASSEMBLE = """
import sys, tvm, tvm_ffi
from tvm import te
from convt_tvm.target import Target
for text, path in zip(sys.argv[1::2], sys.argv[2::2]):
    a = te.placeholder((64, 16), "float32", name="a")
    b = te.placeholder((64, 16), "float32", name="b")
    c = te.compute((64, 16), lambda i, j: a[i, j] * b[i, j] + a[i, j], name="c")
    function = te.create_prim_func([a, b, c]).with_attr("global_symbol", "convt")
    schedule = tvm.s_tir.Schedule(tvm.IRModule({"convt": function}))
    schedule.work_on("convt")
    schedule.vectorize(schedule.get_loops(schedule.get_sblock("c"))[1])
    target = Target.parse(text).to_tvm()
    assert tvm.target.Target(target.export()) is not None
    assert tvm_ffi.structural_equal(tvm.ir.load_json(tvm.ir.save_json(target)), target)
    tvm.compile(schedule.mod, target=target).export_library(path)
"""


@pytest.mark.skipif(
    processor.host_architecture() != "x86_64" or shutil.which("objdump") is None,
    reason="needs an x86_64 with objdump",
)
def test_llvm_uses_the_vectors_and_fused_multiply_adds_named_and_warns_of_nothing(tmp_path):
    pytest.importorskip("tvm")
    texts = ["llvm:x86-64-v2", "llvm:x86-64-v3", "llvm:x86-64-v4", "llvm:x86_64+avx2+fma", "llvm"]
    paths = [tmp_path / f"{index}.so" for index in range(len(texts))]
    arguments = [str(part) for pair in zip(texts, paths, strict=True) for part in pair]
    done = subprocess.run(
        [sys.executable, "-c", _DISASSEMBLE, *arguments],
        cwd=Path(processor.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def code_of(path):
        return subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout

    v2, v3, v4, named, host = map(code_of, paths)
    assert "%ymm" not in v2
    assert "vfmadd" not in v2
    for code in (v3, named):
        assert "%zmm" not in code
        assert re.search(r"vfmadd\w+ps .*%ymm", code)
    assert re.search(r"vfmadd\w+ps .*%zmm", v4)
    if "avx512f" in host_features():
        assert re.search(r"vfmadd\w+ps .*%zmm", host)


def test_tf32_is_a_feature_of_targets_for_gpus_and_no_architecture():
    target = Target.parse("cuda:tf32+sm_90+sm_80")
    assert (target.name, target.gpu_archs, target.allows_tf32) == ("cuda:sm_80+sm_90+tf32", ("sm_80", "sm_90"), True)
    assert Target.from_json(target.to_json()) == target
    assert Target.parse("cuda:tf32").gpu_archs == Target.parse("cuda").gpu_archs
    assert not Target.parse("cuda:sm_90").allows_tf32
    assert target.key != Target.parse("cuda:sm_80+sm_90").key
    with pytest.raises(TargetError, match=r"'tf16' is not a known CUDA architecture; .* tf32 to let float32 be"):
        Target.parse("cuda:sm_90+tf16")
    with pytest.raises(TargetError, match=r"'tf32' is not a known feature of x86_64"):
        Target.parse("llvm:x86_64+tf32")


def test_processors_keep_channels_last_with_tile_units_too():
    tiles = Target("llvm", "x86_64", (*LEVELS["x86-64-v4"], *TILE_FEATURES))
    assert tiles.for_dtype("bfloat16").keeps_channels_last
    assert not Target.parse("cuda:sm_90").keeps_channels_last
