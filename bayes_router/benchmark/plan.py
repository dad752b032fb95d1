"""What the benchmark measures, in order."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from bayes_router.benchmark import cases
from bayes_router.benchmark.cases import MIXES, Shape
from bayes_router.checks import require

LENGTHS = tuple(2**n for n in range(9, 17))
ALONE = LENGTHS[2:]
BESIDE = "beside a busy process"
RUNS = (1, 64)  # neighbours that are routed together


@dataclass(frozen=True)
class BenchmarkPlan:
    """What to measure.

    Attributes:
        quick: short texts, one mix, no memory of single experts.
        lengths: tokens; None for what suits the device.
        mixes: percentages full/linear/local; None for three, or one if quick.
        cpu_time: on a CPU, processor time of one thread instead of the clock on the wall.
        shapes: BxHxTxDh, measured instead of the usual ones (or beside `lengths`).
        seconds: time for all, the comparison with the reference and the drawing included: nothing
            begins that would not end within it, as far as earlier readings tell; None for SECONDS.
        part: K/N: what falls to the K-th of N cards. A length is one card's, and so are experts
            alone at all lengths, whose growth is read. None for all.
    """

    quick: bool = False
    lengths: tuple[int, ...] | None = None
    mixes: tuple[str, ...] | None = None
    cpu_time: bool = False
    shapes: tuple[str, ...] | None = None
    seconds: float | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for length in self.lengths or ():
            if length < 1:
                raise ValueError(f"lengths: expected at least 1 token; got {length}")
        for mix in self.mixes or ():
            cases.mix_shares(mix)
        for shape in self.shapes or ():
            Shape.parse(shape)
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds: expected a positive number; got {self.seconds:g}")
        if self.part is not None:
            _place(self.part)


def _place(part: str) -> tuple[int, int]:
    """K and N of the part K/N."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    place, cards = map(int, found.groups()) if found else (0, 0)
    require(1 <= place <= cards, "part", "K/N with K of 1 to N, as 2/4", part)
    return place, cards


@dataclass(frozen=True)
class Group:
    """Calls that take turns.

    Attributes:
        what: forward, forward+backward, decode, alone, training memory, or BESIDE: forward while
            another process computes all the time.
        shape: of all of them.
        mix: of the routed ones.
        run: neighbours that are routed together.
        target: it has a target, and is given its whole budget.
    """

    what: str
    shape: Shape
    mix: str = ""
    run: int = 1
    target: bool = field(default=False, compare=False)

    @property
    def kind(self) -> str:
        """All but the shape."""
        return f"{self.what} {self.mix}, runs of {self.run}" if self.mix else self.what


def plan_groups(plan: BenchmarkPlan, cuda: bool, longest: int = LENGTHS[-1]) -> list[Group]:
    """What to measure, in order."""
    mixes = plan.mixes or (MIXES[:1] if plan.quick else MIXES)
    heads, batch = (16, 64) if cuda else (8, 10)
    asked = bool(plan.lengths or plan.shapes)
    usual = (512, 2048) if plan.quick else [T for T in LENGTHS if longest >= T]
    lengths = plan.lengths or (() if asked else usual)
    shapes = [Shape.parse(text) for text in plan.shapes or ()]
    pairs = [(Shape(1, heads, T, 64), Shape(batch, 8, T, 64)) for T in lengths] + [
        (shape, shape) for shape in shapes
    ]
    groups = (
        []
        if asked or plan.quick
        else [replace(group, target=True) for group in _targets(mixes, cuda, plan.cpu_time)]
    )
    # a GPU takes seconds for a new length
    compiled = {group.shape.T for group in groups if group.mix} if cuda else set()
    ready, others = (
        [pair for pair in pairs if (pair[0].T in compiled) is known] for known in (True, False)
    )
    single, runs = RUNS
    for some, of, run in (
        *((ready, mixes, run) for run in RUNS),
        (others, mixes[:1], single),
        (others, mixes[1:], single),
        (others, mixes, runs),
    ):
        for one, batched in some:
            for mix in of:
                groups += [Group(what, one, mix, run) for what in ("forward", "forward+backward")]
                groups.append(Group("decode", batched, mix, run))
    if asked or plan.quick:
        alone = sorted({Shape(1, one.H, one.T, one.Dh) for one, _ in pairs}, key=lambda one: one.T)
        groups += [Group("alone", one) for one in alone]
        # a CPU takes minutes for one longer
        most = [max(lengths) if cuda else min(max(lengths), 8192)] if lengths else []
        trained = [Shape(1, heads, T, 64) for T in most] + [
            Shape(1, one.H, one.T, one.Dh) for one in shapes
        ]
        groups += [Group("training memory", one) for one in trained]
    groups = list(dict.fromkeys(groups))
    if plan.part is None:
        return groups
    place, cards = _place(plan.part)
    loads, owner, sizes = [0] * cards, {}, Counter(map(_piece, groups))
    fewer = f"at most {len(sizes)} parts, which there are lengths for"
    require(place <= len(sizes), "part", fewer, plan.part)
    for piece, size in sizes.most_common():  # each to who has least
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += size
    return [group for group in groups if owner[_piece(group)] == place - 1]


def _piece(group: Group) -> int | str:
    """What is never divided: all of a length, and experts alone at all lengths."""
    return group.what if group.what == "alone" else group.shape.T


def _targets(mixes: Sequence[str], cuda: bool, cpu_time: bool) -> Iterator[Group]:
    """The rows that have a target, and single experts at every length."""
    lead, second = mixes[0], mixes[:2]
    if cuda:
        yield from (Group("forward", Shape(1, 16, 32768, 64), mix) for mix in second)
        yield Group("forward", Shape(1, 8, 32768, 128), lead)
        yield from (Group("forward", Shape(2, 16, 8192, 64), mix) for mix in second)
        yield Group("forward+backward", Shape(1, 16, 32768, 64), lead)
        yield Group("decode", Shape(64, 8, 32768, 64), lead)
    else:
        yield from (Group("forward", Shape(1, 8, T, 64), lead) for T in (8192, 32768))
        if not cpu_time:  # which a neighbour takes nothing of
            yield from (Group(BESIDE, Shape(1, 8, T, 64), lead) for T in (2048, 8192))
    yield Group("training memory", Shape(1, 16 if cuda else 8, 8192, 64))
    yield from (Group("alone", Shape(1, 16 if cuda else 8, T, 64)) for T in ALONE)
