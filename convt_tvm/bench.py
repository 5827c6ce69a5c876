"""Our kernels against other implementations: in one process, by turns, with answers checked before any time counts."""

import importlib.util
import math
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from convt_tvm import runtime
from convt_tvm.check import operand_unit, thread_count
from convt_tvm.machine import machine, package_versions
from convt_tvm.measure import interleaved, noise_floor
from convt_tvm.peers import DISTRIBUTIONS, Contender, Refusal, prepare
from convt_tvm.place import Place
from convt_tvm.processor import TILE_FEATURES
from convt_tvm.reference import Inputs, empty_output, error_bound, in_format, normal_inputs, reference
from convt_tvm.roofline import Limits, Loops, bound, measure, processor_loops
from convt_tvm.roofline_torch import multiply_matrices, torch_loops
from convt_tvm.rows import COPY, OURS, OURS_DEFAULT, OURS_LAST, OURS_ONE_THREAD, TORCH_LAST, Row
from convt_tvm.runtime import Kernel
from convt_tvm.spec import CHANNELS_LAST, ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

__all__ = ["Tolerance", "bench", "current_commit", "measure_target_limits", "target_loops"]

PEER_SLACK = 4
"""Peers may be this many times farther from float64 than a plain sum can be: their algorithms are not known here."""

_NOT_ROWS = "--", ":/", *(f":(top,exclude)tuning_logs/{kind}" for kind in ("bench", "numerics"))
"""Arguments for git: all of a checkout but stored rows."""

SETTLE_SECS = {False: 0.005, True: 0.15}
"""How long each contender runs untimed before each sample, with one thread and with several. The workers of another
library's pool spin after its last call and would take CPUs from the next: torch's for less than 1 ms, ONNX Runtime's
for some 50 ms of CPU time each."""


class Tolerance:
    """How far answers may be from float64, worked out once for some inputs."""

    def __init__(self, spec: ConvTranspose2dSpec, inputs: Inputs, *, unit: float = 0.0) -> None:
        """Compute the reference and the bounds; factors may be rounded by `unit` of their value."""
        input, weight, bias = inputs
        self.spec = spec
        self.exact = reference(spec, *inputs)
        self.bound = error_bound(spec, *inputs, operand_unit=unit)
        self.peers = PEER_SLACK * self.bound
        if spec.dtype != spec.accumulator_dtype:
            # Libraries may add up the taps in the narrow type, torch does for float16.
            magnitude = reference(spec, input.abs(), weight.abs(), None if bias is None else bias.abs())
            rounding = torch.finfo(getattr(torch, spec.dtype)).eps / 2
            self.peers = self.peers + math.prod(spec.kernel_size) * rounding * magnitude

    def judge(self, output: torch.Tensor, *, peer: bool) -> tuple[float | None, str]:
        """Largest ratio of an error to its bound, and what is wrong, empty if nothing is."""
        if tuple(output.shape) != self.spec.output_shape:
            return None, f"the output has shape {tuple(output.shape)} instead of {self.spec.output_shape}"
        error = (output.double() - self.exact).abs()
        ratio = torch.where(error == 0, 0.0, error / self.bound).nan_to_num(nan=math.inf, posinf=math.inf)
        worst = float(ratio.max()) if ratio.numel() else 0.0
        # A NaN is not within any bound, although no comparison with it holds.
        outside = ~(error <= (self.peers if peer else self.bound))
        if not outside.any():
            return worst, ""
        return worst, (
            f"{int(outside.sum())} of {outside.numel()} outputs are farther from float64 than the error bound of "
            f"{self.spec.dtype} allows, the worst {worst:.3g} times as far"
        )


