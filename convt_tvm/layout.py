"""How a phase form is laid out: bands of rows, packed order of weights, the part of the input that is read.

Integers in, integers out; `convt_tvm.compute` declares from these, and schedules and their cost rules reckon with them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from math import gcd, log, sqrt
from typing import Any, Literal, Self

from convt_tvm.phases import Phase
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec, Pair

__all__ = [
    "CACHE_LINE_BYTES",
    "LATER_FIELDS",
    "MANY_IMAGES",
    "PAGE_BYTES",
    "PAST_CACHES_BYTES",
    "Band",
    "Layout",
    "Window",
    "bands",
    "collides",
    "column_delays",
    "column_starts",
    "crowds",
    "images_apart",
    "is_depthwise",
    "kernel_columns",
    "met_taps",
    "partial_length",
    "partial_sum",
    "prefers_channels_last",
    "reaches",
    "reads_input",
    "skips_parts",
    "sums_in_parts",
    "sums_taps_first",
    "window_axes",
]

MAX_UNROLLED = 200
"""Multiply-add instructions in one unrolled body; beyond it the column phases stay a loop.

fcn8s/up8 took 1.6 s to compile with 224 unrolled, in channels_last 4.3 s with 352, and 0.8 and 1.4 s in a loop; it runs
in 0.95 of the time then, and in 1.00.
"""
MAX_PEELED = {"nchw": 200, "nhwc": 512}
"""As many in all bodies together where some tiles of columns are apart (`Layout.skips_columns`), by the output's axes.

Stored as NCHW each body holds transposes besides: with 224 pointpillars/up4 took 2.3 s to compile, and no less to run.
In channels_last seed/square took 0.91 of the time with up to 512, dcgan/4 0.94.
"""
PARTIAL_ROOTS = 4
"""How many times longer: with 4, the error for one image is 0.2 to 1.7 of torch's.

A median of 0.85 in 40 layers, with 3 of 0.62. The 26 of them that have shorter parts with 3 take a median of 0.985 of
the time with 4 on a Zen 3 core, whose registers do not hold sums beside partial sums; 32 channels with 3 x 3 and 3 x 7
taps in channels_last take 0.93.
"""
MIN_PARTIAL = 32
"""Products that are summed one after the other in any case: adding up shorter sums would cost a tenth of the time."""
MANY_CHANNELS = 8
"""Output channels of a group from which on a sum takes one tap after the other; see `sums_taps_first`.

On a core of a Zen 4 server taps last took 1.5 times as long as taps first with 1 channel (fsrcnn/x3), 1.11 with 3
(dcgan/5), 1.04 with 16 (kernelbench/75), 0.99 with 21 (fcn8s/up8) and 32 (grouped/4), 0.88 with 33 (seed/square).
"""
MANY_INPUTS = 20
"""Input channels of a group from which on a row of all of them is kept together: the pages of a step's rows are few.

