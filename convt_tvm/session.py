"""One autotuning session: proposes, builds, checks, times, writes down, and at last measures the best few again.

Everything is written down as it happens, so a session that is killed goes on where it was: what was measured is not
measured again, and the search is fitted to all of it.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median
from typing import Protocol

from convt_tvm.errors import TuningError
from convt_tvm.measure import noise_floor
from convt_tvm.records import EARLY, GENERIC, Candidate, Finalist, Result, SessionInfo, Trial, mad
from convt_tvm.search import Proposal
from convt_tvm.store import Store
from convt_tvm.trials import Builder, Built, Measured, Runner

__all__ = ["Outcome", "Progress", "Proposer", "run_session"]

BATCH = 16
FINALISTS = 4
"""Besides the default, and the fastest of the first `EARLY` trials: the log then tells what going on has gained."""
ROUNDS = 15


class Proposer(Protocol):
    """What a session needs for choosing candidates."""

    def propose(self, measured: Mapping[str, float | None], count: int) -> Sequence[Proposal]:
        """Up to `count` candidates beyond those `measured`, microseconds by key; none to end the session."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a session is, after each trial.

    Attributes
    ----------
    trials, wanted
        Done, those of earlier runs included, and asked for.
    best_us, default_us
        Smallest samples so far; None before there are any.
    failures
        How many trials failed, by status.
    secs, secs_left
        Since this run began, and to go, as far as trials and budget let one tell.
    """

    info: SessionInfo
    trials: int
    wanted: int
    best_us: float | None
    default_us: float | None
    failures: Mapping[str, int]
    secs: float
    secs_left: float | None
    step: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended.

    Attributes
    ----------
    result
        None if nothing could be timed.
    measured
        Trials of this run alone.
    stopped
        ``trials`` or ``candidates`` (all were measured), ``budget`` or ``interrupted``.
    notes
        What was repaired, and which records do not apply any more.
    """

    info: SessionInfo
    result: Result | None
    trials: int
    measured: int
    stopped: str
    failures: Mapping[str, int]
    secs: float
    notes: tuple[str, ...]


def run_session(
    info: SessionInfo,
    store: Store,
    search: Proposer,
    builder: Builder,
    runner: Runner,
    *,
    observe: Callable[[Progress], None] = lambda progress: None,
    still_applies: Callable[[Trial], bool] = lambda trial: False,
) -> Outcome:
    """Run a session to its end: its trials, its candidates, its budget, or an interrupt.

    The first interrupt ends the trials, and the best so far are measured again; a second one ends that too.

    Parameters
    ----------
    info
        What was asked for; written to the store.
    still_applies
        Whether a trial that was made by other sources than ``info.source`` still stands for the same code.
    """
    return _Session(info, store, search, builder, runner, observe, still_applies).run()


