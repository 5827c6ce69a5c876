"""Bundles: one file with kernels and all that measures them, for a machine that has torch and no network.

A bundle is a zip archive that Python runs. It holds this package with TVM's small runtime libraries, compiled kernels,
candidates for tuning, and `convt_tvm.bundle_run`, which says what happens there.

| in the archive | is |
|---|---|
| ``__main__.py`` | unpacks the rest into a temporary directory and runs it |
| ``bundle.json`` | a `Bundle` |
| ``site/`` | this package, and the packages it needs that the other machine may lack |
| ``kernels/`` | an artifact for each entry, and one for each of its candidates |
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import files as distribution_files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from convt_tvm.bench import current_commit
from convt_tvm.emulator import shows_gpu
from convt_tvm.errors import BuildError, BundleError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.libraries import CUDA_RUNTIME_FILE, find_runtime
from convt_tvm.manifest import RUNTIME_FILE
from convt_tvm.records import Candidate
from convt_tvm.rows import PRECISIONS
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workers import Answer, work_through
from convt_tvm.workloads import Workload

if TYPE_CHECKING:
    from convt_tvm.space import Choice

__all__ = ["Bundle", "Carried", "Entry", "make_bundle", "variants"]

_PACKAGES = ("filelock",)
"""What the machine may lack, pure Python all of it. torch, numpy and apache-tvm-ffi it has, or wheels bring them."""
_LEFT_OUT = ("__pycache__", "tuning_logs")
"""Of the package. What was found by tuning is in the kernels that are carried."""
_MAIN = '''"""Unpacks this bundle and runs it: see `python3 BUNDLE --help`."""
import importlib.util, sys, tempfile, zipfile
if sys.version_info < (3, 11):
    sys.exit("error: this is Python %d.%d, and the bundle needs 3.11 or newer." % sys.version_info[:2])
with tempfile.TemporaryDirectory(prefix="convt-tvm-bundle-") as directory:
    with zipfile.ZipFile(sys.argv[0]) as archive:
        archive.extractall(directory)
    sys.path.insert(0, directory + "/site")
    lacking = [name for name in ("numpy", "torch", "tvm_ffi") if importlib.util.find_spec(name) is None]
    if lacking:
        sys.exit("error: this Python has no " + ", ".join(lacking) + "; install what is missing, or carry wheels of it "
                 "with `convt-tvm bundle --wheel FILE` (tvm_ffi is apache-tvm-ffi).")
    from convt_tvm.bundle_run import main
    code = main(directory, sys.argv[1:])
sys.exit(code)
'''


@dataclass(frozen=True, slots=True)
class Carried:
    """A candidate that was compiled beforehand: its code, and where it is in the bundle."""

    candidate: Candidate
    cycles: float
    digest: str
    directory: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "candidate": self.candidate.to_json(),
            "cycles": self.cycles,
            "digest": self.digest,
            "directory": self.directory,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(**{**values, "candidate": Candidate.from_json(values["candidate"])})


@dataclass(frozen=True, slots=True)
class Entry:
    """A workload in one precision: the kernel that would run, the default first among the candidates.

    ``default`` is the kernel that there is without tuning, where tuning found a faster one.
    """

    workload: str
    spec: ConvTranspose2dSpec
    target: Target
    directory: str
    candidates: tuple[Carried, ...] = ()
    default: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What rows know it by: spec and target."""
        return self.spec.name, self.target.name

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "workload": self.workload,
            "spec": self.spec.to_json(),
            "target": self.target.to_json(),
            "directory": self.directory,
            "candidates": [each.to_json() for each in self.candidates],
            "default": self.default,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        return cls(
            values["workload"],
            ConvTranspose2dSpec.from_json(values["spec"]),
            Target.from_json(values["target"]),
            values["directory"],
            tuple(Carried.from_json(each) for each in values["candidates"]),
            values["default"],
        )


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a bundle holds, the sources that it was made by, and a line on each kernel that could not be compiled."""

    entries: tuple[Entry, ...]
    source: str
    commit: str | None
    emulated: bool
    failed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = asdict(self)
        return values | {"entries": [entry.to_json() for entry in self.entries], "failed": list(self.failed)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote."""
        entries = tuple(Entry.from_json(each) for each in values["entries"])
        return cls(**{**values, "entries": entries, "failed": tuple(values["failed"])})


def variants(workload: Workload, target: Target, precisions: Sequence[str]) -> list[tuple[Workload, Target]]:
    """A workload in each of `PRECISIONS` named, with the target that it is compiled for; as it is if none is.

    Raises
    ------
    BundleError
        For a precision of another name.
    TargetError
        For tf32 on a processor.
    """
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise BundleError(f"there is no precision {', '.join(unknown)}; there are {', '.join(PRECISIONS)}.")
    found = []
    for precision in precisions or (workload.spec.dtype,):
        tf32 = precision == "tf32"
        dtype = "float32" if tf32 else precision
        name = workload.name if dtype == workload.spec.dtype else f"{workload.name} {dtype}"
        varied = replace(workload, name=name, spec=replace(workload.spec, dtype=dtype))
        found.append((varied, replace(target, features=(*target.features, "tf32")) if tf32 else target))
    return found