On a core of a Zen 4 server dilated/k3d2 (128) took 0.96 of the time, dcgan/5 (64) 0.97, fsrcnn/x3 (56) 0.99, but
seed/square (16) 1.02, seed/rect (16) and kernelbench/75 (8) 1.05, bilinear/depthwise (1) 1.08. On one of an Emerald
Rapids server fsrcnn/x3 took 0.92, fcn8s/up8 (21) 0.90, layers of 24 to 48 channels 0.93 to 1.03, seed/square and
kernelbench/75 1.07.
"""
MANY_IMAGES = 8
"""Images from which on they are enough for all threads to share: 8 of 64 x 32 x 32 values took 0.95 of the time, 64 of
512 x 4 x 4 0.98, on one core of an Emerald Rapids server."""
SHARED_IMAGES = 4
"""So many windows of a batch of any size at most are held by half the second cache where images are worked on in turn:
those of smaller images take too little time for all threads to begin with each."""
CACHE_LINE_BYTES = 64
PAGE_BYTES = 4096
PAST_CACHES_BYTES = 16 << 20
"""Outputs from this size on may go past the caches: the next layer would find little of them there."""
LATER_FIELDS: dict[str, Any] = {"streams": False, "image_block": 1, "column_chunk": 0, "by_chunk": False}
"""Fields of layouts that stored ones may lack, with what they stand for there."""
CACHE_SET_BYTES = 4096
"""Addresses so far apart share a set of the first cache, on every x86 and most Arm cores since 2006."""
CACHE_WAYS = 4
"""Lines that stay in each set beside weights: half of the ways of most first caches."""


def collides(stride_bytes: int, count: int) -> bool:
    """Whether `count` accesses `stride_bytes` apart crowd into less than half of the first cache's sets."""
    sets = CACHE_SET_BYTES // gcd(stride_bytes, CACHE_SET_BYTES)
    return sets < min(count, CACHE_SET_BYTES // CACHE_LINE_BYTES // 2)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a phase form is laid out for its schedule.

    Parameters
    ----------
    lanes
        The axis that vector lanes run along, innermost in the accumulators: output channels (``co``) or output columns
        (``ow``).
    co_block
        Output channels in a block of packed weights. The last block of a group is filled up with zeros.
    row_block, column_block
        Rows and columns of a phase in a tile, whose sums are kept in registers.
    vector_lanes
        Vector length in accumulators; divides ``co_block`` or ``column_block``, whichever the lanes run along.
    row_chunk
        Rows of a phase that are worked on for one block of channels before the next block is; a multiple of
        ``row_block``. Rows are computed in multiples of it.
    phases
        Column phases whose sums are in registers together; divides their number.
    taps
        ``inner``: a tile's sums stay in registers for all taps. ``outer``: for one tap after the other all tiles of a
        chunk are worked on, with their sums in memory in between. ``plain``: one loop over all, for others to schedule.
    gathers
        Whether a task writes all phases of its chunk, by way of a buffer and past the caches; all bands then have the
        same number of chunks.
    streams
        Whether it writes them past the caches without a buffer, vectors of columns that are whole cache lines.
    image_block
        Images in a tile, so that small ones share weights. Where too few are left the last tile has the last several
        times.
    column_chunk
        Columns of a phase that are worked on in a row of tiles for one block of channels before the next block is; a
        multiple of ``column_block``. 0 for all.
    by_chunk
        Whether a task copies what a chunk of rows reads of the image and works on it for all blocks, where the whole
        image is copied before the first task otherwise.
    """

    lanes: Literal["co", "ow"]
    co_block: int
    row_block: int
    column_block: int
    vector_lanes: int
    row_chunk: int
    phases: int = 1
    taps: Literal["inner", "outer", "plain"] = "inner"
    gathers: bool = False
    streams: bool = False
    image_block: int = 1
    column_chunk: int = 0
    by_chunk: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; those of `LATER_FIELDS` only where they differ from what all layouts once had."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != LATER_FIELDS.get(name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The layout that `to_json` wrote."""
        values = LATER_FIELDS | dict(values)
        others, flags = ("lanes", "taps"), ("gathers", "streams", "by_chunk")
        numbers: dict[str, Any] = {
            field.name: int(values[field.name]) for field in fields(cls) if field.name not in (*others, *flags)
        }
        lanes: Literal["co", "ow"] = "co" if values["lanes"] == "co" else "ow"
        taps: Literal["inner", "outer", "plain"] = (
            "outer" if values["taps"] == "outer" else "plain" if values["taps"] == "plain" else "inner"
        )
        given: dict[str, Any] = {name: bool(values[name]) for name in flags}
        return cls(lanes=lanes, taps=taps, **given, **numbers)

    @property
    def passes_caches(self) -> bool:
        """Whether a task writes all phases of its chunk, past the caches."""
        return self.gathers or self.streams

    @property
    def sum_order(self) -> tuple[object, ...]:
        """What the bits of a sum depend on besides the layer: the unit or the order, which the type stands for."""
        return (type(self),)

    @property
    def shape(self) -> tuple[object, ...]:
        """What matters most of a layout: the sums kept in registers, and how they are shared out."""
        return self.lanes, self.co_block, self.row_block, self.column_block, self.phases, self.taps, self.image_block

    def image_tiles(self, spec: ConvTranspose2dSpec) -> int:
        """Number of tiles that take in all images."""
        return -(-spec.input_shape[0] // self.image_block)

    def blocks(self, spec: ConvTranspose2dSpec) -> int:
        """Number of channel blocks in a group."""
        return -(-(spec.co // spec.groups) // self.co_block)

    def columns(self, spec: ConvTranspose2dSpec) -> int:
        """Number of columns computed in each column phase."""
        widest = spec.axes[1].widest
        return -(-widest // self.column_block) * self.column_block

    def column_chunks(self, spec: ConvTranspose2dSpec) -> int:
        """Number of chunks in a row of tiles."""
        return -(-self.columns(spec) // self.column_chunk) if self.column_chunk else 1

    def rows(self, band: "Band") -> int:
        """Number of rows computed in each row phase of `band`."""
        chunk = self.chunk(band)
        return -(-band.rows // chunk) * chunk

    def chunk(self, band: "Band") -> int:
        """Rows in a chunk of `band`: ``row_chunk``, or what covers a band with fewer rows."""
        return min(self.row_chunk, -(-band.rows // self.row_block) * self.row_block)

    def slice_bytes(self, spec: ConvTranspose2dSpec) -> int:
        """Size of the packed weights that the tiles of a chunk read again: those of a row phase, or of a tap."""
        taps = max(band.taps for band in bands(spec)) * spec.kernel_size[1] if self.taps == "inner" else 1
        return taps * (spec.ci // spec.groups) * self.co_block * DTYPE_BYTES[spec.accumulator_dtype]

    @property
    def skips_rows(self) -> bool:
        """Whether no row beyond the image's border is read: a tile of one row leaves out each tap that would.

        What is copied for a chunk has the rows of the border that it reads.
        """
        return self.lanes == "co" and self.row_block == 1 and self.taps != "plain" and not self.by_chunk

    def skips_columns(self, spec: ConvTranspose2dSpec) -> bool:
        """Whether no column beyond the image's border is read.

        Tiles that reach the border are apart from the others then, their bodies unrolled: all indices of columns are
        constant in them, and products with the border are left out.
        """
        if self.lanes != "co" or self.taps == "plain" or not self.unrolls_phases(spec):
            return False
        tiles, apart = self.columns(spec) // self.column_block, sum(self.border_tiles(spec))
        products = self._steps_inside(spec) * self.tile_vectors if apart == tiles else (apart + 1) * self._body(spec)
        peels = self.taps == "inner" and products <= MAX_PEELED[spec.output_axes]
        return apart > 0 and (tiles == 1 or peels)

    def border_tiles(self, spec: ConvTranspose2dSpec) -> Pair:
        """Tiles of columns, from the left and from the right, that reach beyond the image; each is counted once."""
        tiles = self.columns(spec) // self.column_block
        reaching = [phase for phase in spec.axes[1].phases if phase.taps]
        before = max(((phase.taps - 1) * phase.input_step - phase.base for phase in reaching), default=0)
        whole = min((spec.iw - phase.base for phase in reaching), default=self.columns(spec))
        left = min(tiles, -(-max(0, before) // self.column_block))
        return left, min(tiles - left, tiles - max(0, whole) // self.column_block)

    def last_vectors(self, spec: ConvTranspose2dSpec) -> int:
        """Vectors of columns that are summed in the last tile of a row.

        With lanes along columns that tile is apart where it has an output in fewer of them.
        """
        vectors, before = self.column_block // self.vector_lanes, self.columns(spec) - self.column_block
        if self.lanes == "co" or self.taps == "plain" or not before:
            return vectors
        needed = -(-(spec.axes[1].widest - before) // self.vector_lanes)
        fits = self._body(spec) * (vectors + needed) <= MAX_PEELED[spec.output_axes] * vectors
        return needed if fits else vectors

    def column_steps(self, spec: ConvTranspose2dSpec) -> float:
        """Tiles of columns times their column taps; where they leave out anything, the share that is left."""
        if not self.skips_columns(spec):
            tiles = self.columns(spec) / self.column_block
            if self.lanes == "ow":
                tiles += self.last_vectors(spec) * self.vector_lanes / self.column_block - 1
            return tiles * spec.axes[1].all_taps
        return self._steps_inside(spec)

    def _steps_inside(self, spec: ConvTranspose2dSpec) -> float:
        """Tiles of columns times their column taps, but for the share that would read the border."""
        columns = self.columns(spec)
        reads = (phase.base - tap * phase.input_step for phase in spec.axes[1].phases for tap in range(phase.taps))
        inside = sum(max(0, min(columns, spec.iw - first) - max(0, -first)) for first in reads)
        return inside / self.column_block

    def unrolls_phases(self, spec: ConvTranspose2dSpec) -> bool:
        """Whether the loop over column phases is unrolled too; see `MAX_UNROLLED`."""
        return self._body(spec) <= MAX_UNROLLED

    def _body(self, spec: ConvTranspose2dSpec) -> int:
        """Multiply-add instructions of a tile, all column taps of all column phases unrolled."""
        axis = spec.axes[1]
        return len(axis.phases) * max(1, axis.most_taps) * self.tile_vectors

    @property
    def held_vectors(self) -> int:
        """Vectors beside partial sums while products are added to them: those of a tap, and a value that they meet."""
        along = self.co_block if self.lanes == "co" else self.row_block * self.column_block
        return along // self.vector_lanes + 1

    @property
    def tile_vectors(self) -> int:
        """Accumulators of a tile, in one column phase."""
        return self.co_block * self.image_block * self.row_block * self.column_block // self.vector_lanes

    def packed_shape(self, spec: ConvTranspose2dSpec) -> tuple[int, int, int, int, int]:
        """Shape of the packed weight: ``(groups * blocks, kh, kw, ci/groups, co_block)``."""
        return spec.groups * self.blocks(spec), *spec.kernel_size, spec.ci // spec.groups, self.co_block

    def window_elements(self, spec: ConvTranspose2dSpec) -> int:
        """Number of values that are kept of the input."""
        window = Window.of(spec, self)
        return self.image_tiles(spec) * self.image_block * spec.ci * window.height * window.width

    def packed_dtype(self, spec: ConvTranspose2dSpec) -> str:
        """The dtype of the packed weight: the accumulators', so that a kernel converts none."""
        return spec.accumulator_dtype


@dataclass(frozen=True, slots=True)
class Band:
    """Row phases that have the same number of taps and of rows, and so share one loop nest."""

    index: int
    phases: tuple[Phase, ...]

    @property
    def rows(self) -> int:
        """Rows in each phase."""
        return self.phases[0].count

    @property
    def taps(self) -> int:
        """Row taps of each phase; 0 where no tap reaches these rows and they hold the bias alone."""
        return self.phases[0].taps

    def row_steps(self, layout: Layout, input_size: int) -> int:
        """Pairs of a tile of rows and a row tap that reads any row of the image, which has `input_size` rows."""
        return _row_steps(self.phases, layout.rows(self), layout.row_block, input_size)

    @property
    def rows_beside(self) -> int:
        """Rows of the image that so many rows of each phase read beside as many as they are."""
        first = min(phase.base - (phase.taps - 1) * phase.input_step for phase in self.phases)
        return max(phase.base for phase in self.phases) - first

    @property
    def reads_one_row(self) -> bool:
        """Whether all phases read the same single input row for their rows of the same number."""
        return self.taps == 1 and len({phase.base for phase in self.phases}) == 1


@lru_cache(maxsize=1024)
def _row_steps(phases: tuple[Phase, ...], rows: int, row_block: int, input_size: int) -> int:
    """See `Band.row_steps`; kept, since layouts that differ in columns or channels ask for the same."""
    steps = 0
    for phase in phases:
        for first in range(0, rows, row_block):
            low, high = first + phase.base, first + row_block - 1 + phase.base
            # 0 <= high - u*step and low - u*step < input_size
            start = max(0, (low - input_size) // phase.input_step + 1)
            steps += max(0, min(phase.taps, high // phase.input_step + 1) - start)
    return steps


@lru_cache(maxsize=64)
def bands(spec: ConvTranspose2dSpec) -> tuple[Band, ...]:
    """Row bands of `spec`, in the order of their first row; together they hold every output row once.

    At most two tap counts other than zero and two row counts occur, so there are at most six.
    """
    grouped: dict[tuple[int, int], list[Phase]] = {}
    for phase in spec.axes[0].phases:
        grouped.setdefault((phase.taps, phase.count), []).append(phase)
    return tuple(Band(index, tuple(phases)) for index, phases in enumerate(grouped.values()))


def reaches(spec: ConvTranspose2dSpec, band: Band) -> bool:
    """Whether any tap reaches the outputs of `band`, which otherwise hold the bias alone."""
    return _meet_image(band.phases, spec.ih) and _meet_image(spec.axes[1].phases, spec.iw)


@lru_cache(maxsize=64)
def reached_bands(spec: ConvTranspose2dSpec) -> tuple[Band, ...]:
    """Those of `bands` whose outputs a tap reaches."""
    return tuple(band for band in bands(spec) if reaches(spec, band))


def _meet_image(phases: Iterable[Phase], input_size: int) -> bool:
    """Whether a tap of any position of `phases` reads the image and not the border alone."""
    reads = ((phase.base - tap * phase.input_step, phase.count) for phase in phases for tap in range(phase.taps))
    return any(first < input_size and first + count > 0 for first, count in reads)


def column_starts(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each column phase, how many kernel columns the phases before it have."""
    return tuple(accumulate((phase.taps for phase in spec.axes[1].phases), initial=0))[:-1]


def kernel_columns(spec: ConvTranspose2dSpec) -> tuple[int, ...]:
    """For each kernel column, its place in packed order: those of one column phase side by side.

    Columns that reach no output (an output narrower than the stride has fewer phases than the stride) come last.
    """
    order = [column for phase in spec.axes[1].phases for column in phase.kernel_indices]
    order += [column for column in range(spec.kernel_size[1]) if column not in order]
    return tuple(order.index(column) for column in range(spec.kernel_size[1]))


def column_delays(spec: ConvTranspose2dSpec, layout: Layout) -> tuple[int, ...]:
    """For each column phase, how many steps over column taps pass before its first.

    With these, phases whose sums are in registers together take in each step what reads the same column, so that no
    vector of the image has to stay in a register for a later one: beside 12 sums of 16 registers LLVM stored and loaded
    such vectors in every step (Zen 3: with delays dcgan/5 took 0.74 of the time). All are 0 where phases share none.
    """
    phases = spec.axes[1].phases
    reaching = [phase for phase in phases if phase.taps]
    shares = layout.lanes == "ow" and layout.phases > 1 and layout.unrolls_phases(spec) and sums_taps_first(spec)
    if not shares or not reaching or reaching[0].input_step > 1:
        return (0,) * len(phases)
    last = max(phase.base for phase in reaching)
    return tuple(last - phase.base if phase.taps else 0 for phase in phases)


def sums_taps_first(spec: ConvTranspose2dSpec) -> bool:
    """Whether a sum takes the column taps of one channel after the other, not the channels of one tap after the other.

    It does where there are too few output channels for a vector of input to meet: the column taps of a channel, which
    read the same vectors, then share them.
    """
    return spec.co // spec.groups < MANY_CHANNELS


def window_axes(spec: ConvTranspose2dSpec, layout: Layout) -> str:
    """The order in memory of a window's images, channels, rows and columns: what a sum reads in turn side by side.

    One channel after the other with lanes along channels, where one value at a time meets a vector; a row of each
    channel with lanes along columns, or where there are few channels all rows of each (see `MANY_INPUTS`).
    """
    if layout.lanes == "co":
        return "nhwc"
    return "nhcw" if spec.ci // spec.groups >= MANY_INPUTS else "nchw"


def is_depthwise(spec: ConvTranspose2dSpec) -> bool:
    """Whether each output channel is summed from one input channel of its own."""
    return spec.ci == spec.co == spec.groups > 1


def prefers_channels_last(spec: ConvTranspose2dSpec) -> bool:
    """Whether a kernel for channels_last is faster than one for NCHW between two copies.

    It is not where each of several groups has few output channels, for the values of a vector are not side by side in
    memory then; but with one channel in each, lanes run along groups, if they fill vectors.
    """
    fills_vectors = is_depthwise(spec) and spec.groups % MANY_CHANNELS == 0
    return spec.groups == 1 or fills_vectors or spec.co // spec.groups >= MANY_CHANNELS


def reads_input(spec: ConvTranspose2dSpec, layout: Layout) -> bool:
    """Whether sums read the input itself and no window of it.

    They do where it holds all that they read, in their dtype and order, and the first cache holds what is read side by
    side: positions one channel after the other in NHWC, rows of all channels in NCHW.
    """
    if spec.dtype != spec.accumulator_dtype or (layout.lanes == "co") != (spec.input_axes == "nhwc"):
        return False
    if layout.by_chunk:
        return False
    if layout.lanes == "co":
        stays = not crowds(layout, spec.ci * DTYPE_BYTES[spec.dtype], (spec.ih, spec.iw))
    else:
        stays = not collides(spec.ih * spec.iw * DTYPE_BYTES[spec.dtype], spec.ci)
    return stays and Window.of(spec, layout).is_inside


def images_apart(spec: ConvTranspose2dSpec, layout: Layout, cache_bytes: int, *, of_any_batch: bool) -> bool:
    """Whether the window of one image is copied and all of its output computed before the next one's.

    So the copy is in the second cache, of `cache_bytes`, when it is read, as those of all images would not be. Each of
    `MANY_IMAGES` is a task; in a batch `of_any_batch` size, for which `spec` has one image, all threads work on each in
    turn while there are fewer.
    """
    if layout.image_block > 1 or layout.taps == "plain" or layout.by_chunk or reads_input(spec, layout):
        return False
    images, held = spec.input_shape[0], cache_bytes // 2
    window_bytes = layout.window_elements(spec) * DTYPE_BYTES[spec.accumulator_dtype]
    if of_any_batch:
        return held // SHARED_IMAGES < window_bytes <= held
    return images >= MANY_IMAGES and window_bytes // images <= held < window_bytes


def crowds(layout: Layout, column_bytes: int, size: Pair) -> bool:
    """Whether more positions of a tile than stay in a set of the first cache fall into one.

    They are read from NHWC whose columns are `column_bytes` apart, of images with a `size` in rows and columns.
    """
    height, width = size
    images, rows, columns = range(layout.image_block), range(layout.row_block), range(layout.column_block)
    places = ((image * height + row) * width + column for image in images for row in rows for column in columns)
    addresses = (place * column_bytes for place in places)
    sets = Counter(address % CACHE_SET_BYTES // CACHE_LINE_BYTES for address in addresses)
    return max(sets.values()) > CACHE_WAYS


def partial_length(products: int) -> float:
    """How many of so many products a partial sum should have; see `partial_sum`."""
    return max(MIN_PARTIAL, PARTIAL_ROOTS * sqrt(products))


@lru_cache(maxsize=256)
def partial_sum(spec: ConvTranspose2dSpec, band: Band) -> tuple[int, int, int]:
    """Row taps, input channels and column taps whose products are summed in registers; each divides its number.

    A sum of n products is a sum of partial sums, which leaves less error than n additions in a row do (blocked
    summation; N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, section 4.2). Partial sums
    of ``sqrt(n)`` products leave the least; as each costs a load, an addition and a store for an accumulator, they are
    `PARTIAL_ROOTS` times longer. Where there is one tap there is one partial sum, as in torch.

    Parts and the order in them and of them (rows, then columns, then channels; see `sums_taps_first`) depend on nothing
    but the parameters of one image, so that every layout of a type, batch size and schedule sums to the same bits.
    """
    columns, channels = spec.axes[1].most_taps, spec.ci // spec.groups
    met_rows, met_columns = met_taps(spec, band)
    products = met_rows * met_columns * channels
    if products <= MIN_PARTIAL or band.taps * columns == 1:
        return band.taps, channels, columns
    goal = partial_length(products)
    sizes = [size for size in range(1, channels + 1) if channels % size == 0]
    if sums_taps_first(spec):
        lengths = {(1, size, columns): size * met_columns for size in sizes}
    else:
        lengths = {(1, size, 1): size for size in sizes}
        lengths[1, channels, columns] = channels * met_columns
    return min(lengths, key=lambda part: abs(log(lengths[part] / goal)))


def met_taps(spec: ConvTranspose2dSpec, band: Band) -> Pair:
    """How many row taps and column taps an output meets at most: of a small image not all."""
    return min(band.taps, spec.ih), min(spec.axes[1].most_taps, spec.iw)


def skips_parts(spec: ConvTranspose2dSpec) -> bool:
    """Whether partial sums, if there are several, are left out where they would hold products with the border alone.

    That is where outputs do not meet all taps: of 49 one of a 1 x 1 image meets one.
    """
    columns = spec.axes[1].most_taps
    return any(met_taps(spec, band) != (band.taps, columns) for band in bands(spec))


def sums_in_parts(spec: ConvTranspose2dSpec, band: Band) -> bool:
    """Whether there is more than one partial sum."""
    columns = spec.axes[1].most_taps
    return partial_sum(spec, band) != (band.taps, spec.ci // spec.groups, columns)


@dataclass(frozen=True, slots=True)
class Window:
    """The rectangle of the padded, or cropped, input that a phase form reads: what the taps reach, border included.

    ``first_row`` and ``first_column`` are the input's coordinates of its corner, negative where it begins in the
    border. Its rows ``rows_inside`` and columns ``columns_inside``, counted from the corner, hold input; the others
    zeros.
    """

    first_row: int
    first_column: int
    height: int
    width: int
    rows_inside: Pair
    columns_inside: Pair

    @classmethod
    def of(cls, spec: ConvTranspose2dSpec, layout: Layout) -> Self:
        """The window that the schedule's whole tiles read; without the border where they leave it out."""
        row_phases = [(phase, layout.rows(band)) for band in bands(spec) for phase in band.phases]
        column_phases = [(phase, layout.columns(spec)) for phase in spec.axes[1].phases]
        top, height, rows = cls._extent(row_phases, spec.ih, skips=layout.skips_rows)
        left, width, columns = cls._extent(column_phases, spec.iw, skips=layout.skips_columns(spec))
        return cls(top, left, height, width, rows, columns)

    @staticmethod
    def _extent(phases: Iterable[tuple[Phase, int]], input_size: int, *, skips: bool) -> tuple[int, int, Pair]:
        """First index, size and the part inside the input of what phases with so many positions read.

        With `skips` of that part alone, if there is one.
        """
        reads = [
            (phase.base - (phase.taps - 1) * phase.input_step, positions - 1 + phase.base)
            for phase, positions in phases
            if phase.taps
        ]
        first, last = min((low for low, _ in reads), default=0), max((high for _, high in reads), default=0)
        if skips and max(0, first) <= min(last, input_size - 1):
            first, last = max(0, first), min(last, input_size - 1)
        size = last - first + 1
        inside = min(max(0, -first), size), max(0, min(size, input_size - first))
        return first, size, (inside[0], max(inside))

    @property
    def is_inside(self) -> bool:
        """Whether it holds no border."""
        return self.rows_inside == (0, self.height) and self.columns_inside == (0, self.width)
