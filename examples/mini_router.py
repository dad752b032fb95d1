"""The whole idea in one file: a Transformer whose tokens choose their attention.

Run it: `python examples/mini_router.py` fits two small layers to a speech, on one core in seconds.

    route[l, b, t]  ~  Dirichlet(concentration) exp(-price * cost . route) / Z     the prior
    h               <- h + W_o sum_e route_e Expert_e(q, k, v)                     the experts
    y[b, t]         ~  Categorical(logits[b, t])                                   the likelihood
    q(route | h)    =  Dirichlet(floor + softplus(controller(h)))                  the guide

The prior knows what attention costs; the experts share queries, keys and values; the guide is
amortised and never sees y. Read from top to bottom: experts, network, model, guide, objective,
execution. `bayes_router` is the same with kernels, a cache, schedules, patches for models made
elsewhere, and diagnostics.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.distributions import Dirichlet, kl_divergence, register_kl
from torch.nn import functional as F

VOCABULARY, D, LAYERS, HEADS, WINDOW = 128, 32, 2, 2, 8
COST = torch.tensor([1.00, 0.15, 0.30])  # of full, linear and local attention; full = 1
# of the prior: sparse, so that a draw is nearly one expert
CONCENTRATION = 0.5 * torch.softmax(-COST, -1)
PRICE, KL_WEIGHT, FLOOR = 2.0, 0.003, 0.01

# Three experts: (q, k, v) [B, H, T, Dh] -> what the queries at positions `at` read.


def softmax_attention(q, k, v, at, window):
    """Full attention, or over the last `window` keys."""
    # of key j to query t: not from the future, not too old
    age = at[:, None] - torch.arange(k.shape[2])
    seen = (age >= 0) & (age < window)
    scores = (q[:, :, at] @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def linear_attention(q, k, v, at):
    """sum_j phi(q_t) . phi(k_j) v_j over the past, normalised; phi = elu + 1."""
    phi_q, phi_k = F.elu(q[:, :, at]) + 1, F.elu(k) + 1
    # every token enters it, whatever its route
    state = torch.einsum("bhtd,bhte->bhtde", phi_k, v).cumsum(2)[:, :, at]
    total = phi_k.cumsum(2)[:, :, at]
    return torch.einsum("bhtd,bhtde->bhte", phi_q, state) / (
        (phi_q * total).sum(-1, keepdim=True) + 1e-6
    )


def rotate(x):
    """Rotary positions: the pair (i, i + Dh / 2) at position t turned by t / 10000^(2 i / Dh)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 10_000 ** (-torch.arange(half) / half)
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], -1)


class Layer(nn.Module):
    """Routed attention, then an MLP, each on a residual stream."""

    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(D), nn.RMSNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def experts(self, x):
        """Full, linear and local attention over the normalised x [B, T, D], each by positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).split(HEADS, 1)
        turned = rotate(q), rotate(k), v
        return (
            lambda at: softmax_attention(*turned, at, window=x.shape[1]),
            lambda at: linear_attention(q, k, v, at),
            lambda at: softmax_attention(*turned, at, window=WINDOW),
        )

    def attend(self, x, route):
        """Soft: weights [B, T, E] mix all experts. Hard: choices [T] of one text run theirs."""
        everyone = torch.arange(x.shape[1])
        if route.is_floating_point():
            mixed = sum(
                weight[:, None, :, None] * expert(everyone)
                for weight, expert in zip(route.unbind(-1), self.experts(x), strict=True)
            )
        else:
            mixed = x.new_zeros(1, HEADS, len(route), D // HEADS)
            for e, expert in enumerate(self.experts(x)):
                mixed[:, :, route == e] = expert(everyone[route == e])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Network(nn.Module):
    """tokens [B, T] -> logits [B, T, V]; `route(layer, x)` says how each layer attends."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, D), nn.RMSNorm(D)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        nn.init.normal_(self.embed.weight, std=D**-0.5)

    def forward(self, tokens, route):
        """See the class."""
        h = self.embed(tokens) * D**0.5
        for index, layer in enumerate(self.layers):
            x = layer.before_attention(h)
            h = h + layer.attend(x, route(index, x))
            h = h + layer.down(F.relu(layer.up(layer.before_mlp(h))).square())
        return self.norm(h) @ self.embed.weight.T


class Controllers(nn.Module):
    """The posterior of a token's route in each layer, from the token's own input to that layer."""

    def __init__(self):
        super().__init__()
        nets = (
            nn.Sequential(nn.Linear(D, 16), nn.SiLU(), nn.Linear(16, len(COST)))
            for _ in range(LAYERS)
        )
        self.layers = nn.ModuleList(nets)

    def posterior(self, layer, x):
        """Dirichlet, batch shape [B, T]."""
        return dist.Dirichlet(FLOOR + F.softplus(self.layers[layer](x)), validate_args=False)


