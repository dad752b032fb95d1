"""The passes of a patched model from which its uncertainty is read, text by text.

What they leave is a flat table of arrays, `PART/TEXT/NAME`, which `save` and `load` keep in a file:
figures and intervals are made from it without a model (`analysis.pretrained.uncertainty`).
Evidence and risk are fitted on the novels of the patch's own fit. What is read is text of the same
authors that no fit saw (`own`), text of other kinds, and the own text's tokens shuffled. Half of
the own windows, every second one, calibrate promise and guard; the other half are read.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from analysis.pretrained.authors import author_scores
from bayes_router.data.stream import TokenStream
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.evidence import token_scores
from bayes_router.diagnostics.measures.regret import (
    losses_of,
    other_targets,
    regret_row,
    seen_of,
    with_regret,
)
from bayes_router.files import write_whole
from bayes_router.integrations.huggingface.language import Unforced
from bayes_router.routing.policy import Policy, at_price
from bayes_router.routing.risk import RiskFit
from bayes_router.training.executed import Executed, execute
from bayes_router.training.guarantee import Single, Tested, keep_promise
from bayes_router.training.guarding import Guarded
from bayes_router.training.risk import fit_risk, risk_data
from bayes_router.transformer.nll import token_nll
from bayes_router.types import RoutingMode

ReadArrays = dict[str, np.ndarray]
AUTHORS = "authors"  # name of the scores of `author_scores` among texts
STRIDE = 8  # of the tokens of a window that are kept of what is read at each
TOGETHER = 8  # forced pairs that step together, each over a cache of its own
PRICES = (-40.0, -4.5, -1.6, 0.0, 0.8, 1.1, 1.3) + tuple(1.6 * 2 ** (i / 6) for i in range(15)) + (
    40.0,
)  # fmt: skip
"""Nats per unit of cost, from the strongest policy to the cheapest: fixed before any text."""


class PatchReading(NamedTuple):
    """How much is read."""

    context: int = 4096
    windows: int = 24  # of each text
    calibration: int = 54  # windows of the own text, for promise and guard
    batch: int = 4  # windows at a time
    tokens: int = 262_144  # to fit evidence on: a window of every novel
    risk: int = 98_304  # to fit risk on
    steps: int = RiskFit().steps  # of the network that estimates risk
    promises: tuple[float, ...] = (0.005, 0.01)
    forced: int = 2  # positions of a window at which routes are forced
    units: int = 32  # pairs of layer and unit at each
    prompt: int = 2048  # tokens before decoding
    decoded: int = 128
    rows: int = 8  # texts decoded together
    seconds: float = math.inf  # no part begins later


@dataclass
class Study:
    """A patch and the windows that it is read on.

    Attributes:
        router: the patch, at the policy that it was saved with.
        fit: token ids that evidence and risk are fitted on.
        calibration: windows of the own text.
        texts: windows by text, `own` first.
        author: whose each token of `fit` is, where that is known.
    """

    router: Any
    fit: Tensor
    calibration: list[Batch]
    texts: dict[str, list[Batch]]
    plan: PatchReading
    author: Tensor | None = None

    @classmethod
    def of(
        cls, router: Any, ids: Mapping[str, np.ndarray], plan: PatchReading, seed: int = 0
    ) -> "Study":
        """From token ids by name, as `analysis.pretrained.texts` names them."""
        held = {name: torch.from_numpy(some.astype(np.int64)) for name, some in ids.items()}
        own, context = held.pop("own novels"), plan.context
        calibration = windows_of(own, plan.calibration, plan.batch, context, 0)
        texts = {"own": windows_of(own, plan.calibration, plan.batch, context, 1)}
        for name, some in held.items():
            role, kind = name.split(" ", 1)
            if role in ("read", "other"):
                kind = "novels by others" if kind == "novels" else kind
                texts[kind] = windows_of(some, plan.windows, plan.batch, context, 1)
        rows = torch.cat([batch.tokens for batch in texts["own"]])[: plan.windows]
        order = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(seed))
        mixed = rows.flatten()[order].view_as(rows).split(plan.batch)
        texts["shuffled"] = [Batch(part, part.roll(-1, 1)) for part in mixed]
        author = held.get("author novels")
        return cls(router, held["fit novels"], calibration, texts, plan, author)

    @property
    def costs(self) -> tuple[float, ...]:
        """Of the experts, over layers."""
        return tuple(self.router.cost_ratio.tolist())

    def by_window(self, batches: list[Batch], policy: Policy) -> tuple[Executed, np.ndarray]:
        """What a policy did, and the executed cost of each window."""
        routed, cost, read, paid = Unforced(self.router), self.router.layer_cost, [], []
        for batch in batches:
            found = execute(routed, [batch], cost, RoutingMode.HARD, policy, math.nan)
            shares = [(found.route == e).double().mean((2, 3)) for e in range(cost.shape[1])]
            by_layer = torch.stack(shares, -1).cpu() * cost.cpu().double()[:, None]  # [L, B, E]
            paid.append(by_layer.sum(-1).mean(0))
            read.append(found.reading)
        each = torch.cat(paid)
        nll, scored = (torch.cat([getattr(r, f"window_{n}") for r in read]) for n in NLL)
        load = torch.stack([r.load for r in read]).mean(0)
        return Executed(math.nan, float(each.mean()), load, nll, scored), each.numpy()


NLL = ("nll", "scored")


def windows_of(ids: Tensor, count: int, batch: int, context: int, skip: int) -> list[Batch]:
    """`count` windows, evenly spread over a text, those of even number or (with `skip`) of odd."""
    starts = torch.linspace(0, len(ids) - context - 2, 2 * count).long()[skip::2]
    rows = torch.stack([ids[s : s + context + 1] for s in starts])
    return [Batch(part[:, :-1], part[:, 1:]) for part in rows.split(batch)]


def flat(batches: list[Batch]) -> Tensor:
    """The windows' tokens one after another, and one more."""
    return torch.cat([*(batch.tokens.flatten() for batch in batches), batches[-1].targets[-1, -1:]])