class _Session:
    def __init__(
        self,
        info: SessionInfo,
        store: Store,
        search: Proposer,
        builder: Builder,
        runner: Runner,
        observe: Callable[[Progress], None],
        still_applies: Callable[[Trial], bool],
    ) -> None:
        self.info = info
        self.store = store
        self.search = search
        self.builder = builder
        self.runner = runner
        self.observe = observe
        self.start = time.monotonic()
        self.built: dict[str, Built] = {}
        self.notes = list(store.repaired)
        stored = store.read(Trial)
        self.notes += stored.problems
        mine = [
            trial for trial in stored.records if trial.context == info.context and trial.candidate.space == info.space
        ]
        valid = [trial for trial in mine if trial.source == info.source or still_applies(trial)]
        if len(valid) < len(mine):
            self.notes.append(
                f"{len(mine) - len(valid)} earlier trials are of code that has changed since; they do not count"
            )
        self.trials = {trial.candidate.key: trial for trial in valid}
        self.before = len(self.trials)

    def run(self) -> Outcome:
        self.store.append(self.info)
        try:
            stopped = self._measure()
        except KeyboardInterrupt:
            stopped = "interrupted"
            # Workers may be in the middle of a job; new ones are started for the finalists.
            self.builder.close()
            self.runner.close()
        result = self._conclude()
        done = len(self.trials)
        return Outcome(
            self.info, result, done, done - self.before, stopped, self._failures(), self._secs(), tuple(self.notes)
        )

    def _secs(self) -> float:
        return time.monotonic() - self.start

    def _timed(self) -> list[Trial]:
        """Trials with times, the fastest first."""
        timed = [trial for trial in self.trials.values() if trial.best_us is not None]
        return sorted(timed, key=lambda trial: trial.best_us or math.inf)

    def _failures(self) -> dict[str, int]:
        return dict(Counter(trial.status for trial in self.trials.values() if trial.status != "ok"))

    def _show(self, step: str) -> None:
        timed, done = self._timed(), len(self.trials)
        default = self.trials.get(self.info.default.key)
        own = done - self.before
        by_budget = self.info.budget_secs - self._secs()
        by_trials = (self.info.trials - done) * self._secs() / own if own else by_budget
        self.observe(
            Progress(
                self.info,
                done,
                min(self.info.trials, self.info.candidates or self.info.trials),
                timed[0].best_us if timed else None,
                default.best_us if default else None,
                self._failures(),
                self._secs(),
                max(0.0, min(by_budget, by_trials)),
                step,
            )
        )

    def _measure(self) -> str:
        """Make trials until there is a reason to stop, and return it."""
        while True:
            wanted = min(BATCH, self.info.trials - len(self.trials))
            if wanted <= 0:
                return "trials"
            if self._secs() >= self.info.budget_secs:
                return "budget"
            measured = {key: trial.best_us for key, trial in self.trials.items()}
            proposals = {each.candidate.key: each for each in self.search.propose(measured, wanted)}
            if not proposals:
                return "candidates"
            self._show("building")
            ready = []
            for built in self.builder.build([proposal.candidate for proposal in proposals.values()]):
                if built.status == "ok":
                    ready.append(built)
                else:
                    self._record(proposals[built.candidate.key], built, Measured(built.status, built.error))
            for built in ready:
                if self._secs() >= self.info.budget_secs:
                    return "budget"
                timed = self._timed()
                best_us = timed[0].best_us if timed else None
                measurement = self.runner.run(built, best_us or math.inf)
                self.built[built.candidate.key] = built
                self._record(proposals[built.candidate.key], built, measurement)
            self._drop_files()

    def _record(self, proposal: Proposal, built: Built, measured: Measured) -> None:
        trial = Trial(
            context=self.info.context,
            source=self.info.source,
            session=self.info.session,
            date=_now(),
            candidate=proposal.candidate,
            digest=built.digest,
            status=measured.status,
            error=measured.error,
            cycles=proposal.cycles,
            predicted_us=None if proposal.predicted_us is None else float(f"{proposal.predicted_us:.4g}"),
            samples_us=measured.samples_us,
            build_secs=round(built.secs, 3),
            run_secs=round(measured.secs, 3),
            origin=proposal.origin,
            wrong_trace=built.trace if measured.status == "wrong" else None,
        )
        self.store.append(trial)
        self.trials[trial.candidate.key] = trial
        self._show("timing")

    def _drop_files(self) -> None:
        """Delete the code of candidates that will not be finalists."""
        kept = {trial.candidate.key for trial in self._timed()[:FINALISTS]} | {self.info.default.key}
        for key in self.built.keys() - kept:
            directory = self.built.pop(key).directory
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def _conclude(self) -> Result | None:
        """Measure the best and the default by turns, and write down which of them it is."""
        timed = self._timed()
        if not timed:
            return None
        stored = [
            result
            for result in self.store.read(Result).records
            if result.context == self.info.context
            and result.source == self.info.source
            and result.candidate.space == self.info.space
        ]
        if stored and len(self.trials) == self.before and stored[-1].trials == len(self.trials):
            return stored[-1]
        self._show("measuring the best again")
        default = self.info.default
        finalists = [trial.candidate for trial in timed[:FINALISTS]]
        early = {trial.candidate.key for trial in list(self.trials.values())[:EARLY]}
        finalists += [trial.candidate for trial in timed if trial.candidate.key in early][:1]
        finalists = [each for place, each in enumerate(finalists) if each not in (default, *finalists[:place])]
        built = self._rebuilt([default, *finalists])
        if not built or built[0].candidate != default:
            raise TuningError(f"the default schedule, {default}, could not be built again; run `convt-tvm check`.")
        if self.info.space == GENERIC and len(built) == 1:
            raise TuningError("none of the best schedules of TVM's own space could be built again; tune again.")
        samples = self.runner.race([*built, _copy_of(built[0])], ROUNDS)
        result = self._judge(built, samples[:-1], samples[-1])
        self.store.append(result)
        return result

    def _rebuilt(self, candidates: Sequence[Candidate]) -> list[Built]:
        """The candidates with their code, of this run or built now, in this order; without those that fail."""
        missing = [candidate for candidate in candidates if candidate.key not in self.built]
        for built in self.builder.build(missing):
            if built.status == "ok":
                self.built[built.candidate.key] = built
        return [self.built[candidate.key] for candidate in candidates if candidate.key in self.built]

    def _judge(self, built: Sequence[Built], samples: Sequence[tuple[float, ...]], copy: tuple[float, ...]) -> Result:
        noise = noise_floor(samples[0], copy)
        finalists = [Finalist(each.candidate, each.digest, times) for each, times in zip(built, samples, strict=True)]
        default, *others = finalists
        ranked = sorted(finalists, key=lambda finalist: finalist.median_us)
        fastest = min(others, key=lambda finalist: finalist.median_us, default=default)
        tuned = fastest.median_us * noise < default.median_us
        winner = fastest if tuned or self.info.space == GENERIC else default
        return Result(
            context=self.info.context,
            source=self.info.source,
            session=self.info.session,
            date=_now(),
            candidate=winner.candidate,
            digest=winner.digest,
            tuned=tuned,
            median_us=winner.median_us,
            mad_us=mad(winner.samples_us),
            default_us=median(default.samples_us),
            noise_floor=noise,
            trials=len(self.trials),
            finalists=tuple(ranked),
        )


def _copy_of(built: Built) -> Built:
    """The same code from another place: a library of its own in memory."""
    assert built.directory is not None
    directory = built.directory.with_name(built.directory.name + "-again")
    shutil.copytree(built.directory, directory, dirs_exist_ok=True)
    return replace(built, directory=directory)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
