"""Tuning results in the form of TVM's MetaSchedule, for its own tools."""

from convt_tvm.backends import get_backend
from convt_tvm.records import Result
from convt_tvm.space import declared, find_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.store import DATABASE_FILES, Store
from convt_tvm.target import Target

__all__ = ["commit"]


def commit(store: Store, spec: ConvTranspose2dSpec, target: Target, result: Result) -> None:
    """Add the winner of a session to the `JSONDatabase` of its log, loadable by TVM alone.

    The workload is the phase form declared in the winner's layout, the record its trace and re-measured times. A
    layout changes the declaration, so that each has a workload of its own. The database says nothing about machine and
    threads; `convt_tvm.database` reads the results beside it instead.
    """
    import tvm
    from tvm.s_tir import Schedule
    from tvm.s_tir import meta_schedule as ms

    choice = find_choice(spec, target, result.candidate)
    if choice is None:
        return
    declare = get_backend(choice.layout).declare_phases
    module = tvm.IRModule({"main": declare(declared(spec, target), choice.layout, target)})
    sch = Schedule(module)
    choice.space.space(sch)
    paths = [str(store.directory / name) for name in DATABASE_FILES]
    database = ms.database.JSONDatabase(*paths)
    run_secs = [
        sample / 1e6
        for finalist in result.finalists
        for sample in finalist.samples_us
        if finalist.candidate == result.candidate
    ]
    database.commit_tuning_record(
        ms.database.TuningRecord(
            sch.trace,
            database.commit_workload(module),
            run_secs,
            target.to_tvm(),
            ms.arg_info.ArgInfo.from_prim_func(module["main"]),
        )
    )
