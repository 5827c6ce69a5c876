"""Schedule spaces: finds the files of ``schedules/`` and chooses one, with a layout, when nothing was tuned."""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace

import convt_tvm.schedules
from convt_tvm.cost import is_for_memory
from convt_tvm.errors import BuildError
from convt_tvm.layout import LATER_FIELDS, Layout
from convt_tvm.records import Candidate
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = [
    "Choice",
    "Space",
    "choices",
    "declared",
    "default_choice",
    "find_choice",
    "ranked_choices",
    "rest_choices",
    "spaces",
    "varied_choices",
]

FEW_IMAGES = 8
"""At most so many are taken for any batch size: of more, outputs are not often too large for the caches."""
SMALL_IMAGES = 8
"""As many small ones are taken for any batch size, besides a single one: tiles of 16 were as fast as of 8 for 16 images
of 1 x 1 and 2 x 2."""
MANY_WEIGHTS = 1 << 20
"""Weights that no second cache holds, from which on images of one column stay upright: 2.1 MB took 0.81 to 1.01 of the
time on a Zen 3 core, 8.4 MB 1.00 to 1.05 (hifigan/up1)."""
SUITS_CYCLES = 1.01
"""How many times the fewest cycles for a single image a packed weight may take of several: their estimates are no
better. With 1.02 single images of dcgan/2 took 1.2 times as long, batches of 8 0.9 times."""


@dataclass(frozen=True)
class Space:
    """One file of ``schedules/``: a way to turn a phase form into a fast loop nest for one kind of target."""

    name: str
    target_kind: str
    applies: Callable[[ConvTranspose2dSpec], bool]
    layouts: Callable[[ConvTranspose2dSpec, Target], Iterator[tuple[Layout, float]]]
    space: Callable[[Schedule], None]


@dataclass(frozen=True)
class Choice:
    """A schedule space with the layout to declare for it, and the cycles that its cost rule expects."""

    space: Space
    layout: Layout
    cycles: float

    @property
    def candidate(self) -> Candidate:
        """The same without code, to be stored."""
        return Candidate(self.space.name, self.layout.to_json())


