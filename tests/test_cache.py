import json
import multiprocessing
import subprocess
import sys
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from convt_tvm import artifact, cache
from convt_tvm.artifact import publish
from convt_tvm.errors import BuildError, IncompatibleMachineError, TargetError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.manifest import Manifest
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=2, kernel_size=2, stride=2)
OTHER = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=4, co=2, kernel_size=2, stride=2)


@dataclass
class StandIn:
    """What `load` returns here: the part of a Kernel that the cache looks at."""

    manifest: Manifest


def _load(directory):
    return StandIn(artifact.verify(directory))


class Compiler(types.ModuleType):
    """In place of `convt_tvm.compiler`: writes each build to a log, and an artifact without code."""

    def __init__(self, log, seconds=0.0):
        super().__init__("convt_tvm.compiler")
        self.log = log
        self.seconds = seconds
        self.error = None

    @property
    def builds(self):
        return self.log.read_text().split() if self.log.exists() else []

    def build_artifact(self, spec, target, directory):
        with self.log.open("a") as stream:
            stream.write(f"{spec.name}@{target.name}\n")
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        code = self.log.parent / f"code-{threading.get_ident()}"
        code.write_bytes(b"code")
        return publish(
            directory,
            spec=spec,
            target=target,
            schedule="none",
            layout={},
            trace=[],
            packed_shape=(1, *spec.weight_shape),
            packed_dtype=spec.dtype,
            versions={},
            fingerprint=source_fingerprint(),
            files={"kernel.so": code},
        )

    def build(self, spec, target):
        return StandIn(self.build_artifact(spec, target, self.log.parent / "private"))


def _stand_in(patch, folder, seconds=0.0):
    compiler = Compiler(folder / "builds.log", seconds)
    patch.setattr(cache, "load", _load)
    patch.setattr(cache, "_kernels", {})
    patch.setitem(sys.modules, "convt_tvm.compiler", compiler)
    return compiler


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, folder, monkeypatch):
    return _stand_in(monkeypatch, tmp_path)


def _forget():
    cache._kernels.clear()


def _entry(folder):
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    return entry


