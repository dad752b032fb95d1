"""The contenders of `analysis.routes.tiny_lm`: static layouts, softmax routers, ours, by size."""

from typing import Any

PAPER = ["full", "linear", "local"]  # the paper's experts
OURS = ["full", "gated", "local"]
HYBRID = ["gated", "local", "gated", "full"]


def static(*pattern: str, **model: Any) -> dict[str, Any]:
    """Layers take these experts in turn; `model` are settings of the model beside."""
    names = {name for names in pattern for name in names.split(",")}
    changes = {"changes": {"model": model}} if model else {}
    return {
        "contender": {"kind": "static", "pattern": pattern, **changes},
        "experts": sorted({"full", *names}),
    }


def softmax(
    experts: list[str], schedule: dict[str, Any] | None = None, **weights: float
) -> dict[str, Any]:
    """A prior-free softmax router with penalties.

    It starts undecided, or on the layout of its schedule.
    """
    changes = {"prior": {"map": "uniform", "price": 1.0}, "schedule": schedule or {}}
    return {"contender": {"kind": "softmax", "changes": changes, **weights}, "experts": experts}


def dirichlet(
    experts: list[str], prior: dict[str, Any], schedule: dict[str, Any], controller: str = ""
) -> dict[str, Any]:
    """The Dirichlet router, by SVI."""
    changes = {"prior": prior, "schedule": schedule}
    return {
        "contender": {"kind": "svi", "changes": changes, "controller": controller},
        "experts": experts,
    }


def started_on(
    *pattern: str, price: float = 10.0, cost: str = "", **schedule: Any
) -> dict[str, Any]:
    """Ours, started on a static hybrid and pressed by a price of `cost` (the paper's).

    The prior favours the pattern, then only cost.
    """
    prior = {"map": "uniform", "price": price} | ({"cost": cost} if cost else {})
    return dirichlet(OURS, prior, {"start_experts": pattern, **schedule})


def by_the_head(made: dict[str, Any]) -> dict[str, Any]:
    """The same, a route for each head."""
    made["contender"]["changes"]["model"] = {"route_by": "head"}
    return made


LITERAL = {"total_concentration": 3.0, "temperature": 1.0, "price": 0.0}
LITERAL_SCHEDULE = {"kl_weight": 1.0, "start_total_concentration": 3.0}
SHORT: dict[str, dict[str, Any]] = {
    "full attention": static("full"),
    "local": static("local"),
    "linear": static("linear"),
    "gated linear": static("gated"),
    "static: local, local, local, full": static("local", "local", "local", "full"),
    "static: local, linear": static("local", "linear"),
    "static: local, gated": static("local", "gated"),
    "static: gated, local, gated, full": static(*HYBRID),
    "softmax router": softmax(OURS),
    "softmax router, cost penalty": softmax(OURS, cost=0.12),
    "softmax router, entropy bonus": softmax(OURS, entropy=0.003),
    "softmax router, load balancing": softmax(OURS, balance=0.01),
    "Dirichlet, literal ELBO, paper's experts": dirichlet(PAPER, LITERAL, LITERAL_SCHEDULE),
    "Dirichlet, literal ELBO": dirichlet(OURS, LITERAL, LITERAL_SCHEDULE),
    "ours, paper's experts": dirichlet(PAPER, {}, {}),
    "ours": dirichlet(OURS, {}, {}),
    "ours, from the hybrid": started_on(*HYBRID),
}
LETTERS = {"f": "full", "g": "gated", "l": "local"}
PATTERNS = (
    "f",
    "g",
    "l",
    "gl",
    "gggggf",
    "gggglf",
    "glgglf",
    "lglglf",
    "gllllf",
    "lllllf",
    "llfllf",
    "llllff",
)
"""Static layouts of six layers, one letter a layer: costs 1, .15, .3, .225, .292, .317, .342,
.367, .392, .417, .533, .533."""


def layout(letters: str) -> tuple[str, ...]:
    """Experts of a static layout."""
    return tuple(LETTERS[letter] for letter in letters)


def favouring(*pattern: str) -> list[list[float]]:
    """A prior mean of each layer: 0.6 for the expert of `pattern`, 0.2 for each of the others."""
    return [[0.6 if expert == chosen else 0.2 for expert in OURS] for chosen in pattern]