def evidence(study: Study) -> ReadArrays:
    """Density of the fit's text, then how foreign each token of each text is.

    Before it, where the authors of the fit's novels are known, each of them to a density of others.
    """
    plan, router, found = study.plan, study.router, ReadArrays()
    if study.author is not None:
        sizes = plan.context, plan.batch, plan.tokens // 2, STRIDE
        scores = author_scores(router, study.fit, study.author, *sizes)
        found |= {f"{AUTHORS}/{name}": x.astype(np.float16) for name, x in scores.items()}
    router.fit_evidence(study.fit, context=plan.context, batch_size=plan.batch, tokens=plan.tokens)
    for name, batches in study.texts.items():
        for score, x in token_scores(router, flat(batches), plan.context).items():
            kept = x if score == "passage" else x[:, ::STRIDE]
            found[f"{name}/{score}"] = kept.astype(np.float16)
    return found


def risk(study: Study) -> ReadArrays:
    """A head fitted on the fit's text, its estimate, the true KL and the entropy by text."""
    plan, router, found = study.plan, study.router, {}
    stream = TokenStream(study.fit, router.config.vocab_size)
    windows = stream.windows(plan.context, plan.batch, plan.risk, spread=True)
    settings = RiskFit(steps=plan.steps)
    head = fit_risk(router, windows, router.unrouted, tokens=plan.risk, settings=settings)
    for name, batches in study.texts.items():
        parts = [(head(d.features), d.kl, d.features[..., -2]) for d in each(study, batches)]
        for key, part in zip(("estimate", "kl", "entropy"), zip(*parts, strict=True), strict=True):
            each_token = torch.cat(part).float().cpu().numpy()
            found[f"{name}/{key}"] = each_token[:, ::STRIDE]
            found[f"{name}/{key} mean"] = each_token.mean(1)
    return found


def each(study: Study, batches: list[Batch]) -> list[Any]:
    """Features and true KL of each batch."""
    router = study.router
    return [risk_data(router, [one], router.unrouted, one.tokens.numel()) for one in batches]


def quality(study: Study) -> ReadArrays:
    """What every price does to own text, calibration and the rest, and to texts of other kinds."""
    family, found = at_price("argmax", study.costs), {"prices": np.array(PRICES)}
    read = {"calibration": study.calibration, **study.texts}
    full = Single(study.router.experts.index("full"))
    for name in ("calibration", "own", "wikitext", "python"):
        rows = [study.by_window(read[name], policy) for policy in (full, *map(family, PRICES))]
        found[f"{name}/nll"] = np.stack([r.window_nll.numpy() for r, _ in rows])
        found[f"{name}/scored"] = rows[0][0].window_scored.numpy()
        found[f"{name}/cost"] = np.stack([cost for _, cost in rows])
    return found


def looked_up(found: Mapping[str, np.ndarray], name: str, rows: Any = slice(None)) -> Any:
    """Price -> its reading of a text, the first being full attention, of windows `rows`."""
    nll, cost = found[f"{name}/nll"][:, rows], found[f"{name}/cost"][:, rows]
    scored = torch.from_numpy(found[f"{name}/scored"][rows])

    def read(index: int) -> Executed:
        window = torch.from_numpy(nll[index])
        return Executed(math.nan, float(cost[index].mean()), torch.zeros(1, 2), window, scored)

    return read(0), {price: read(i + 1) for i, price in enumerate(found["prices"].tolist())}