def current_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` if files were changed; None without one.

    Rows that were measured there do not count: the next are of the same code.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        # An installed package may lie inside some other project's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no", *_NOT_ROWS) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _library_flags(target: Target) -> Iterator[None]:
    """On a GPU: cuDNN tries its algorithms and takes the fastest, and multiplies float32 as the target does."""
    if target.kind != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    tf32 = target.allows_tf32
    before = torch.backends.cuda.matmul.allow_tf32
    with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def target_loops(spec: ConvTranspose2dSpec, target: Target, threads: int) -> Loops:
    """What finds the limits of the machine that runs `target` for such a spec, on so many threads of a processor.

    Thread pools have that size while this is called and the loops run.
    """
    if target.kind == "cuda":
        return torch_loops(spec, "cuda", spec.dtype, threads)
    in_tiles = not TILE_FEATURES.isdisjoint(target.for_dtype(spec.dtype).features)
    if importlib.util.find_spec("tvm") is None:
        return torch_loops(spec, "cpu", spec.dtype if in_tiles else spec.accumulator_dtype, threads)
    if in_tiles:
        # What torch makes of the tile unit: a plain loop of its products would need it configured.
        products = multiply_matrices("cpu", spec.dtype)
        loops = processor_loops(spec, spec.accumulator_dtype, threads)
        return replace(loops, dtype=spec.dtype, multiply_adds=products)
    in_pairs = spec.dtype == "bfloat16" and target.multiplies_pairs
    return processor_loops(spec, spec.dtype if in_pairs else spec.accumulator_dtype, threads)


def measure_target_limits(spec: ConvTranspose2dSpec, target: Target, threads: int) -> Limits:
    """The limits by `target_loops`, with nothing else to take turns with."""
    place, count = Place.of(target), _thread_count(target, threads)
    with thread_count(count), _library_flags(target):
        loops = target_loops(spec, target, count)
        return measure(loops, settle_secs=place.settle_secs(SETTLE_SECS[False]), time_calls=place.time_calls())


def _thread_count(target: Target, threads: int | None) -> int:
    return 1 if target.kind == "cuda" else threads or torch.get_num_threads()


def _contender(kernel: Kernel, inputs: Inputs) -> Contender:
    """The kernel at its fastest: a packed weight, and an output of its own, NaN before."""
    input, weight, bias = inputs
    packed = kernel.pack(weight)
    out = empty_output(kernel.spec.sized, input)

    def run() -> torch.Tensor:
        kernel(input, packed, bias, out=out)
        return out

    return run


def _load_twice(
    spec: ConvTranspose2dSpec, target: Target, artifact: Path | None, directory: Path, *, tuned: bool
) -> tuple[Kernel, Kernel]:
    """One artifact, built if there is none, loaded from two places: two libraries in memory."""
    if artifact is None:
        from convt_tvm.compiler import build_artifact

        artifact = directory / "first"
        build_artifact(spec, target, artifact, tuned=tuned)
    first = runtime.load(artifact)
    first.save(directory / "second")
    return first, runtime.load(directory / "second")


def bench(
    workload: Workload,
    target: str | Target = "llvm",
    *,
    peers: Sequence[str],
    threads: int | None = None,
    place: Place | None = None,
    rounds: int = 15,
    seed: int = 0,
    settle_secs: float | None = None,
    min_sample_secs: float = 0.005,
    artifact: Path | None = None,
    default: Path | None = None,
) -> list[Row]:
    """Time the kernel of a workload, a second copy of it, and peers; on one image where any batch size goes.

    Where tuning found that kernel, the default is timed too; with several threads what there is for one, on one; and
    beside torch in channels_last a kernel of ours for that memory format, if it can be built here.

    Weights are constant: packed, frozen or laid out beforehand. Every contender's answer is compared with float64, and
    those that are wrong are not timed. The others take turns, in reversed order each round, each running untimed for a
    while before its sample (`SETTLE_SECS`). So do the loops of `target_loops`, which give the machine's limits: medians
    like the times that they are compared with.

    Parameters
    ----------
    target
        What our kernel is compiled for.
    peers
        Names of `convt_tvm.peers.PEERS`.
    threads
        Size of every thread pool on a processor; by default torch's number.
    place
        Where kernels for `target` run, by default with warm caches. On a GPU all contenders' tensors are there, and
        its own clock times them.
    rounds
        Samples of each contender.
    seed
        Of the inputs, which are normally distributed.
    settle_secs, min_sample_secs
        As in `convt_tvm.measure.interleaved`.
    artifact
        Our kernel, where it was compiled beforehand.
    default
        The kernel that there is without tuning, likewise.

    Returns
    -------
    list of Row
        Ours, its copy, perhaps ours without tuning, with one thread and in channels_last, and the peers in the order
        given. What went wrong is in a row's ``status`` and ``reason``.

    Raises
    ------
    TargetError
        if the target is a string that names none.
    KeyError
        for a peer of another name.
    """
    spec = workload.spec.sized
    resolved = Target.parse(target).for_dtype(spec.dtype)
    threads = _thread_count(resolved, threads)
    place = place or Place.of(resolved)
    inputs = normal_inputs(spec, seed)
    tolerance = Tolerance(spec, inputs, unit=operand_unit(spec, resolved))
    inputs = place.put(inputs)
    details: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender] = {}

    def enter(name: str, contender: Contender | Refusal, *, peer: bool) -> None:
        if isinstance(contender, Refusal):
            details[name] = {"status": contender.status, "reason": contender.reason}
            return
        try:
            worst, problem = tolerance.judge(contender().cpu(), peer=peer)
        except Exception as error:  # recorded as this contender's status, so that the others are still timed
            details[name] = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            return
        details[name] = {"status": "wrong" if problem else "ok", "reason": problem, "error_over_bound": worst}
        if not problem:
            contenders[name] = contender

    def enter_ours(
        names: Sequence[str], spec: ConvTranspose2dSpec, artifact: Path | None = None, *, tuned: bool = True
    ) -> bool:
        """Whether the kernel is one that tuning found faster than the default."""
        given = in_format(spec, inputs[0]), *inputs[1:]
        try:
            kernels = _load_twice(spec, resolved, artifact, Path(directory) / names[0], tuned=tuned)
            of_kernel = {"schedule": kernels[0].manifest.schedule, "layout": dict(kernels[0].manifest.layout)}
            for name, kernel in zip(names, kernels, strict=False):
                enter(name, _contender(kernel, given), peer=False)
                details[name] |= of_kernel
        except Exception as error:  # recorded as our status: a failure to build must not hide the other workloads
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            details.update({name: {"status": "failed", "reason": reason} for name in names})
            return False
        return bool(kernels[0].manifest.tuning.get("result", {}).get("tuned", False))

    def around(name: str) -> AbstractContextManager[None]:
        return thread_count(1) if name == OURS_ONE_THREAD else nullcontext()

    samples: dict[str, list[float]] = {}
    limits: Limits | None = None
    with (
        TemporaryDirectory(prefix="convt-tvm-bench-") as directory,
        thread_count(threads),
        torch.inference_mode(),
        _library_flags(resolved),
    ):
        tuned = enter_ours((OURS, COPY), workload.spec, artifact)
        # Without us there is nothing to compare.
        if OURS in contenders:
            if tuned and (artifact is None or default is not None):
                enter_ours((OURS_DEFAULT,), workload.spec, default, tuned=False)
            if threads > 1 and artifact is None:
                with around(OURS_ONE_THREAD):
                    enter_ours((OURS_ONE_THREAD,), workload.spec)
            if TORCH_LAST in peers and artifact is None and resolved.keeps_channels_last and not spec.is_channels_last:
                enter_ours((OURS_LAST,), replace(workload.spec, memory_format=CHANNELS_LAST))
            for name in peers:
                enter(name, prepare(name, spec, inputs, threads), peer=True)
            if settle_secs is None:
                settle_secs = place.settle_secs(SETTLE_SECS[threads > 1])
            try:
                loops = target_loops(spec, resolved, threads)
                samples = interleaved(
                    contenders | loops.functions,
                    rounds=rounds,
                    settle_secs=settle_secs,
                    min_sample_secs=min_sample_secs,
                    time_calls=place.time_calls(),
                    around=around,
                )
                limits = loops.limits(samples)
            except Exception as error:  # recorded in every row: an unfinished round compares nothing
                reason = f"while being timed: {type(error).__name__}: {' '.join(str(error).split())}"
                details |= {name: details[name] | {"status": "failed", "reason": reason} for name in contenders}
        contenders.clear()
    return _rows(workload, resolved, place, threads, limits, rounds, details, samples)


def _rows(
    workload: Workload,
    target: Target,
    place: Place,
    threads: int,
    limits: Limits | None,
    rounds: int,
    details: dict[str, dict[str, Any]],
    samples: dict[str, list[float]],
) -> list[Row]:
    here = machine()
    described = {name: value for name, value in here.to_json().items() if name != "versions"}
    limit = None if limits is None else bound(workload.spec.sized, limits)
    common = Row(
        workload=workload.name,
        spec=workload.spec.name,
        implementation="",
        status="failed",
        threads=threads,
        rounds=rounds,
        target=target.name,
        date=datetime.now(UTC).isoformat(timespec="milliseconds"),
        machine={**described, **place.describe()},
        cold=place.cold,
        versions={**here.versions, **package_versions(DISTRIBUTIONS)},
        commit=current_commit(),
        noise_floor=noise_floor(samples[OURS], samples[COPY]) if {OURS, COPY} <= samples.keys() else None,
    )
    if limit is not None:
        common = replace(
            common,
            bound_us=limit.secs * 1e6,
            bound_by=limit.by,
            peak_gflops=limit.flops_per_sec / 1e9,
            bandwidth_gbs=limit.bytes_per_sec / 1e9,
        )
    rows = []
    for name, found in details.items():
        times: dict[str, Any] = {}
        if name in samples and limit is not None:
            middle = median(samples[name])
            times = {
                "median_us": middle,
                "mad_us": median(abs(sample - middle) for sample in samples[name]),
                "samples_us": tuple(float(f"{sample:.4g}") for sample in samples[name]),
                "gflops": limit.flops / middle / 1e3,
                "share_of_peak": limit.compute_secs * 1e6 / middle,
                "share_of_bound": limit.secs * 1e6 / middle,
            }
        rows.append(replace(common, implementation=name, **found, **times))
    return rows