@functools.cache
def spaces() -> tuple[Space, ...]:
    """All schedule spaces, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(convt_tvm.schedules.__path__))
    found = []
    for name in names:
        module: Any = importlib.import_module(f"convt_tvm.schedules.{name}")
        found.append(Space(module.NAME, module.TARGET_KIND, module.applies, module.layouts, module.space))
    return tuple(found)


def declared(spec: ConvTranspose2dSpec, target: Target) -> ConvTranspose2dSpec:
    """The spec whose phase form is declared for `spec`, and laid out; its kernel takes tensors of the shapes of `spec`.

    On processors, whose schedules share rows among vectors and tiles, it is `ConvTranspose2dSpec.turned`: on a Zen 3
    core 32 to 1 channels on 8192 x 1 took 10 times as long as on 1 x 8192, 64 to 16 on 4096 x 1 4 times, 128 to 64 on
    2048 x 1 1.4 times. Not so with `MANY_WEIGHTS`.
    """
    return spec.turned if target.kind == "llvm" and math.prod(spec.weight_shape) < MANY_WEIGHTS else spec


def choices(spec: ConvTranspose2dSpec, target: Target, schedule: str | None = None) -> list[Choice]:
    """Every space, or the one that `schedule` names, and layout for `spec` on `target`, the cheapest first."""
    own = declared(spec, target)
    found = [
        Choice(space, layout, cycles)
        for space in spaces()
        if space.target_kind == target.kind and schedule in (None, space.name) and space.applies(own)
        for layout, cycles in space.layouts(own, target)
    ]
    return sorted(found, key=lambda choice: choice.cycles)


def ranked_choices(spec: ConvTranspose2dSpec, target: Target) -> list[Choice]:
    """`choices` for `spec`; for any batch size those that suit single images and larger batches, the cheapest first.

    They are those of a single image; or of the fewest whose outputs are too large for the caches, where these are few
    and their best schedule streams, as smaller batches then lose little by it (`Layout.streams`). Or, where small
    images share tiles, those of a batch of `SMALL_IMAGES`, with a packed weight that suits a single image as well.
    """
    if spec.n is not None:
        return choices(spec, target)
    one = spec.sized
    alone = choices(one, target)
    count = next((n for n in range(2, FEW_IMAGES + 1) if is_for_memory(one.with_batch(n))), 1)
    if count > 1 and not is_for_memory(one):
        found = choices(one.with_batch(count), target)
        if found and found[0].layout.streams:
            return found
    several = [choice for choice in choices(one.with_batch(SMALL_IMAGES), target) if choice.layout.image_block > 1]
    if not several:
        return alone
    suits = {_packing(choice, one) for choice in alone if choice.cycles <= SUITS_CYCLES * alone[0].cycles}
    found = [choice for choice in several if _packing(choice, one) in suits]
    found += [replace(choice, cycles=choice.cycles * SMALL_IMAGES) for choice in alone]
    return sorted(found, key=lambda choice: choice.cycles)


def rest_choices(spec: ConvTranspose2dSpec, target: Target, choice: Choice) -> list[Choice]:
    """What goes on where tiles of several images would not be filled, in tiles of half as many, and so on to one."""
    found, images = list[Choice](), choice.layout.image_block // 2
    while spec.n is None and images:
        sized = choices(spec.with_batch(images), target, choice.space.name)
        same = (each for each in sized if _packing(each, spec.sized) == _packing(choice, spec.sized))
        found.append(next(each for each in same if each.layout.image_block == images))
        images //= 2
    return found


def _packing(choice: Choice, spec: ConvTranspose2dSpec) -> tuple[object, ...]:
    """What is equal for those that take the same packed weight, and sum in the same order."""
    layout = choice.layout
    return choice.space, layout.sum_order, layout.packed_shape(spec), layout.packed_dtype(spec)


def default_choice(spec: ConvTranspose2dSpec, target: Target) -> Choice:
    """What runs when nothing was tuned; raises BuildError if no space applies.

    What the bits of a sum depend on (`Layout.sum_order`) is that of a single image, which then has the same bits in
    every batch.
    """
    return _default(ranked_choices(spec, target), spec, target)


def _default(found: list[Choice], spec: ConvTranspose2dSpec, target: Target) -> Choice:
    if spec.n not in (None, 1) and len({choice.layout.sum_order for choice in found}) > 1:
        order = choices(spec.with_batch(1), target)[0].layout.sum_order
        found = [choice for choice in found if choice.layout.sum_order == order]
    if not found:
        raise BuildError(
            f"no schedule space applies to {spec.name} on {target.name}; there are "
            f"{', '.join(f'{space.name} (for {space.target_kind})' for space in spaces())}."
        )
    return found[0]


def varied_choices(spec: ConvTranspose2dSpec, target: Target, count: int) -> list[Choice]:
    """What is worth measuring where `count` can be: the default, then of every `Layout.shape` the cheapest."""
    if count < 1:
        return []
    everything = choices(spec, target)
    found = [_default(everything, spec, target)]
    seen = {(found[0].space.name, found[0].layout.shape)}
    for choice in everything:
        if len(found) < count and (key := (choice.space.name, choice.layout.shape)) not in seen:
            seen.add(key)
            found.append(choice)
    return found


def find_choice(spec: ConvTranspose2dSpec, target: Target, candidate: Candidate) -> Choice | None:
    """The choice that a stored candidate stands for, or None if there is no such choice any more."""
    if candidate.trace is not None:
        return _replay(candidate)
    own = declared(spec, target)
    for space in spaces():
        if space.name == candidate.schedule and space.target_kind == target.kind and space.applies(own):
            found = _layouts(space, own, target)
            if not found or not found[0][0].to_json().keys() ^ candidate.layout.keys() <= LATER_FIELDS.keys():
                return None
            wanted = type(found[0][0]).from_json(candidate.layout)
            return next((Choice(space, layout, cycles) for layout, cycles in found if layout == wanted), None)
    return None


@functools.lru_cache(maxsize=4)
def _layouts(space: Space, spec: ConvTranspose2dSpec, target: Target) -> tuple[tuple[Layout, float], ...]:
    """All of a space for a spec, kept: who looks for one candidate of it looks for others."""
    return tuple(space.layouts(spec, target))


def _replay(candidate: Candidate) -> Choice:
    """A choice that schedules by the candidate's trace; no file of ``schedules/`` has to do with it."""
    trace = list(candidate.trace or ())
    space = Space(
        candidate.schedule,
        "llvm",
        applies=lambda spec: True,
        layouts=lambda spec, target: iter(()),
        space=lambda sch: Trace.apply_json_to_schedule(trace, sch),
    )
    return Choice(space, Layout.from_json(candidate.layout), math.nan)