def guard(study: Study, prices: Mapping[str, np.ndarray]) -> ReadArrays:
    """At the price of each promise: every text bare, guarded and on full attention."""
    router, plan, found = study.router, study.plan, {}
    full = Single(router.experts.index("full"))
    whole = {name: study.by_window(batches, full) for name, batches in study.texts.items()}
    for lost in plan.promises:
        kept, bare, set_to = guarded_at(study, prices, lost)
        found[f"{lost}/set"] = np.array([kept.price, kept.bound, set_to.share, set_to.bound])
        for name, batches in study.texts.items():
            read = {"full": whole[name], "bare": study.by_window(batches, bare)}
            read["guard"] = study.by_window(batches, set_to.policy)
            for policy, (reading, cost) in read.items():
                key = f"{lost}/{name}/{policy}"
                found[f"{key}/nll"], found[f"{key}/cost"] = reading.window_nll.numpy(), cost
            found[f"{lost}/{name}/scored"] = whole[name][0].window_scored.numpy()
    return found


def guarded_at(
    study: Study, prices: Mapping[str, np.ndarray], lost: float
) -> tuple[Tested, Policy, Guarded]:
    """(the promise kept, the policy at its price, the guard before it), the guard in force."""
    router, ids = study.router, flat(study.calibration)
    base, known = looked_up(prices, "calibration")
    kept = keep_promise(known.__getitem__, base, lost, 0.95, PRICES).kept
    bare = router.policy = at_price("argmax", study.costs)(kept.price)
    set_to = router.set_guard(ids, context=study.plan.context, limit=len(ids) - 1)
    print(f"promise {lost}: price {kept.price}, bound {kept.bound:.4f}; {set_to}", flush=True)
    return kept, bare, set_to


@torch.no_grad()
def decoding(study: Study, prices: Mapping[str, np.ndarray]) -> ReadArrays:
    """Token by token behind a prompt under the last promise's guard; beside it one pass."""
    router, plan, found = study.router, study.plan, {}
    guarded_at(study, prices, plan.promises[-1])
    device, cost = router.device, router.layer_cost.double()
    end = plan.prompt + plan.decoded
    for name in ("own", "wikitext", "python"):
        rows = torch.cat([batch.tokens for batch in study.texts[name]])[: plan.rows, : end + 1]
        tokens, targets = rows[:, :-1].to(device), rows[:, 1:].to(device)
        whole = router(tokens, RoutingMode.HARD, use_cache=False)
        cache, parts = DynamicCache(), [slice(0, plan.prompt)]
        parts += [slice(t, t + 1) for t in range(plan.prompt, end)]
        nll, route = [], []
        for part in parts:
            out = router(tokens[:, part], RoutingMode.HARD, past_key_values=cache, use_cache=True)
            if part.start:
                nll.append(token_nll(out.logits, targets[:, part]).double())
                route.append(out.route)
        routes, late = torch.cat(route, 2), slice(plan.prompt, end)
        by_layer = torch.stack([cost[i].to(device)[r] for i, r in enumerate(routes)])
        full = token_nll(router.unrouted(tokens)[:, late], targets[:, late])
        of = {
            "nll": torch.cat(nll, 1).sum(1),
            "nll one pass": token_nll(whole.logits[:, late], targets[:, late]).sum(1),
            "nll full": full.sum(1),
            "cost": by_layer.mean((0, 2, 3)),
            "as one pass": (routes == whole.route[:, :, late]).double().mean((0, 2, 3)),
            "decoded": torch.tensor(plan.decoded),
        }
        found |= {f"{name}/{key}": x.double().cpu().numpy() for key, x in of.items()}
    return found


@torch.no_grad()
def confidence(study: Study) -> ReadArrays:
    """Regret of forced routes, in float32: what one head's route changes, bfloat16 does not hold.

    A token's route changes nothing before it, so that one pass with a cache gives the keys and
    values of a window, and a step over the cut cache the loss under each route.
    """
    router, found = study.router, {}
    router.model.float()
    halves = {"calibration": study.calibration, "own": study.texts["own"]}
    for name in ("calibration", "own", "novels by others", "python"):
        batches = halves.get(name) or study.texts[name]
        frame = regret_of(study, torch.cat([batch.tokens for batch in batches]))
        found |= {f"{name}/{c}": np.array(frame[c].tolist()) for c in frame}
    return found