LATE = {"start_share": 0.98, "anneal_from": 0.5, "anneal_to": 0.8}
"""Half of training on the layout, hardly disturbed; the price comes after."""
LONG: dict[str, dict[str, Any]] = {
    **{f"static {letters}": static(*layout(letters)) for letters in PATTERNS},
    "linear": static("linear"),
    "softmax router": softmax(OURS),
    "softmax router, cost penalty": softmax(OURS, cost=0.03),
    "softmax router, entropy bonus": softmax(OURS, entropy=0.003),
    "softmax router, load balancing": softmax(OURS, balance=0.01),
    "softmax router, from lglglf": softmax(
        OURS, {"start_experts": layout("lglglf"), **LATE}, cost=0.03
    ),
    "Dirichlet, literal ELBO, paper's experts": dirichlet(PAPER, LITERAL, LITERAL_SCHEDULE),
    "Dirichlet, literal ELBO": dirichlet(OURS, LITERAL, LITERAL_SCHEDULE),
    "ours": dirichlet(OURS, {}, {}),
    "ours, from glgglf": started_on(
        *layout("glgglf"), price=20.0, straight_through_from=0.8, **LATE
    ),
    "ours, from glgglf, price 5": started_on(*layout("glgglf"), price=5.0, **LATE),
    "ours, from lglglf": started_on(*layout("lglglf"), **LATE),
    "ours, from gllllf": started_on(*layout("gllllf"), **LATE),
}


def one_layer(chosen: int, heads: int = 4, expert: str = "full") -> str:
    """`chosen` heads of a layer on `expert`, the others on local, as one name of a layout."""
    return ",".join([expert] * chosen + ["local"] * (heads - chosen))


def last_by_head(
    rest: str, chosen: int, heads: int = 4, expert: str = "full", **model: Any
) -> dict[str, Any]:
    """Static `rest`, and a last layer with `chosen` of `heads` heads on `expert`."""
    more = {"num_heads": heads} if heads != 4 else {}
    last = one_layer(chosen, heads, expert)
    return static(*layout(rest), last, route_by="head", **more, **model)


def by_head(
    *pattern: str, price: float, late: dict[str, float], controller: str = "", heads: int = 4
) -> dict[str, Any]:
    """Ours by head, from a layout, under a price of FLOPs; the KL of the heads is a sum."""
    made = started_on(*pattern, price=price, cost="flops", kl_weight=0.003 / heads, **late)
    made["contender"]["controller"] = controller
    made = by_the_head(made)
    if heads != 4:
        made["contender"]["changes"]["model"]["num_heads"] = heads
    return made


PRICES = (5, 10, 20, 40, 80)


