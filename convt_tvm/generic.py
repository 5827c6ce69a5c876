"""TVM's own design space and search, as a baseline: MetaSchedule's post-order-apply with its rules for LLVM.

A plain phase form is declared, in one block of channels and without rounding anything up, and TVM finds schedules for
it on its own: evolutionary search over what its default rules and mutators make, ranked by its XGBoost model of 164
features for each store. What it proposes goes through the same builder, check, runner and log as our candidates do,
and `convt_tvm.lower` stores its outputs like theirs; nothing that it finds is ever used by `build`.
"""

import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Literal

import tvm
from tvm.s_tir import meta_schedule as ms

from convt_tvm.compiler import schedule_choice, trace_json
from convt_tvm.compute import declare_phases
from convt_tvm.layout import Layout
from convt_tvm.machine import machine
from convt_tvm.records import GENERIC, Candidate
from convt_tvm.search import Proposal
from convt_tvm.space import declared, find_choice
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["GenericSearch", "plain_layout"]

VECTOR_CHANNELS = 16
"""From so many channels on, vectors along them are filled."""
GENERATION = 64
"""Trials between two evolutions, as `tvm.s_tir.meta_schedule.tune_tir` has it by default."""
ENDLESS = 1 << 30
"""Trials that TVM's search may propose; a session ends by its own count."""
FAILED_SECS = 1e10
"""What stands for a failure in MetaSchedule's database and model."""
_INTRINSICS = "tvm.s_tir.tensor_intrin"


def plain_layout(spec: ConvTranspose2dSpec) -> Layout:
    """The phase form without tiles and partial sums: channels innermost where they fill a vector, else columns."""
    channels = spec.co // spec.groups
    lanes: Literal["co", "ow"] = "co" if channels >= VECTOR_CHANNELS else "ow"
    return Layout(lanes, co_block=channels, row_block=1, column_block=1, vector_lanes=1, row_chunk=1, taps="plain")


class GenericSearch:
    """Proposes what TVM's evolutionary search would measure next, none twice.

    Not repeatable: before TVM's model has seen 100 trials its guesses are numpy's unseeded random numbers.

    Parameters
    ----------
    threads
        Of the kernel: TVM's rules cut parallel loops for so many cores.
    earlier
        Candidates of earlier runs; those that `propose` is told times of are learned from.
    """

    def __init__(
        self,
        spec: ConvTranspose2dSpec,
        target: Target,
        *,
        threads: int,
        seed: int,
        earlier: Iterable[Candidate] = (),
    ) -> None:
        self.spec, self.target = spec, target
        own = declared(spec, target)
        self._layout = plain_layout(own)
        module = tvm.IRModule({"main": declare_phases(own, self._layout, target)})
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(module)
        self._tvm_target = tvm.target.Target({**target.to_tvm().export(), "num-cores": threads})
        self._context = _tune_context(module, self._tvm_target, seed)
        self._model = ms.cost_model.XGBModel(num_tuning_cores=machine().cores)
        self._context.pre_tuning(
            ENDLESS, GENERATION, self._context.generate_design_space(), self._database, self._model
        )
        self._arguments = ms.arg_info.ArgInfo.from_prim_func(module["main"])
        self._candidates = {candidate.key: candidate for candidate in earlier}
        self._learned: set[str] = set()
        self._waiting: list[Proposal] = []

    def propose(self, measured: Mapping[str, float | None], count: int) -> list[Proposal]:
        """Up to `count` candidates that are not in `measured`; none when TVM finds no other.

        Parameters
        ----------
        measured
            Microseconds by `Candidate.key`; None for a candidate that failed.
        """
        while not self._waiting:
            self._learn(measured)
            generated = self._context.generate_measure_candidates()
            if not generated:
                return []
            proposals = self._proposals(generated, measured)
            self._waiting = [proposal for proposal in proposals if proposal.candidate.key not in measured]
        given, self._waiting = self._waiting[:count], self._waiting[count:]
        return given

    def _proposals(self, generated: Any, measured: Mapping[str, float | None]) -> list[Proposal]:
        best_us = min((us for us in measured.values() if us is not None), default=None)
        scores: list[float] = [0.0] * len(generated)
        if best_us is not None and self._model.data_size >= self._model.num_warmup_samples:
            scores = self._model.predict(self._context, generated).tolist()
        found = {}
        for each, score in zip(generated, scores, strict=True):
            candidate = Candidate(GENERIC, self._layout.to_json(), tuple(trace_json(each.sch)))
            # A score is the best time of all divided by this one's.
            found[candidate.key] = Proposal(
                candidate, None, best_us / score if best_us is not None and score > 0 else None, "evolution"
            )
            self._candidates[candidate.key] = candidate
        return list(found.values())

    def _learn(self, measured: Mapping[str, float | None]) -> None:
        """Tell TVM's database, model and search what came of candidates since the last time."""
        fresh = [key for key in measured if key in self._candidates and key not in self._learned]
        if not fresh:
            return
        candidates, results = [], []
        for key in fresh:
            us = measured[key]
            sch = self._scheduled(self._candidates[key])
            candidates.append(ms.MeasureCandidate(sch, self._arguments))
            results.append(
                ms.runner.RunnerResult(None, "failed") if us is None else ms.runner.RunnerResult([us / 1e6], None)
            )
            run_secs = [FAILED_SECS if us is None else us / 1e6]
            self._database.commit_tuning_record(
                ms.database.TuningRecord(sch.trace, self._workload, run_secs, self._tvm_target, self._arguments)
            )
        self._model.update(self._context, candidates, results)
        self._context.notify_runner_results(candidates, results)
        self._learned |= set(fresh)

    def _scheduled(self, candidate: Candidate) -> Any:
        choice = find_choice(self.spec, self.target, candidate)
        assert choice is not None
        return schedule_choice(self.spec, self.target, choice)


def _tune_context(module: tvm.IRModule, target: Any, seed: int) -> ms.TuneContext:
    """What MetaSchedule searches in, without the tensor intrinsics of every target.

    Its constructor imports them, which takes 25 to 45 s, and the rules for LLVM use none.
    """
    stands_in = _INTRINSICS not in sys.modules
    if stands_in:
        sys.modules[_INTRINSICS] = ModuleType(_INTRINSICS)
    try:
        return ms.TuneContext(
            module,
            target=target,
            space_generator=ms.space_generator.PostOrderApply(sch_rules="llvm", postprocs="llvm", mutator_probs="llvm"),
            search_strategy=ms.search_strategy.EvolutionarySearch(),
            num_threads=machine().cores,
            # TVM takes -1 for a random one.
            rand_state=seed % (2**31 - 2) + 1,
        )
    finally:
        if stands_in:
            del sys.modules[_INTRINSICS]
