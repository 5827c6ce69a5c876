"""Whether a kernel computes the right thing: built, saved, loaded and compared with torch and with exact arithmetic."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, TypeAlias

import torch

from convt_tvm import runtime
from convt_tvm.errors import ConvTError
from convt_tvm.measure import interleaved, medians
from convt_tvm.place import Place
from convt_tvm.reference import TF32_UNIT, empty_output, error_bound, integer_inputs, normal_inputs, reference
from convt_tvm.runtime import Kernel
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target
from convt_tvm.workloads import Workload

__all__ = [
    "CheckRow",
    "Comparison",
    "Operator",
    "bits",
    "check",
    "compare",
    "compare_kernel",
    "mismatch",
    "operand_unit",
    "thread_count",
    "torch_eager",
]

Operator: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Input, weight and bias (None where the spec has none) to output, all in the spec's dtype."""

_ROUNDS = 7
_BATCHES = (0, 1, 3)
_SAME_SIZE_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    exact
        Whether integer inputs gave the bits of the float64 reference.
    max_error
        Largest distance from the float64 reference on normally distributed inputs; infinite for NaN outputs.
    max_error_torch
        The same distance for torch eager in the spec's dtype; 0 for float64, where torch eager is the reference.
    error_over_bound
        Largest ratio of an output's distance to its own `reference.error_bound`; infinite where that bound is 0 and
        the output is not exact.
    reason
        What is wrong, in words; empty if nothing is.
    """

    exact: bool
    max_error: float
    max_error_torch: float
    error_over_bound: float
    reason: str


@dataclass(frozen=True, slots=True)
class CheckRow:
    """What `check` found about one workload. What an exception kept it from finding is None.

    Attributes
    ----------
    workload, spec
        The workload's name and its spec's canonical name.
    output_shape
        NCHW; for a single image where any batch size goes, which is checked with several and timed with one.
    target, threads, seed
        How it was compiled, run and fed.
    schedule
        Name of the schedule that ran.
    build_secs
        From the spec to a kernel, without the import of the compiler.
    exact, max_error, max_error_torch, error_over_bound
        As in `Comparison`.
    latency_us, torch_latency_us
        Median time of a call, with a packed weight and ``out=``, and of torch eager's.
    spread
        How far the rounds were apart: the slowest over the fastest, of whichever of the two varied more.
    verdict
        ``bad`` if the answers are wrong or an exception was raised; being slower than torch is not bad.
    reason
        Why it is bad; empty if it is good.
    """

    workload: str
    spec: str
    output_shape: tuple[int, ...]
    target: str
    threads: int
    seed: int
    schedule: str | None = None
    build_secs: float | None = None
    exact: bool | None = None
    max_error: float | None = None
    max_error_torch: float | None = None
    error_over_bound: float | None = None
    latency_us: float | None = None
    torch_latency_us: float | None = None
    spread: float | None = None
    verdict: Literal["good", "bad"] = "bad"
    reason: str = ""

    @property
    def speedup(self) -> float | None:
        """Torch eager's time over the kernel's; None if it was not measured."""
        if self.latency_us is None or self.torch_latency_us is None:
            return None
        return self.torch_latency_us / self.latency_us

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; infinities and NaN, which JSON lacks, become None."""
        values = asdict(self) | {"output_shape": list(self.output_shape)}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def torch_eager(spec: ConvTranspose2dSpec) -> Operator:
    """PyTorch's own operator with the parameters of the spec."""

    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, spec.stride, spec.padding, spec.output_padding, spec.groups, spec.dilation
        )

    return run


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of its element's size: two NaN can be equal, 0.0 and -0.0 are not."""
    return tensor.contiguous().view(_SAME_SIZE_INTEGER[tensor.element_size()])