def test_the_directory_is_read_from_the_environment_at_each_call(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", str(tmp_path / "a"))
    assert cache.cache_directory() == tmp_path / "a"
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", "~/b")
    assert cache.cache_directory() == Path.home() / "b"
    monkeypatch.delenv("CONVT_TVM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory().name == "convt_tvm"
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_is_built_once(compiler, folder):
    first = cache.cached_kernel(SPEC)
    assert cache.cached_kernel(SPEC) is first
    assert cache.cached_kernel(SPEC, "llvm") is first
    assert cache.cached_kernel(SPEC, Target.parse("llvm")) is first
    assert compiler.builds == [f"{SPEC.name}@{Target.parse('llvm').for_dtype(SPEC.dtype).name}"]
    assert _entry(folder).name.startswith(SPEC.name + "-")


def test_the_next_process_finds_it_and_imports_no_compiler(compiler, monkeypatch):
    cache.cached_kernel(SPEC)
    _forget()
    monkeypatch.setitem(sys.modules, "convt_tvm.compiler", None)
    assert cache.cached_kernel(SPEC).manifest.spec == SPEC
    with pytest.raises(ImportError):
        cache.cached_kernel(OTHER)


def test_spec_target_fingerprint_and_format_are_the_key(compiler, folder, monkeypatch):
    cache.cached_kernel(SPEC)
    cache.cached_kernel(OTHER)
    cache.cached_kernel(SPEC, "llvm:x86-64-v2")
    assert len(compiler.builds) == 3
    _forget()
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cache.cached_kernel(SPEC)
    assert len(compiler.builds) == 4
    _forget()
    monkeypatch.setattr(cache, "source_fingerprint", lambda: "other")
    monkeypatch.setitem(globals(), "source_fingerprint", lambda: "other")
    cache.cached_kernel(SPEC)
    assert len(compiler.builds) == 5
    assert len({path.name for path in folder.iterdir() if path.is_dir()}) == 5


def test_threads_wait_for_one_build(compiler):
    compiler.seconds = 0.2
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(cache.cached_kernel, [SPEC, OTHER] * 4))
    assert len(compiler.builds) == 2
    assert len({id(kernel) for kernel in kernels}) == 2


def _ask(folder, start):
    patch = pytest.MonkeyPatch()
    _stand_in(patch, folder, seconds=0.5)
    patch.setenv("CONVT_TVM_CACHE_DIR", str(folder / "cache"))
    start.wait()
    assert cache.cached_kernel(SPEC).manifest.spec == SPEC


def test_processes_wait_for_one_build(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    processes = [context.Process(target=_ask, args=(tmp_path, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "builds.log").read_text().split()) == 1


def _flip_a_byte(entry):
    code = entry / "kernel.so"
    code.write_bytes(b"\x00" + code.read_bytes()[1:])


def _truncate_manifest(entry):
    manifest = entry / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])


@pytest.mark.parametrize(
    "damage",
    [_flip_a_byte, _truncate_manifest, lambda entry: (entry / "kernel.so").unlink()],
    ids=["flip", "cut", "miss"],
)
def test_a_damaged_entry_is_reported_once_and_built_again(compiler, folder, damage):
    cache.cached_kernel(SPEC)
    _forget()
    damage(_entry(folder))
    with pytest.warns(RuntimeWarning, match="; it is built again.") as caught:
        cache.cached_kernel(SPEC)
    assert len(caught) == 1
    assert str(_entry(folder)) in str(caught[0].message)
    assert len(compiler.builds) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.cached_kernel(SPEC)
        _forget()
        cache.cached_kernel(SPEC)
    assert len(compiler.builds) == 2


def test_an_entry_under_another_entrys_name_is_not_used(compiler, folder):
    cache.cached_kernel(SPEC)
    entry = _entry(folder)
    cache.cached_kernel(OTHER)
    other = next(path for path in folder.iterdir() if path.is_dir() and path != entry)
    artifact.copy(other, entry)
    _forget()
    with pytest.warns(RuntimeWarning, match=f"holds {OTHER.name} for .* where {SPEC.name} for .* belongs"):
        assert cache.cached_kernel(SPEC).manifest.spec == SPEC


def test_a_failed_build_is_not_remembered(compiler, folder):
    compiler.error = BuildError("no compiler today")
    with pytest.raises(BuildError, match="today"):
        cache.cached_kernel(SPEC)
    compiler.error = None
    cache.cached_kernel(SPEC)
    assert len(compiler.builds) == 2


def test_a_directory_that_cannot_be_written_is_reported_and_done_without(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVT_TVM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be written .* set CONVT_TVM_CACHE_DIR"):
        kernel = cache.cached_kernel(SPEC)
    assert cache.cached_kernel(SPEC) is kernel
    assert len(compiler.builds) == 1


def test_an_unknown_target_is_refused(compiler):
    with pytest.raises(TargetError, match="tpu"):
        cache.cached_kernel(SPEC, "tpu")


def test_a_target_that_cannot_run_here_is_refused_before_it_is_built(compiler, folder):
    foreign = "llvm:x86_64" if Target.parse("llvm").arch == "aarch64" else "llvm:aarch64"
    with pytest.raises(IncompatibleMachineError, match=foreign.removeprefix("llvm:")):
        cache.cached_kernel(SPEC, foreign)
    assert compiler.builds == []
    assert not folder.exists()


SERVE = """
import json, sys
from convt_tvm.cache import cached_kernel
from convt_tvm.spec import ConvTranspose2dSpec
kernel = cached_kernel(ConvTranspose2dSpec.from_name(sys.argv[1]))
print(json.dumps([kernel.manifest.digest, "tvm" in sys.modules, "convt_tvm.compiler" in sys.modules]))
"""


def test_a_real_kernel_is_built_by_one_process_and_served_without_tvm_by_the_next(folder):
    def serve():
        command = [sys.executable, "-c", SERVE, SPEC.name]
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    digest, *compiler_used = serve()
    assert compiler_used == [True, True]
    assert serve() == [digest, False, False]
