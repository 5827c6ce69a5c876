"""Which candidates to measure next: the cost rule corrected by what was measured, with some exploration.

A search space here is a list of all candidates with the cycles that the cost rule expects of each. The rule is right
about most of what matters and wrong by a factor of up to two or three; a regression (gradient-boosted trees, XGBoost)
learns the logarithm of that factor from the measured candidates, so a guess before anything is measured is the rule's,
and a few measurements correct whole regions. Its features are a candidate's decisions, taken as they stand in its
layout, the rule's cycles, and the spec.

MetaSchedule's own model reads 164 features for each buffer store of a scheduled candidate. Extracting them means
scheduling and lowering every candidate, 50 ms each, before the first guess: 15 to 30 s for the 300 to 600 candidates
of a workload, more than building 64 of them takes. The decisions say as much: they determine the schedule.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convt_tvm.records import Candidate
from convt_tvm.spec import ConvTranspose2dSpec

__all__ = ["Known", "Proposal", "Search", "rank_correlation", "spec_distance"]

FROM_RULE = 8
"""Of the first batch: the cheapest by the rule. As many again are spread over what it finds at most `WITHIN` dearer."""
WITHIN = 6.0
EXPLORED = 0.15
"""Share of later batches that is drawn at random from the better half of what is left, by the model."""
NEIGHBOURS = 0.25
"""Share that differs in a single decision from one of the `CENTRES` fastest."""
CENTRES = 3
MODELS = 4
OPTIMISM = 0.7
"""By how many standard deviations between the models a guess is lowered: what they disagree about is worth a trial."""
ELSEWHERE_WEIGHT = 0.3
"""Of a trial of another workload, beside 1 of this one's."""


