"""NVIDIA GPUs: which architectures there are, what they are limited to, and which this machine has.

Neither TVM nor torch is imported; the driver is asked directly, where there is one.
"""

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass

__all__ = [
    "ARCHITECTURES",
    "DEFAULT_ARCHITECTURES",
    "EMULATED",
    "OLDEST_CUDA_DRIVER",
    "Driver",
    "Gpu",
    "Limits",
    "capability",
    "describe_gpu",
    "find_driver",
    "newest_architecture",
]

OLDEST_CUDA_DRIVER = (13, 0)
"""The CUDA version that the driver has to support: libcudart.so.13, which TVM's CUDA runtime library needs."""
EMULATED = "emulated"
"""What the GPU of `convt_tvm.emulator` is called; its times say nothing."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Limits:
    """What an architecture has, by its largest common GPU.

    Attributes
    ----------
    processors
        Streaming multiprocessors.
    lanes
        float32 multiply-adds that one of them does in a cycle.
    tensor_lanes
        Multiply-adds of 16-bit values that its tensor cores do in a cycle, by the instructions of sm_80; tf32 has half
        of it. (sm_90 and sm_100 have faster instructions, which are not used.)
    threads, blocks, registers, shared_bytes
        What it holds at a time.
    """

    processors: int
    lanes: int
    tensor_lanes: int
    threads: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


_KIB = 1 << 10
ARCHITECTURES: dict[str, Limits] = {
    "sm_75": Limits(processors=72, lanes=64, tensor_lanes=512, threads=1024, blocks=16, shared_bytes=64 * _KIB),
    "sm_80": Limits(processors=108, lanes=64, tensor_lanes=1024, threads=2048, blocks=32, shared_bytes=164 * _KIB),
    "sm_86": Limits(processors=84, lanes=128, tensor_lanes=512, threads=1536, blocks=16, shared_bytes=100 * _KIB),
    "sm_87": Limits(processors=16, lanes=128, tensor_lanes=1024, threads=1536, blocks=16, shared_bytes=164 * _KIB),
    "sm_89": Limits(processors=142, lanes=128, tensor_lanes=512, threads=1536, blocks=24, shared_bytes=100 * _KIB),
    "sm_90": Limits(processors=132, lanes=128, tensor_lanes=1024, threads=2048, blocks=32, shared_bytes=228 * _KIB),
    "sm_100": Limits(processors=148, lanes=128, tensor_lanes=1024, threads=2048, blocks=32, shared_bytes=228 * _KIB),
    "sm_120": Limits(processors=170, lanes=128, tensor_lanes=512, threads=1536, blocks=24, shared_bytes=100 * _KIB),
}
"""By compute capability, ascending: the CUDA C++ Programming Guide's tables of compute capabilities."""

DEFAULT_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
"""What code is compiled for where no GPU says otherwise; newer ones compile the PTX that comes with it."""


def capability(arch: str) -> tuple[int, int]:
    """The compute capability of an architecture: (8, 6) of ``sm_86``."""
    number = int(arch.removeprefix("sm_"))
    return number // 10, number % 10


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver describes it."""

    name: str
    capability: tuple[int, int]

    def runs(self, archs: tuple[str, ...]) -> bool:
        """Whether it runs code compiled for these architectures, with PTX of the last of them.

        Machine code runs on the same major version from its minor version on, PTX on everything newer.
        """
        machine_code = any(
            capability(arch)[0] == self.capability[0] and capability(arch) <= self.capability for arch in archs
        )
        return machine_code or capability(archs[-1]) <= self.capability


def newest_architecture(gpu: Gpu) -> str | None:
    """The newest of `ARCHITECTURES` whose code a GPU runs; None if it is older than all of them."""
    return max((arch for arch in ARCHITECTURES if gpu.runs((arch,))), key=capability, default=None)


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: the newest CUDA version it supports, and the GPUs it sees."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


@functools.cache
def find_driver() -> Driver | None:
    """The driver of this machine, asked once a process; None where there is none that works."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    # That of `convt_tvm.emulator` fails, unless `convt_tvm.emulated_torch` has it show a GPU.
    if library.cuInit(0) != 0:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    library.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(device), ordinal)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        library.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        gpus.append(Gpu(name.value.decode(errors="replace"), (major.value, minor.value)))
    return Driver((version.value // 1000, version.value % 1000 // 10), tuple(gpus))


_FACTS = {
    "driver": "driver_version",
    "memory": "memory.total",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def describe_gpu() -> dict[str, str]:
    """Name and architecture of the first GPU, and what nvidia-smi says now of its driver and clocks; empty without."""
    driver = find_driver()
    if driver is None or not driver.gpus:
        return {}
    gpu = driver.gpus[0]
    found = {"name": gpu.name, "arch": "sm_{}{}".format(*gpu.capability), "cuda": "{}.{}".format(*driver.cuda)}
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--id=0", f"--query-gpu={','.join(_FACTS.values())}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        values = done.stdout.strip().split(", ")
        if done.returncode == 0 and len(values) == len(_FACTS):
            found |= dict(zip(_FACTS, values, strict=True))
    return found