def mismatch(spec: ConvTranspose2dSpec, output: torch.Tensor) -> str:
    """What is wrong with the output apart from its values; empty if nothing is."""
    if tuple(output.shape) != spec.output_shape:
        return f"the output has shape {tuple(output.shape)} instead of {spec.output_shape}"
    dtype = str(output.dtype).removeprefix("torch.")
    return "" if dtype == spec.dtype else f"the output has dtype {dtype} instead of {spec.dtype}"


def _describe_worst(wrong: torch.Tensor, distance: torch.Tensor, output: torch.Tensor, exact: torch.Tensor) -> str:
    """How many outputs are wrong, and where and what the farthest of them is."""
    flat = torch.where(wrong, distance.nan_to_num(nan=math.inf, posinf=math.inf), -1.0).argmax()
    index = tuple(int(position) for position in torch.unravel_index(flat, wrong.shape))
    return (
        f"{int(wrong.sum())} of {wrong.numel()} outputs are wrong; at {index} it is "
        f"{output[index].item():.9g} instead of {exact[index].item():.9g}"
    )


def compare(spec: ConvTranspose2dSpec, *operators: Operator, seed: int = 0, operand_unit: float = 0.0) -> Comparison:
    """How operators' answers compare with the float64 reference, in two stages; the worst of them counts.

    First on integers, where nothing rounds and every bit has to agree: this finds wrong indices, which a tolerance
    may hide. Then on normally distributed numbers, where each output has to lie within its own error bound: this finds
    sums kept in too narrow a type. Shape and dtype of the output are part of both.

    Parameters
    ----------
    spec
        What the operators are meant to compute.
    operators
        Each is called once in each stage, with contiguous torch tensors on the CPU.
    seed
        Of the inputs; a seed always gives the same ones.
    operand_unit
        As for `convt_tvm.reference.expect`.

    Raises
    ------
    SpecError
        if no integer inputs are exact for the spec.
    Exception
        whatever an operator raises.
    """
    inputs = integer_inputs(spec, seed)
    exact = reference(spec, *inputs)
    expected = bits(exact.to(inputs[0].dtype))
    problems = []
    for operator in operators:
        output = operator(*inputs)
        problem = mismatch(spec, output)
        if not problem and (wrong := bits(output) != expected).any():
            problem = _describe_worst(wrong, (output.double() - exact).abs(), output, exact)
        if problem:
            problems.append(f"integer inputs: {problem}")
    is_exact = not problems

    inputs = normal_inputs(spec, seed)
    exact, bound = reference(spec, *inputs), error_bound(spec, *inputs, operand_unit=operand_unit)
    max_error = error_over_bound = 0.0
    for operator in operators:
        output = operator(*inputs)
        problem = mismatch(spec, output)
        if problem:
            max_error = error_over_bound = math.nan
        else:
            error = (output.double() - exact).abs()
            ratio = torch.where(error == 0, 0.0, error / bound)
            max_error = max(max_error, _largest(error))
            error_over_bound = max(error_over_bound, _largest(ratio))
            # A NaN is not within any bound, although no comparison with it holds.
            outside = ~(error <= bound)
            if outside.any():
                problem = f"{_describe_worst(outside, ratio, output, exact)}, beyond the error bound of {spec.dtype}"
        if problem:
            problems.append(f"normally distributed inputs: {problem}")
    error_torch = (torch_eager(spec)(*inputs).double() - exact).abs()
    return Comparison(is_exact, max_error, _largest(error_torch), error_over_bound, problems[0] if problems else "")


def _largest(values: torch.Tensor) -> float:
    """The largest value, infinity if there is a NaN, 0 if there is nothing."""
    return float(values.nan_to_num(nan=math.inf, posinf=math.inf).max()) if values.numel() else 0.0


