"""A bundle made and run, by a Python that finds nothing of this project but what the bundle carries."""

import json
import re
import site
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_database import write_tuned
from test_gpu_kernel import needs_emulator

from convt_tvm import bundle_run, compiler
from convt_tvm.bundle import Bundle, _unpack_wheel, make_bundle, variants
from convt_tvm.database import find_result, merge
from convt_tvm.emulated_torch import emulated_gpu
from convt_tvm.errors import BuildError, BundleError, IncompatibleMachineError, TargetError
from convt_tvm.rows import OURS, OURS_DEFAULT, latest_runs, read_rows
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

SPEC = ConvTranspose2dSpec(n=1, ci=2, ih=3, iw=3, co=4, kernel_size=3, stride=2)
WORKLOAD = Workload(name="tiny", source="", spec=SPEC)
TARGET = Target.parse("llvm").for_dtype("float32")
CARRIED = (
    "numpy",
    "numpy.libs",
    "torch",
    "torchgen",
    "functorch",
    "tvm_ffi",
    "sympy",
    "mpmath",
    "typing_extensions.py",
)
"""What the other machine's Python has: torch with what it imports, and apache-tvm-ffi."""
_BLOCKED = "import socket\ndef refuse(*_, **__):\n    raise OSError('no network')\nsocket.socket.connect = refuse\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVT_TVM_TUNING_LOGS", str(home / "logs"))
        write_tuned(home / "logs", SPEC, TARGET, 1)
        return home / "kit.pyz", make_bundle(home / "kit.pyz", [(WORKLOAD, TARGET)], candidates=2)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs a bundle in an environment that has torch, numpy and apache-tvm-ffi, no network and no compiler."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    for folder in map(Path, site.getsitepackages()):
        found = [folder / name for name in CARRIED]
        found += [*folder.glob("torch-*.dist-info"), *folder.glob("numpy-*.dist-info")]
        for path in found:
            if path.exists():
                (packages / path.name).symlink_to(path)
    (packages / "sitecustomize.py").write_text(_BLOCKED)

    def run(path, *arguments, cwd):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
        command = [home / "bin" / "python", path, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rehearsal_leaves_rows_and_logs_that_are_read_at_home(made, elsewhere, tmp_path):
    path, bundle = made
    # As in a checkout of the project that is another version.
    (tmp_path / "convt_tvm").mkdir()
    (tmp_path / "convt_tvm" / "__init__.py").write_text("raise RuntimeError('not what the bundle carries')")
    code, out, err = elsewhere(path, "--rounds", "2", "--peers", "torch,openvino", cwd=tmp_path)
    assert (code, err) == (0, ""), out
    results = tmp_path / "convt-tvm-results"
    (checked,) = lines(results / "check.jsonl")
    assert (checked["workload"], checked["verdict"], checked["exact"]) == ("tiny", "good", True)
    rows = read_rows(results / "bench.jsonl")
    (run,) = latest_runs(rows)
    assert (run.ours.status, run.rows["torch"].status, run.rows["openvino"].status) == ("ok", "ok", "unavailable")
    assert run.rows[OURS_DEFAULT].status == "ok" and run.rows[OURS_DEFAULT].layout != run.ours.layout
    assert run.ours.commit == bundle.commit and run.ours.implementation == OURS
    with zipfile.ZipFile(results / "results.zip") as archive:
        archive.extractall(tmp_path / "home")
    assert (tmp_path / "home" / "bench.jsonl").read_bytes() == (results / "bench.jsonl").read_bytes()
    (merged,) = merge(tmp_path / "home" / "tuning_logs", tmp_path / "logs")
    assert (merged.spec, merged.added["trials.jsonl"]) == (SPEC.name, 2)
    found = find_result(SPEC, TARGET, logs=tmp_path / "logs").result
    assert found is not None and found.source == bundle.source[:12]
    assert {each.candidate.key for each in found.finalists} <= {e.candidate.key for e in bundle.entries[0].candidates}
    # What is written down is not done again.
    code, out, _ = elsewhere(path, "--rounds", "2", "--steps", "check,bench", cwd=tmp_path)
    assert (code, len(out.splitlines()), len(read_rows(results / "bench.jsonl"))) == (0, 1, len(rows))


@needs_emulator
def test_kernels_for_gpus_rehearse_on_the_emulator(elsewhere, tmp_path):
    with emulated_gpu():
        make_bundle(tmp_path / "kit.pyz", [(WORKLOAD, Target.parse("cuda"))], candidates=1)
    code, out, err = elsewhere(tmp_path / "kit.pyz", "--steps", "check,tune", cwd=tmp_path)
    assert (code, err) == (0, ""), out
    (checked,) = lines(tmp_path / "convt-tvm-results" / "check.jsonl")
    assert (checked["verdict"], checked["target"]) == ("good", "cuda:sm_90")
    (result,) = lines(tmp_path / "convt-tvm-results" / "tuning_logs" / "cuda-sm_90" / SPEC.name / "results.jsonl")
    assert result["machine"] == "emulated"


def test_a_budget_of_nothing_does_nothing_and_says_what_is_left(made, elsewhere, tmp_path):
    code, out, _ = elsewhere(made[0], "--minutes", "0", cwd=tmp_path)
    assert code == 0
    assert "3 steps are left; the same command goes on" in out


def test_a_bundle_lists_what_it_holds_and_refuses_other_steps(made, elsewhere, tmp_path):
    code, out, _ = elsewhere(made[0], "--list", cwd=tmp_path)
    assert (code, out.split()) == (0, ["tiny", SPEC.name, TARGET.name, "2", "candidates"])
    code, _, err = elsewhere(made[0], "--steps", "check,paint", cwd=tmp_path)
    assert code == 2 and "there is no step paint; there are check, bench, tune" in err


def test_a_machine_that_lacks_packages_or_a_gpu_is_told_before_any_work(made, monkeypatch, tmp_path):
    # -S: without any package.
    done = subprocess.run([sys.executable, "-S", "-I", made[0]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []
    assert re.match(r"error: this Python has no numpy, torch, tvm_ffi; install what is missing, or carry", done.stderr)
    bundle = made[1]
    monkeypatch.setattr("convt_tvm.target.find_driver", lambda: None)
    entry = replace(bundle.entries[0], target=Target.parse("cuda:sm_90"))
    with pytest.raises(IncompatibleMachineError, match="no NVIDIA driver"):
        bundle_run._require(replace(bundle, entries=(entry,)))


def test_a_kernel_that_crashes_costs_itself_alone(made, elsewhere, tmp_path):
    broken = tmp_path / "broken.pyz"
    with zipfile.ZipFile(made[0]) as archive, zipfile.ZipFile(broken, "w") as changed:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("site/convt_tvm/check.py"):
                data = data.replace(
                    b"def compare_kernel(", b"import os\n\n\ndef compare_kernel(*_):\n    os.abort()\n\n\ndef unused("
                )
            changed.writestr(name, data)
    code, out, _ = elsewhere(broken, "--steps", "check,bench", cwd=tmp_path)
    assert code == 1
    (row,) = lines(tmp_path / "convt-tvm-results" / "check.jsonl")
    assert row["verdict"] == "bad" and row["reason"].startswith("crashed: killed by SIGABRT")
    assert "not timed, its answers are wrong" in out


def test_a_bundle_survives_json(made):
    assert Bundle.from_json(json.loads(json.dumps(made[1].to_json()))) == made[1]


def test_precisions_vary_the_spec_and_tf32_the_target():
    cuda = Target.parse("cuda:sm_90")
    assert variants(WORKLOAD, cuda, []) == [(WORKLOAD, cuda)]
    half, _ = variants(WORKLOAD, cuda, ["float16"])[0]
    assert (half.name, half.spec.dtype) == ("tiny float16", "float16")
    with pytest.raises(BundleError, match="there is no precision int8; there are float32, tf32"):
        variants(WORKLOAD, cuda, ["int8"])
    with pytest.raises(TargetError, match="tf32"):
        variants(WORKLOAD, TARGET, ["tf32"])


def test_a_bundle_beyond_its_limit_is_not_written(tmp_path):
    with pytest.raises(BundleError, match=r"the bundle has \d+\.\d MiB, more than 0\.25; name fewer workloads"):
        make_bundle(tmp_path / "kit.pyz", [(WORKLOAD, TARGET)], limit_bytes=2**18)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_wheel_is_named(tmp_path):
    (tmp_path / "a.whl").write_text("no wheel")
    with pytest.raises(BundleError, match=r"a\.whl is no wheel that can be carried"):
        _unpack_wheel(tmp_path / "a.whl", tmp_path)


def test_a_kernel_that_cannot_be_compiled_is_told_and_left_out(run, monkeypatch, tmp_path):
    honest = compiler.build_artifact

    def build(spec, target, directory, **options):
        if spec.dtype == "float16":
            raise BuildError("ptxas says no")
        return honest(spec, target, directory, **options)

    monkeypatch.setattr(compiler, "build_artifact", build)
    arguments = ["bundle", SPEC.name, "-o", tmp_path / "kit.pyz", "--json", "--precisions"]
    code, out, err = run(*arguments, "float16,float32")
    assert (code, err) == (1, f"error: {SPEC.name} float16: ptxas says no\n")
    assert [entry["workload"] for entry in json.loads(out)["entries"]] == [SPEC.name]
    code, out, err = run(*arguments, "float16")
    assert (code, out) == (1, "") and "no kernel could be compiled;" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dcgan/9", "-o", "kit.pyz"], "dcgan/9"),
        (["dcgan/5"], "Missing option '--output'"),
        (["dcgan/5", "-o", "kit.pyz", "--precisions", "int8"], "there is no precision int8"),
        (["dcgan/5", "-o", "kit.pyz", "--emulate"], "the emulator runs code for GPUs"),
    ],
)
def test_mistakes_exit_with_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("bundle", *arguments)
    assert (code, out, message in err.replace("\n", " ")) == (2, "", True), err
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_made(run, tmp_path):
    code, out, err = run("bundle", SPEC.name, "-o", tmp_path / "kit.pyz", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["size_bytes"] == (tmp_path / "kit.pyz").stat().st_size < 2 << 20
    assert said["entries"] == [{"workload": SPEC.name, "spec": SPEC.name, "target": TARGET.name}]
