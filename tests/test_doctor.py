import json
import signal
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from convt_tvm import doctor as module
from convt_tvm.doctor import PINS, Finding, diagnose, replay
from convt_tvm.errors import TargetError

GOOD = {**PINS, "torch": "2.13.0+cpu", "numpy": "2.4.6"}


def versions_with(**changes):
    findings = module._examine_versions(GOOD | {name.replace("_", "-"): value for name, value in changes.items()})
    return {finding.name: finding for finding in findings}


def test_the_pins_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {f"{name}=={version}" for name, version in PINS.items()} <= set(project["dependencies"])


def test_the_known_good_versions_are_ok():
    assert {finding.status for finding in versions_with().values()} == {"ok"}


@pytest.mark.parametrize(
    ("package", "version", "status", "found"),
    [
        ("apache_tvm", "0.26.0", "bad", "apache/tvm#19524"),
        ("apache_tvm", "0.9", "bad", "floordiv"),
        ("apache_tvm", "0.27.1", "note", "not tried"),
        ("apache_tvm", "1.0", "note", "not tried"),
        ("apache_tvm", None, "note", "none can be built"),
        ("apache_tvm_ffi", "0.1.15.post1", "bad", "save_json"),
        ("apache_tvm_ffi", "0.1.15.post2", "bad", "save_json"),
        ("apache_tvm_ffi", "0.1.16", "note", "not tried"),
        ("apache_tvm_ffi", None, "bad", "no kernel can be loaded"),
        ("torch", None, "note", "numpy arrays"),
        ("numpy", None, "bad", "no kernel can be loaded"),
    ],
)
def test_versions_known_to_fail_are_named_with_the_way_out(package, version, status, found):
    finding = versions_with(**{package: version})[package.replace("_", "-")]
    assert finding.status == status
    assert found in finding.found
    assert "pip install" in finding.advice


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """A path that holds the named programs and nothing else, and no CXX or CC."""

    def install(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("CC", raising=False)
        return tmp_path

    return install


def test_the_linker_is_the_first_compiler_on_the_path(compilers):
    directory = compilers("clang", "gcc")
    assert module._examine_linker() == Finding("linker", "ok", str(directory / "gcc"))


def test_the_environment_names_the_linker(compilers, monkeypatch):
    directory = compilers("gcc", "my-cc")
    monkeypatch.setenv("CC", "my-cc")
    assert module._examine_linker().found == str(directory / "my-cc")
    monkeypatch.setenv("CXX", "absent")
    finding = module._examine_linker()
    assert (finding.status, finding.found.startswith("$CXX or $CC names 'absent'")) == ("bad", True)


def test_no_linker_is_bad(compilers):
    compilers()
    finding = module._examine_linker()
    assert finding.status == "bad"
    assert "none of g++, gcc" in finding.found


def test_the_cache_directory_is_looked_at_and_not_created(tmp_path):
    directory = tmp_path / "a" / "b"
    assert module._examine_cache(directory).found == f"{directory} (not created yet)"
    assert not directory.parent.exists()
    (directory / "entry").mkdir(parents=True)
    (directory / "entry" / "kernel.so").write_bytes(bytes(2**20))
    (directory / "entry.lock").touch()
    assert module._examine_cache(directory).found == f"{directory}: 1 kernel, 1.0 MiB"


def test_a_cache_that_cannot_be_written_is_noted(tmp_path):
    (tmp_path / "file").touch()
    finding = module._examine_cache(tmp_path / "file" / "cache")
    assert (finding.status, finding.found) == ("note", f"{tmp_path / 'file' / 'cache'} cannot be written")
    assert "CONVT_TVM_CACHE_DIR" in finding.advice


def test_the_processor(monkeypatch):
    target = module.Target
    assert module._examine_processor("a processor").status == "ok"
    monkeypatch.setattr(module.Target, "parse", lambda text: target("llvm", "x86_64", ("sse4.2",)))
    finding = module._examine_processor("a processor")
    assert (finding.status, finding.found) == ("note", "a processor; kernels use sse4.2")

    def refuse(text):
        raise TargetError("this machine's processor, 'vax', is not supported.")

    monkeypatch.setattr(module.Target, "parse", refuse)
    assert module._examine_processor("vax").status == "bad"


def test_the_runtime_library(monkeypatch, tmp_path):
    assert module._examine_runtime_library(True).found.endswith("libtvm_runtime.so")
    assert module._examine_runtime_library(False).status == "note"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    finding = module._examine_runtime_library(True)
    assert finding.status == "bad"
    assert "--force-reinstall apache-tvm==0.27" in finding.advice


def test_the_compiler_of_this_machine_computes_the_right_thing(capsys):
    replay()
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    status = {finding["name"]: finding["status"] for finding in findings}
    assert status == {"apache/tvm#19524": "ok", "iter_map_simplify": "note", "link and load": "ok", "save_json": "ok"}
    assert "known, worked around" in findings[1]["found"]


def test_wrong_code_is_found(monkeypatch):
    monkeypatch.setattr(module, "_fuse_and_split", lambda function: _with_other_padding())
    finding = module._replay_output_padding()
    assert finding.status == "bad"
    assert "wrong code: 0 of 588 outputs unscheduled, " in finding.found


def _with_other_padding():
    """The same layer one row and column further down."""
    from tvm import te, topi

    input = te.placeholder((1, 16, 7, 7), "float32", name="input")
    weight = te.placeholder((16, 3, 3, 3), "float32", name="weight")
    output = topi.nn.conv2d_transpose_nchw(input, weight, (2, 2), (0, 0, 2, 2), "float32", (1, 1))
    return te.create_prim_func([input, weight, output]).with_attr("global_symbol", "main")


def test_a_failing_case_does_not_hide_the_next(monkeypatch, capsys):
    def fail():
        raise AttributeError("module 'tvm' has no attribute 'compile'")

    monkeypatch.setattr(module, "_replay_output_padding", fail)
    monkeypatch.setattr(module, "_replay_link", fail)
    replay()
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [finding["status"] for finding in findings] == ["bad", "note", "bad", "ok"]
    assert findings[0]["found"] == "AttributeError: module 'tvm' has no attribute 'compile'"


@pytest.fixture
def child(monkeypatch):
    """Replaces the process that runs the compiler."""

    def use(stdout="", stderr="", returncode=0, error=None):
        def run(command, **options):
            if error is not None:
                raise error
            return subprocess.CompletedProcess(command, returncode, stdout, stderr)

        monkeypatch.setattr(module.subprocess, "run", run)
        return list(module._replay_in_a_child())

    return use


def test_findings_of_the_child_are_passed_on(child):
    line = json.dumps(Finding("case", "ok", "right").to_json())
    assert child(f"a warning of tvm\n{line}\n") == [Finding("case", "ok", "right")]


def test_a_crash_of_the_compiler_is_a_finding(child):
    line = json.dumps(Finding("case", "ok", "right").to_json())
    first, crash = child(line, returncode=-signal.SIGSEGV)
    assert first.status == "ok"
    assert (crash.status, crash.found) == ("bad", "crashed with SIGSEGV")
    assert "apache-tvm-ffi==0.1.14.post1" in crash.advice
    (crash,) = child(stderr="Traceback\nImportError: libtvm.so\n", returncode=1)
    assert (crash.status, crash.found) == ("bad", "ImportError: libtvm.so")
    (crash,) = child(returncode=3)
    assert crash.found == "exit code 3"


def test_a_compiler_that_hangs_is_a_finding(child):
    (finding,) = child(error=subprocess.TimeoutExpired("python", 180))
    assert (finding.status, finding.found) == ("bad", "no answer within 180 s")


def test_diagnose_looks_at_everything(tmp_path):
    findings = list(diagnose(tmp_path / "cache"))
    names = [finding.name for finding in findings]
    assert names == [
        "python", "processor", "apache-tvm", "apache-tvm-ffi", "numpy", "torch", "libtvm_runtime.so", "linker",
        "cuda toolkit", "gpu", "cache",
        "apache/tvm#19524", "iter_map_simplify", "link and load", "save_json",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_without_the_compiler_nothing_is_replayed(monkeypatch, tmp_path):
    here = module.machine()
    versions = {**here.versions, "apache-tvm": None}
    monkeypatch.setattr(module, "machine", lambda: replace(here, versions=versions))
    names = [finding.name for finding in diagnose(tmp_path / "cache")]
    assert names[-1] == "cache"