def make_bundle(
    path: Path,
    wanted: Sequence[tuple[Workload, Target]],
    *,
    candidates: int = 0,
    wheels: Sequence[Path] = (),
    limit_bytes: int | None = None,
    processes: int = 1,
    begin: Callable[[str], None] = lambda name: None,
) -> Bundle:
    """Compile kernels and write the bundle `path`, complete or not at all; without those that cannot be compiled.

    Parameters
    ----------
    wanted
        Workloads, each with what it is compiled for; every batch size fixed.
    candidates
        How many of each workload's schedules to compile for measuring there: the default and others unlike it.
    wheels
        Packages for the other machine's Python, to be carried.
    limit_bytes
        How large the bundle may be.
    processes
        How many compile at a time; 1 is this one.
    begin
        Called with the name of each entry when its kernel is compiled.

    Raises
    ------
    BuildError
        If no kernel at all can be compiled.
    BundleError
        If the bundle is larger than its limit; or if a wheel is none.
    """
    from convt_tvm.database import find_result
    from convt_tvm.space import varied_choices
    from convt_tvm.trials import build_job

    with TemporaryDirectory(prefix="convt-tvm-bundle-") as scratch:
        root, jobs = Path(scratch), list[dict[str, Any]]()
        homes = dict[str, tuple[Workload, Target]]()
        carried: dict[str, Choice] = {}
        for number, (workload, target) in enumerate(wanted):
            spec, home = workload.spec.sized, f"kernels/{number}"
            target = target.for_dtype(spec.dtype)
            homes[f"{home}/kernel"] = workload, target
            jobs.append(build_job(spec, target, None, root / home / "kernel"))
            result = find_result(spec, target).result
            if result is not None and result.tuned:
                jobs.append(build_job(spec, target, None, root / home / "default", tuned=False))
            for place, choice in enumerate(varied_choices(spec, target, candidates)):
                carried[f"{home}/candidate{place}"] = choice
                jobs.append(build_job(spec, target, choice.candidate, root / home / f"candidate{place}"))
        codes, failed = dict[str, str](), list[str]()
        for job, answer in _built(jobs, processes):
            directory = str(Path(job["directory"]).relative_to(root))
            workload, target = homes[f"{Path(directory).parent}/kernel"]
            if directory in homes:
                begin(f"{workload.name} {target.name}")
            if answer.status == "ok":
                codes[directory] = answer.value["digest"]
            else:
                failed.append(f"{workload.name}: {answer.error.removeprefix('BuildError: ')}")
        entries = [
            Entry(
                workload.name,
                workload.spec.sized,
                target,
                home,
                tuple(
                    Carried(choice.candidate, choice.cycles, codes[directory], directory)
                    for directory, choice in carried.items()
                    if Path(directory).parent == Path(home).parent and directory in codes
                ),
                _default(home, codes),
            )
            for home, (workload, target) in homes.items()
            if home in codes
        ]
        if not entries:
            raise BuildError(f"no kernel could be compiled; {failed[0] if failed else 'none was named'}")
        bundle = Bundle(tuple(entries), source_fingerprint(), current_commit(), shows_gpu(), tuple(failed))
        _carry_packages(root / "site", cuda=any(target.kind == "cuda" for _, target in wanted))
        for wheel in wheels:
            _unpack_wheel(wheel, root / "site")
        (root / "bundle.json").write_text(json.dumps(bundle.to_json()), encoding="utf-8")
        (root / "__main__.py").write_text(_MAIN, encoding="utf-8")
        unfinished = path.with_name(path.name + ".tmp")
        try:
            _pack(root, unfinished)
            size = unfinished.stat().st_size
            if limit_bytes is not None and size > limit_bytes:
                raise BundleError(
                    f"the bundle has {size / 2**20:.1f} MiB, more than {limit_bytes / 2**20:g}; name fewer workloads, "
                    "precisions or candidates."
                )
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return bundle


def _default(home: str, codes: Mapping[str, str]) -> str | None:
    """The directory of the kernel without tuning, if there is one and its code is not that of the kernel."""
    default = str(Path(home).with_name("default"))
    return default if codes.get(default) not in (None, codes[home]) else None


def _built(jobs: Sequence[dict[str, Any]], processes: int) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Builders' jobs with their answers, as they come in."""
    from convt_tvm.trials import BUILD_TIMEOUT_SECS, answer_build, builder_processes

    if processes > 1:
        workers = builder_processes(processes)
        try:
            for number, answer in work_through(workers, jobs, BUILD_TIMEOUT_SECS):
                yield jobs[number], answer
        finally:
            for worker in workers:
                worker.kill()
        return
    for job in jobs:
        try:
            yield job, Answer("ok", answer_build(job))
        except BuildError as error:
            yield job, Answer("failed", error=str(error))


def _carry_packages(site: Path, *, cuda: bool) -> None:
    package, here = site / "convt_tvm", Path(__file__).parent
    ignore = shutil.ignore_patterns(*_LEFT_OUT)
    shutil.copytree(here, package, ignore=ignore)
    # In a checkout these stand beside the package.
    if not (package / "schedules").is_dir():
        shutil.copytree(here.parent / "schedules", package / "schedules", ignore=ignore)
    (package / "lib").mkdir(exist_ok=True)
    runtime = find_runtime(here)
    for name in (RUNTIME_FILE, *([CUDA_RUNTIME_FILE] if cuda else [])):
        shutil.copy(runtime.with_name(name), package / "lib" / name)
    for distribution in _PACKAGES:
        for file in distribution_files(distribution) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), site / file)


def _unpack_wheel(wheel: Path, site: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    except (OSError, zipfile.BadZipFile) as error:
        raise BundleError(f"{wheel} is no wheel that can be carried: {error}.") from error


def _pack(root: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                # Python itself reads this one, and knows no LZMA.
                method = zipfile.ZIP_DEFLATED if file.name == "__main__.py" else zipfile.ZIP_LZMA
                archive.write(file, file.relative_to(root), compress_type=method)