def cheap(
    rest: str, reaching: tuple[int, ...], windows: tuple[int, ...], late: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Contenders at a tenth of full attention's FLOPs: `rest`, and a last layer that may look far.

    Static ones by layer, by head (four, and eight narrower ones), with one head of each window in
    `reaching`, and `local` alone with each of `windows`; routers by layer and by head, started on
    a layout that they leave as `late` says, and the same with a choice for all tokens of a head.
    """
    start = layout(rest + "f")
    return {
        **{f"static {name}": static(*layout(name)) for name in ("f", "gl", "l")},
        **{f"static {name}": static(*layout(name)) for name in (rest + "l", rest + "f")},
        **{f"static {rest}, {n} of 4 heads f": last_by_head(rest, n) for n in (1, 2, 3)},
        **{f"static {rest}, {n} of 8 heads f": last_by_head(rest, n, 8) for n in (1, 2)},
        **{
            f"static {rest}, 1 of 4 heads window {wide}": last_by_head(
                rest, 1, expert=f"window_{wide}"
            )
            for wide in reaching
        },
        **{f"static l, window {window}": static("local", window=window) for window in windows},
        f"softmax router, from {rest}f": softmax(OURS, {"start_experts": start, **late}, cost=0.03),
        **{
            f"ours, from {rest}f, price {price}": started_on(
                *start, price=float(price), cost="flops", **late
            )
            for price in PRICES
        },
        **{
            f"ours by head, from {rest}f, price {price}": by_head(
                *start, price=float(price), late=late
            )
            for price in PRICES
        },
        **{
            f"static heads learned, from {rest}f, price {price}": by_head(
                *start, price=float(price), late=late, controller="constant"
            )
            for price in PRICES
        },
        **{
            f"ours by head, from {rest}f, price {price}, straight-through": by_head(
                *start, price=float(price), late=late | {"straight_through_from": 0.8}
            )
            for price in PRICES
        },
        **{
            f"{name}, from {rest}f, price {price}": by_head(
                *start, price=float(price), late=late, heads=8, controller=controller
            )
            for name, controller in (
                ("ours by 8 heads", ""),
                ("static 8 heads learned", "constant"),
            )
            for price in PRICES
        },
        **{
            f"ours by head, from 1 of 4 heads f, price {price}": by_head(
                *layout(rest), one_layer(1), price=float(price), late=late
            )
            for price in PRICES
        },
    }


HEADS = cheap("gllll", (512, 1024), (80, 96, 128), LATE)
"""Costs in FLOPs at 2048 tokens: glllll .062, one head of four .101, two .140, three .179, one of
eight .076, a head of window 512 .078 and of 1024 .091, windows of 80, 96 and 128 .077, .092, .121.
"""
QUOTING = cheap("gll", (256, 512), (40, 48, 64), LATE | {"anneal_from": 0.6, "anneal_to": 0.9})
"""At 1024 tokens: glll .062, one head of four .121, two .180, three .238, one of eight .090, a head
of window 256 .086 and of 512 .106, windows of 40, 48 and 64 .077, .092, .121."""
RECIPE: dict[str, dict[str, Any]] = {
    "ours": SHORT["ours"],
    **{
        f"ours, price {price}": dirichlet(OURS, {"price": float(price)}, {})
        for price in (12, 15, 20)
    },
    "ours, from full attention, late": started_on("full", **LATE),
    "ours, from the hybrid": SHORT["ours, from the hybrid"],
    "ours, from the hybrid, late": started_on(*HYBRID, **LATE),
    "ours, prior mean by layer": dirichlet(OURS, {"layer_mean": favouring(*HYBRID)}, {}),
    "ours, learned feature map": dirichlet(["full", "mapped", "local"], {}, {}),
    "ours, short convolution": dirichlet(["full", "short_convolution", "local"], {}, {}),
    "ours, short convolution beside gated": dirichlet([*OURS, "short_convolution"], {}, {}),
    "ours, controller sees four tokens": dirichlet(OURS, {}, {}, "convolved"),
    "ours, controller sees the layer below": dirichlet(OURS, {}, {}, "chained"),
    "ours, one route for eight tokens": dirichlet(OURS, {}, {}, "segments"),
    "ours by head": by_the_head(dirichlet(OURS, {}, {"kl_weight": 0.003 / 4})),
    "ours by head, from the hybrid": by_the_head(started_on(*HYBRID, kl_weight=0.003 / 4)),
}
"""What was tried beside the recipe, at the size of the short study."""
HEADLINE = (
    "full attention",
    "gated linear",
    "static: gated, local, gated, full",
    "softmax router, cost penalty",
    "ours",
    "ours, from the hybrid",
    "local",
    "softmax router",
    "Dirichlet, literal ELBO, paper's experts",
    "Dirichlet, literal ELBO",
)
TOKENS = 16_384
"""A step of the size `long`."""
_LONG: dict[str, dict[str, Any]] = {
    "train": {"steps": 1000, "device": "cuda", "warmup": 100, "precision": "bfloat16"},
    "data": {"eval_tokens": 262_144, "context": 2048},
    "model": {"d_model": 256, "num_layers": 6, "num_heads": 4, "window": 64},
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpu": {"train": {"steps": 600, "device": "auto"}, "data": {"eval_tokens": 65_536}},
    "recipe": {"train": {"steps": 600, "device": "auto"}, "data": {"eval_tokens": 65_536}},
    "long": _LONG,
    "heads": _LONG,
    "quoting": {
        "train": {"steps": 1200, "device": "auto", "batch_size": 16, "precision": "bfloat16"},
        "data": {"eval_tokens": 131_072, "context": 1024},
    },
    "cpu": {
        "train": {"steps": 300, "device": "cpu", "warmup": 20},
        "data": {"eval_tokens": 16_384, "context": 128},
    },
    "toy": {
        "train": {"steps": 4, "device": "cpu", "batch_size": 2},
        "data": {"eval_tokens": 256, "context": 64},
        "model": {"d_model": 16, "num_heads": 4, "controller_hidden": 4},
    },
}


def contenders(size: str) -> dict[str, dict[str, Any]]:
    """Who takes part in a study of this size."""
    known = {"long": LONG, "recipe": RECIPE, "heads": HEADS, "quoting": QUOTING}
    every = {**SHORT, **LONG, **RECIPE, **HEADS, **QUOTING}
    return {**known, "toy": every}.get(size, SHORT)