def _packed(kernel: Kernel, spec: ConvTranspose2dSpec) -> Operator:
    """The kernel's other way to be called: a packed weight, and an output that holds NaN before."""

    def run(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = torch.full(spec.output_shape, math.nan, dtype=input.dtype, device=input.device)
        answer: torch.Tensor = kernel(input, kernel.pack(weight), bias, out=out)
        return answer

    return run


def operand_unit(spec: ConvTranspose2dSpec, target: Target) -> float:
    """By how much of its value a kernel for `target` may round a factor before it multiplies: tf32 is allowed to."""
    return TF32_UNIT if spec.dtype == "float32" and target.allows_tf32 else 0.0


def compare_kernel(kernel: Kernel, seed: int = 0) -> Comparison:
    """Compare a kernel where it runs, called both ways; one for any batch size with several: the worst counts."""
    there = Place.of(kernel.target).on_cpu_tensors
    spec = kernel.spec
    sizes = [spec] if spec.n is not None else [spec.with_batch(n) for n in _BATCHES]
    unit = operand_unit(spec, kernel.target)
    found = [
        compare(sized, there(kernel), there(_packed(kernel, sized)), seed=seed, operand_unit=unit) for sized in sizes
    ]
    return max(found, key=lambda comparison: (bool(comparison.reason), comparison.error_over_bound))


def _time(kernel: Kernel, seed: int) -> dict[str, float]:
    """The timing fields of a `CheckRow`."""
    spec, place = kernel.spec.sized, Place.of(kernel.target)
    input, weight, bias = place.put(normal_inputs(spec, seed))
    packed = kernel.pack(weight)
    out = empty_output(spec, input)
    eager = torch_eager(spec)
    functions = {
        "latency_us": lambda: kernel(input, packed, bias, out=out),
        "torch_latency_us": lambda: eager(input, weight, bias),
    }
    with torch.inference_mode():
        settle_secs = place.settle_secs(0.005)
        samples = interleaved(functions, rounds=_ROUNDS, settle_secs=settle_secs, time_calls=place.time_calls())
    return {**medians(samples), "spread": max(max(values) / min(values) for values in samples.values())}


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Both thread pools, torch's and TVM's, at one size for the duration."""
    before, before_torch = runtime.get_num_threads(), torch.get_num_threads()
    runtime.set_num_threads(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before_torch)
        runtime.set_num_threads(before)


def check(
    workload: Workload, target: str | Target = "llvm", *, seed: int = 0, threads: int | None = None, quick: bool = False
) -> CheckRow:
    """Build the workload's kernel, save it, load it from disk, compare it with torch and float64, and time it.

    Parameters
    ----------
    workload
        What to check.
    target
        What to compile for; it has to run on this machine.
    seed
        Of the inputs.
    threads
        Size of torch's and TVM's thread pools while this runs; torch's present one by default.
    quick
        Skip the timing.

    Returns
    -------
    CheckRow
        Also if something failed: the exception's text is its `reason` then.

    Raises
    ------
    TargetError
        if the target is a string that names none.
    """
    threads = torch.get_num_threads() if threads is None else threads
    spec = workload.spec
    target = Target.parse(target).for_dtype(spec.dtype)
    found: dict[str, Any] = {}
    try:
        # Only here: comparing needs no compiler, and its import would count as build time.
        from convt_tvm.compiler import build

        with TemporaryDirectory(prefix="convt-tvm-check-") as directory, thread_count(threads):
            start = perf_counter()
            built = build(spec, target)
            found["build_secs"] = perf_counter() - start
            found["schedule"] = built.manifest.schedule
            built.save(Path(directory) / "kernel")
            kernel = runtime.load(Path(directory) / "kernel")
            comparison = compare_kernel(kernel, seed)
            found |= asdict(comparison)
            if not (quick or comparison.reason):
                found |= _time(kernel, seed)
            found["verdict"] = "bad" if comparison.reason else "good"
    except Exception as error:  # recorded as this row's status, so that the other workloads are still checked
        text = " ".join(str(error).split())
        found["reason"] = text if isinstance(error, ConvTError) else f"{type(error).__name__}: {text}"
    return CheckRow(workload.name, spec.name, spec.sized.output_shape, target.name, threads, seed, **found)
