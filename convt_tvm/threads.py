"""How many threads kernels use: TVM's thread pools, one for each thread that calls kernels."""

import functools
import os
import threading
from pathlib import Path

from convt_tvm.errors import ArgumentError

__all__ = ["adopted", "configure", "get_num_threads", "required", "set_num_threads"]

_CPU = Path("/sys/devices/system/cpu")
_SPINS = "TVM_THREAD_POOL_SPIN_COUNT", "20000"
"""How often a worker without work looks for some before it sleeps: 10 ms of CPU time. TVM's default is 150 ms."""
_SHARE_ALL_CPUS = -3  # ThreadGroup::kSpecifyThreadShareAllCore in TVM's threading_backend.h


class _Adopted(threading.local):
    """What the calling thread's pool was told last."""

    setting = -1
    forked = False


class _Required:
    """What pools are to be told: `setting` counts the calls of `set_num_threads`."""

    setting = 0
    num_threads: int | None = None
    lock = threading.Lock()


adopted = _Adopted()
required = _Required()


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _default(cpus: list[int]) -> int:
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "")
        if value.isdecimal() and int(value) > 0:
            return min(int(value), len(cpus))
    cores = set()
    for cpu in cpus:
        try:
            cores.add((_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


@functools.cache
def _guard_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_mark_forked)


def _mark_forked() -> None:
    """The pool of the thread that forked came along without its threads: it must never again wait for them."""
    if adopted.setting >= 0:
        adopted.setting, adopted.forked = -1, True


def configure() -> None:
    """Tell the calling thread's pool the required number of threads, making the pool if there is none.

    TVM's own default is half as many threads as there are CPUs on x86, and it binds the calling thread and each worker
    to CPUs counted from 0, wherever they were allowed before. Here all of them may run where the calling thread may.
    A pool never grows, so it gets a thread for each CPU, and is told how many to use; the others sleep. Workers look
    out for work for as long as ``TVM_THREAD_POOL_SPIN_COUNT`` says, by default for less than in TVM. Needs
    libtvm_runtime.so to be open.
    """
    import tvm_ffi

    _guard_forks()
    os.environ.setdefault(*_SPINS)
    setting, cpus = required.setting, _usable_cpus()
    n = 1 if adopted.forked else required.num_threads or _default(cpus)
    tvm_ffi.get_global_func("runtime.config_threadpool")(_SHARE_ALL_CPUS, n, [str(cpu) for cpu in cpus])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    adopted.setting = setting


def set_num_threads(n: int) -> None:
    """Set how many threads, the calling one included, a kernel call may use, in the whole process from now on.

    Each thread that calls kernels has a pool of its own, TVM's way, which adopts the number at its next call; so two
    threads that call kernels at the same time keep up to ``2 * n`` CPUs busy. torch's threads are not affected, and
    results do not depend on it.

    Until this is called the number is that of the environment variable ``TVM_NUM_THREADS`` or ``OMP_NUM_THREADS``, as
    it is at a thread's first call, or else the number of physical cores that the thread may run on. Two pools cannot be
    told: that of a thread in which TVM was used before this package keeps the size TVM gave it (half the CPUs on x86)
    and can only be told to use less of it; that of the thread that forked is lost in the child, where it uses one
    thread (threads started there are not affected).

    Raises
    ------
    ArgumentError
        If ``n`` is below 1 or above the number of CPUs that the calling thread may run on.
    """
    limit = len(_usable_cpus())
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= limit:
        raise ArgumentError(f"n={n!r} must be an integer from 1 to {limit}, the CPUs that this thread may run on.")
    with required.lock:
        required.num_threads = n
        required.setting += 1


def get_num_threads() -> int:
    """How many threads a kernel call uses in the calling thread; see `set_num_threads`."""
    import tvm_ffi

    size = tvm_ffi.get_global_func("runtime.NumThreads", allow_missing=True)
    if size is None:
        return required.num_threads or _default(_usable_cpus())
    if adopted.setting != required.setting:
        configure()
    return int(size())