class Priced(dist.Dirichlet):
    """Dirichlet(concentration) exp(-tilt . route), up to log Z, which no parameter moves."""

    def __init__(self, concentration, tilt):
        self.tilt = tilt
        super().__init__(concentration, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        """The same for all tokens."""
        return Priced(self.concentration.expand(*batch_shape, -1), self.tilt)

    def log_prob(self, value):
        """Log density, [...]."""
        return super().log_prob(value) - value @ self.tilt.to(value)


@register_kl(Dirichlet, Priced)
def kl_priced(q, p):
    """KL(q || Dirichlet) + tilt . E_q[route]: the expected cost is part of the KL."""
    return kl_divergence(q, Dirichlet(p.concentration, validate_args=False)) + q.mean @ p.tilt.to(
        q.mean
    )


class Router(nn.Module):
    """A Pyro model and its guide around one network."""

    def __init__(self):
        super().__init__()
        self.network, self.controllers = Network(), Controllers()

    def model(self, tokens, targets):
        """p(routes, targets | tokens).

        The KL weight w stands here as the power 1 / w of the likelihood: its loss is objective / w.
        """
        pyro.module("network", self.network)
        batch, token = (
            pyro.plate("batch", len(tokens), dim=-2),
            pyro.plate("token", tokens.shape[1], dim=-1),
        )

        def route(layer, x):
            with batch, token:
                return pyro.sample(
                    f"route_{layer}", Priced(CONCENTRATION, PRICE * COST).expand(x.shape[:2])
                )

        logits = self.network(tokens, route)
        with batch, token, poutine.scale(scale=1 / KL_WEIGHT):
            pyro.sample("targets", dist.Categorical(logits=logits), obs=targets)

    def guide(self, tokens, targets):
        """q(routes | tokens); runs the network too, as a layer's input hangs on routes below it."""
        pyro.module("controllers", self.controllers)
        batch, token = (
            pyro.plate("batch", len(tokens), dim=-2),
            pyro.plate("token", tokens.shape[1], dim=-1),
        )

        def route(layer, x):
            with batch, token:
                return pyro.sample(f"route_{layer}", self.controllers.posterior(layer, x))

        self.network(tokens, route)

    def loss(self, tokens, targets):
        """(nll + w KL) / tokens, in nats: the negative ELBO where w = 1, up to w log Z a layer."""
        elbo = TraceMeanField_ELBO().differentiable_loss(self.model, self.guide, tokens, targets)
        return KL_WEIGHT * elbo / tokens.numel()

    @torch.no_grad()
    def execute(self, tokens, hard=True):
        """Logits and choices [L, T] of one text [1, T]: a token takes the expert it favours."""
        choices = []

        def route(layer, x):
            mean = self.controllers.posterior(layer, x).mean
            choices.append(mean[0].argmax(-1))
            return choices[-1] if hard else mean

        logits = self.network(tokens, route)
        return logits, torch.stack(choices)


SPEECH = """Four score and seven years ago our fathers brought forth on this continent, a new
nation, conceived in Liberty, and dedicated to the proposition that all men are created equal. Now
we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so
dedicated, can long endure. We are met on a great battle-field of that war. We have come to
dedicate a portion of that field, as a final resting place for those who here gave their lives that
that nation might live. It is altogether fitting and proper that we should do this."""


def main(steps=200):
    """Fit by SVI, then execute the routes."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    text, router = torch.tensor(list(SPEECH.encode())), Router()
    svi = SVI(
        router.model, router.guide, pyro.optim.ClippedAdam({"lr": 5e-3}), TraceMeanField_ELBO()
    )
    for step in range(steps + 1):
        starts = torch.randint(len(text) - 64, (8,))
        window = text[starts[:, None] + torch.arange(65)]
        loss = KL_WEIGHT * svi.step(window[:, :-1], window[:, 1:]) / (8 * 64)
        if step % 50 == 0:
            print(f"step {step:4}  loss {loss:.3f} nats per token (the KL weighted by {KL_WEIGHT})")
    tokens, targets = text[None, :64], text[1:65]
    for hard in (False, True):
        logits, choices = router.execute(tokens, hard)
        nll = float(F.cross_entropy(logits[0], targets))
        print(f"{'argmax executed' if hard else 'mean of experts'}  nll {nll:.3f} nats per token")
    load = F.one_hot(choices, len(COST)).double().mean(1)
    for layer, share in enumerate(load.tolist()):
        print(f"layer {layer}: full {share[0]:.2f}  linear {share[1]:.2f}  local {share[2]:.2f}")
    cost = float((load @ COST.double()).mean())
    print(f"attention of the executed route costs {cost:.2f} of full attention")


if __name__ == "__main__":
    main()