@dataclass(frozen=True, slots=True)
class Known:
    """A candidate that was timed, of this workload or another."""

    spec: ConvTranspose2dSpec
    candidate: Candidate
    cycles: float
    best_us: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate to measure; `Trial.origin` lists what ``origin`` may be."""

    candidate: Candidate
    cycles: float | None
    predicted_us: float | None
    origin: str


class Search:
    """Proposes candidates of one workload, none twice.

    Deterministic: the same candidates, seed and trials give the same proposals, in this process or in one that resumes.

    Parameters
    ----------
    choices
        Every candidate with its cycles by the cost rule, the cheapest, which is the default, first.
    elsewhere
        What is known of other workloads on the same machine.
    """

    def __init__(
        self,
        spec: ConvTranspose2dSpec,
        choices: Sequence[tuple[Candidate, float]],
        *,
        seed: int,
        elsewhere: Sequence[Known] = (),
    ) -> None:
        self.spec = spec
        self.candidates = [candidate for candidate, _ in choices]
        self.cycles = np.array([cycles for _, cycles in choices])
        self._seed = seed
        self._elsewhere = elsewhere
        self._decisions = [_decisions(candidate) for candidate in self.candidates]
        encoder = _Encoder([*self._decisions, *(_decisions(known.candidate) for known in elsewhere)])
        self._features = np.array(
            [encoder.row(spec, *pair) for pair in zip(self._decisions, self.cycles, strict=True)], dtype=np.float32
        ).reshape(len(self.candidates), -1)
        others, self._other_residuals = _lessons(encoder, elsewhere)
        self._other_features = others.reshape(len(elsewhere), self._features.shape[1])

    def propose(self, measured: Mapping[str, float | None], count: int) -> list[Proposal]:
        """Up to `count` candidates that are not in `measured`; none when all are.

        Parameters
        ----------
        measured
            Microseconds by `Candidate.key`; None for a candidate that failed.
        """
        # Of the seed and of what was measured, so that a session that was interrupted goes on as it would have.
        rng = random.Random(f"{self._seed} {len(measured)}")
        left = [index for index, candidate in enumerate(self.candidates) if candidate.key not in measured]
        times = {index: measured.get(candidate.key) for index, candidate in enumerate(self.candidates)}
        timed = {index: us for index, us in times.items() if us is not None}
        chosen: dict[int, str] = {}
        if len(measured) < 2 * FROM_RULE:
            self._begin(chosen, left, min(count, 2 * FROM_RULE - len(measured)))
        guesses = self._guess(timed)
        if len(chosen) < count:
            self._go_on(chosen, left, count, timed, guesses, rng)
        return [
            Proposal(
                self.candidates[index], float(self.cycles[index]), float(guesses[index]) if timed else None, origin
            )
            for index, origin in chosen.items()
        ]

    def _begin(self, chosen: dict[int, str], left: Sequence[int], count: int) -> None:
        """The default, the best of the nearest workload, the rule's cheapest, then what is unlike all of these."""
        ordered = list(left)
        for index in ordered[:1]:
            chosen[index] = "default" if index == 0 else "rule"
        for index in self._related()[: count // 4]:
            if index in ordered:
                chosen.setdefault(index, "relative")
        rule = [index for index in ordered[:FROM_RULE] if index not in chosen]
        for index in rule[: max(0, (count + 1) // 2 - len(chosen))]:
            chosen[index] = "rule"
        near = [index for index in ordered if self.cycles[index] <= WITHIN * self.cycles[0]]
        scaled = self._features / (np.ptp(self._features, axis=0) + 1e-9)
        while len(chosen) < count and (rest := [index for index in near if index not in chosen]):
            taken = scaled[list(chosen)] if chosen else scaled[:1]
            distances = np.abs(scaled[rest][:, None] - taken[None]).sum(axis=2).min(axis=1)
            # A candidate that is twice as dear by the rule has to be twice as different.
            worth = distances * self.cycles[0] / self.cycles[rest]
            chosen[rest[int(np.argmax(worth))]] = "diverse"

    def _related(self) -> list[int]:
        """Candidates with the decisions that were fastest for other workloads, the most similar workload first."""
        if not self._elsewhere:
            return []
        fastest: dict[str, Known] = {}
        for known in self._elsewhere:
            best = fastest.get(known.spec.name)
            if best is None or known.best_us < best.best_us:
                fastest[known.spec.name] = known
        near = sorted(fastest.values(), key=lambda known: spec_distance(known.spec, self.spec))
        found = []
        for known in near:
            wanted = _decisions(known.candidate)
            found.append(
                min(
                    range(len(self.candidates)),
                    key=lambda index: (_differences(self._decisions[index], wanted), self.cycles[index]),
                )
            )
        return list(dict.fromkeys(found))

    def _guess(self, timed: Mapping[int, float]) -> np.ndarray[Any, Any]:
        """Expected microseconds of every candidate, lowered where the models disagree."""
        if not timed:
            return self.cycles
        indices = list(timed)
        residuals = np.log([timed[index] for index in indices]) - np.log(self.cycles[indices])
        level = float(np.median(residuals))
        guesses = _boosted(
            np.concatenate([self._features[indices], self._other_features]),
            np.concatenate([residuals - level, self._other_residuals]),
            np.concatenate([np.ones(len(indices)), np.full(len(self._other_residuals), ELSEWHERE_WEIGHT)]),
            self._features,
        )
        expected = guesses.mean(axis=0) - OPTIMISM * guesses.std(axis=0)
        result: np.ndarray[Any, Any] = np.exp(expected + level) * self.cycles
        return result

    def _go_on(
        self,
        chosen: dict[int, str],
        left: Sequence[int],
        count: int,
        timed: Mapping[int, float],
        guesses: np.ndarray[Any, Any],
        rng: random.Random,
    ) -> None:
        """Neighbours of the fastest, random ones of the better half, and otherwise what the model likes best."""
        rest = sorted((index for index in left if index not in chosen), key=lambda index: guesses[index])
        wanted = min(count - len(chosen), len(rest))
        centres = sorted(timed, key=lambda index: timed[index])[:CENTRES]
        adjacent = [
            index
            for index in rest
            if any(_differences(self._decisions[index], self._decisions[centre]) == 1 for centre in centres)
        ]
        for index in adjacent[: round(NEIGHBOURS * wanted)]:
            chosen[index] = "neighbour"
        better = [index for index in rest[: max(1, len(rest) // 2)] if index not in chosen]
        for index in rng.sample(better, min(len(better), round(EXPLORED * wanted))):
            chosen[index] = "random"
        for index in rest:
            if len(chosen) >= count:
                break
            chosen.setdefault(index, "model")


def _decisions(candidate: Candidate) -> dict[str, Any]:
    """A candidate's decisions by name; those that are lists, one by one."""
    flat: dict[str, Any] = {"schedule": candidate.schedule}
    for name, value in candidate.layout.items():
        if isinstance(value, list | tuple):
            flat |= {f"{name}.{place}": each for place, each in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    return sum(first.get(name) != second.get(name) for name in first.keys() | second.keys())


def _spec_features(spec: ConvTranspose2dSpec) -> list[float]:
    sizes = (
        spec.n or 0, spec.ci // spec.groups, spec.co // spec.groups, spec.groups, spec.ih, spec.iw,
        *spec.kernel_size, *spec.stride, *spec.dilation,
    )  # fmt: skip
    return [math.log2(size + 1) for size in sizes]


def spec_distance(first: ConvTranspose2dSpec, second: ConvTranspose2dSpec) -> float:
    """How unlike two workloads are: the sum of the doublings that lie between their sizes."""
    return sum(abs(a - b) for a, b in zip(_spec_features(first), _spec_features(second), strict=True))


class _Encoder:
    """Decisions as numbers: sizes by their logarithm, everything else one column for each value that occurs."""

    def __init__(self, decisions: Sequence[Mapping[str, Any]]) -> None:
        values: dict[str, set[str]] = {}
        for each in decisions:
            for name, value in each.items():
                values.setdefault(name, set()).add(json.dumps(value))
        self._numbers = sorted(name for name, found in values.items() if all(_is_size(text) for text in found))
        self._names = [
            (name, text) for name in sorted(values.keys() - {*self._numbers}) for text in sorted(values[name])
        ]

    def row(self, spec: ConvTranspose2dSpec, decisions: Mapping[str, Any], cycles: float) -> list[float]:
        """The features of one candidate."""
        return [
            math.log2(cycles),
            *_spec_features(spec),
            *(math.log2(decisions.get(name, 0) + 1) for name in self._numbers),
            *(float(json.dumps(decisions.get(name)) == text) for name, text in self._names),
        ]


def _is_size(text: str) -> bool:
    return text.isdecimal()


def _lessons(encoder: _Encoder, elsewhere: Sequence[Known]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features and residuals of other workloads' trials, each workload's own level taken off."""
    residual = {id(known): math.log(known.best_us / known.cycles) for known in elsewhere}
    of_spec: dict[str, list[float]] = {}
    for known in elsewhere:
        of_spec.setdefault(known.spec.name, []).append(residual[id(known)])
    level = {name: float(np.median(values)) for name, values in of_spec.items()}
    rows = [encoder.row(known.spec, _decisions(known.candidate), known.cycles) for known in elsewhere]
    residuals = [residual[id(known)] - level[known.spec.name] for known in elsewhere]
    return np.array(rows, dtype=np.float32), np.array(residuals)


def _boosted(
    features: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Predictions of `MODELS` regressions of `targets`, each of another part of the data; one row a model."""
    import xgboost

    parameters = {
        "max_depth": 4,
        "eta": 0.15,
        "subsample": 0.7,
        "colsample_bytree": 0.7,
        "min_child_weight": 0.5,
        "lambda": 0.5,
        "nthread": 1,
        "verbosity": 0,
    }
    data, asked = xgboost.DMatrix(features, targets, weight=weights), xgboost.DMatrix(wanted)
    return np.array(
        [
            xgboost.train({**parameters, "base_score": 0.0, "seed": number}, data, num_boost_round=60).predict(asked)
            for number in range(MODELS)
        ]
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: 1 if both order alike, -1 if they order the other way round; None for fewer than three."""
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    if not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Places in ascending order, equal values sharing the mean of theirs."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: np.ndarray[Any, Any] = ends - (counts - 1) / 2
    ranks: np.ndarray[Any, Any] = middle[inverse]
    return ranks
