import doctest
import importlib
import importlib.resources
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from zipfile import ZipFile

import pytest

import convt_tvm.schedules

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRACKED = ("convt_tvm", "schedules", "tuning_logs", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project with a record in tuning_logs/, so that no build writes into the tree itself."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TRACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    record = copy / "tuning_logs" / "some_target" / "some_workload" / "database_workload.json"
    record.parent.mkdir(parents=True)
    record.write_text("[]\n")
    record.with_name("session.jsonl").write_text("{}\n")
    (copy / "schedules" / "llvm_planted.py").write_text('"""Planted by tests/test_packaging.py."""\n')
    return copy


def build(tree, hook, to):
    """Calls a hook of the build backend, as pip does for an installation without isolation."""
    to.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(to)!r}))"
    return to / run("-c", code, cwd=tree).split()[-1]


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "build_wheel", tmp_path_factory.mktemp("built") / "wheel")


def installed(archive, to):
    """What an interpreter sees that finds nothing of this project but `archive`, unpacked in `to`."""
    with ZipFile(archive) as file:
        file.extractall(to)
    code = (
        "import site, sys\n"
        f"site.addsitedir({str(to)!r})\n"
        f"sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import convt_tvm.schedules.llvm_planted as planted\n"
        "from importlib.resources import files\n"
        "from convt_tvm.workloads import resolve\n"
        "record = files('convt_tvm.tuning_logs') / 'some_target' / 'some_workload' / 'database_workload.json'\n"
        "print(planted.__file__, record, record.read_text().strip(), len(resolve(['all'])))"
    )
    # -S: the .pth files of this environment, which may hold an editable install of the tree, are not read.
    return run("-I", "-S", "-c", code, cwd=to).split()


def test_wheel_holds_the_package_its_schedules_and_its_logs(tree, wheel):
    with ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        licences = [name for name in file.namelist() if name.endswith("/licenses/LICENSE")]
    modules = {path.relative_to(tree).as_posix() for path in (tree / "convt_tvm").rglob("*.py")}
    headers = {
        path.relative_to(tree).as_posix()
        for folder in ("cuda", "emulated")
        for path in (tree / "convt_tvm" / folder).iterdir()
    }
    expected = modules | headers | {"convt_tvm/workloads.json", "convt_tvm/py.typed"}
    for folder in ("schedules", "tuning_logs"):
        # A tuning session's lock stays in a working tree, and there alone.
        files = (path for path in (tree / folder).rglob("*") if path.is_file() and path.name != ".lock")
        expected |= {f"convt_tvm/{path.relative_to(tree).as_posix()}" for path in files}
    assert names == expected
    assert len(licences) == 1


def test_wheel_imports_schedules_and_reads_logs(wheel, tmp_path):
    planted, record, text, workloads = installed(wheel, tmp_path)
    assert planted == str(tmp_path / "convt_tvm" / "schedules" / "llvm_planted.py")
    assert record.startswith(str(tmp_path / "convt_tvm" / "tuning_logs"))
    assert (text, workloads) == ("[]", "24")


def test_editable_install_imports_schedules_and_reads_logs_from_the_tree(tree, tmp_path):
    archive = build(tree, "build_editable", tmp_path / "wheel")
    planted, record, text, workloads = installed(archive, tmp_path / "site")
    assert planted == str(tree / "schedules" / "llvm_planted.py")
    assert record.startswith(str(tree / "tuning_logs"))
    assert (text, workloads) == ("[]", "24")


def test_this_installation_is_the_one_that_pyproject_describes():
    assert version("convt-tvm") == PROJECT["version"]
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "convt-tvm"]
    assert script.value == PROJECT["scripts"]["convt-tvm"]
    assert callable(script.load())


def test_compiler_versions_are_pinned():
    assert {"apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"} <= set(PROJECT["dependencies"])
    assert version("apache-tvm") == "0.27.0.post1"
    assert version("apache-tvm-ffi") == "0.1.14.post1"


def test_top_level_is_what_the_project_documents():
    command = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    visible = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    assert visible == {*TRACKED, "tests"}


def schedule_names():
    return [
        "convt_tvm.schedules",
        *(f"convt_tvm.schedules.{m.name}" for m in pkgutil.iter_modules(convt_tvm.schedules.__path__)),
    ]


@pytest.mark.parametrize("name", schedule_names())
def test_doctests_of_schedules(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_tuning_logs_are_found_in_this_installation():
    logs = importlib.resources.files("convt_tvm.tuning_logs")
    assert logs.joinpath("README.md").is_file()