def regret_of(study: Study, windows: Tensor, seed: int = 0) -> pd.DataFrame:
    """As `routing_regret` has it, of windows [W, T]; positions at which `local` differs."""
    router, plan, rows = study.router, study.plan, []
    experts, random = list(router.experts), np.random.default_rng(seed)
    first = router.settings.window + router.settings.sinks
    for sequence, ids in enumerate(windows.to(router.device)):
        cache = DynamicCache()
        out = router(ids[None], RoutingMode.HARD, past_key_values=cache, use_cache=True)
        L, _, T, R = out.route.shape
        seen = seen_of(out.logits[0], ids)
        for t in sorted(random.choice(np.arange(first, T - 1), plan.forced, replace=False)):
            pairs = [divmod(int(p), R) for p in random.choice(L * R, plan.units, replace=False)]
            logits = torch.cat([
                step_logits(router, cache, ids, int(t), out.route[:, :, t], pairs[i : i + TOGETHER])
                for i in range(0, len(pairs), TOGETHER)
            ])  # fmt: skip
            loss = losses_of(logits, ids[t + 1].expand(len(pairs))).cpu()
            taken = torch.tensor([int(out.route[layer, 0, t, unit]) for layer, unit in pairs])
            redrawn = other_targets(logits, taken, sequence * T + int(t))
            log_p = out.logits[0, t].double().log_softmax(-1)
            entropy = float(-(log_p.exp() * log_p).sum())
            for i, (layer, unit) in enumerate(pairs):
                where = {"sequence": sequence, "position": int(t), "layer": layer, "unit": unit}
                q = out.concentration[layer, 0, t, unit].double().cpu()
                row = regret_row(experts, int(taken[i]), loss[i], q, entropy)
                row |= {name: float(x[t]) for name, x in seen.items()}
                rows.append(where | row | {name: float(x[i]) for name, x in redrawn.items()})
    return with_regret(pd.DataFrame(rows), experts)


def step_logits(
    router: Any, cache: Any, ids: Tensor, t: int, choice: Tensor, pairs: list[tuple[int, int]]
) -> Tensor:
    """Logits of the token after `t` under every expert of each (layer, unit), [P, E, V].

    The choice [L, 1, R] is that of all others.
    """
    E, n = len(router.experts), len(pairs) * len(router.experts)
    forced = choice[:, :, None].repeat(1, n, 1, 1)  # [L, P E, 1, R]
    for i, (layer, unit) in enumerate(pairs):
        forced[layer, i * E : (i + 1) * E, 0, unit] = torch.arange(E, device=choice.device)
    cut = DynamicCache()
    for i, layer in enumerate(cache.layers):
        keys, values = (x[:, :, :t].expand(n, -1, -1, -1) for x in (layer.keys, layer.values))
        cut.update(keys, values, i)
    step = ids[t : t + 1].expand(n, 1)
    logits = router(step, force=forced, past_key_values=cut, use_cache=True).logits[:, -1]
    return logits.unflatten(0, (-1, E))


PARTS: dict[str, Callable[..., ReadArrays]] = {
    "evidence": evidence, "risk": risk, "quality": quality, "guard": guard,
    "decoding": decoding, "confidence": confidence,
}  # fmt: skip


def read(study: Study, parts: list[str], file: Path) -> ReadArrays:
    """Every part's arrays, added to those that the file has of other parts."""
    found, begun = load(file), time.monotonic()
    for part in (part for part in PARTS if part in parts):
        if time.monotonic() - begun > study.plan.seconds:
            print(f"{part}: no time left", flush=True)
            continue
        given = (of(found, "quality"),) if part in ("guard", "decoding") else ()
        new = {f"{part}/{key}": x for key, x in PARTS[part](study, *given).items()}
        found = {key: x for key, x in found.items() if not key.startswith(f"{part}/")} | new
        save(file, found)
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    return found


def of(found: Mapping[str, np.ndarray], prefix: str) -> ReadArrays:
    """The arrays below a prefix, without it."""
    return {k[len(prefix) + 1 :]: x for k, x in found.items() if k.startswith(f"{prefix}/")}


def save(file: Path, found: ReadArrays) -> None:
    """To a file of arrays."""
    write_whole(
        file, lambda path: np.savez_compressed(path.open("wb"), allow_pickle=False, **found)
    )


def load(file: Path) -> ReadArrays:
    """What a file has; nothing where there is none."""
    if not file.is_file():
        return {}
    with np.load(file) as held:
        return {name: held[name] for name in held.files}
