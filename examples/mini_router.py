"""The whole idea in one file: a Transformer whose tokens choose their attention.

Run it: `python examples/mini_router.py` fits two small layers to a speech, on one core in seconds.

    route[l, b, t]  ~  Dirichlet(concentration) exp(-price * cost . route) / Z     the prior
    h               <- h + W_o sum_e route_e Expert_e(q, k, v)                     the experts
    y[b, t]         ~  Categorical(logits[b, t])                                   the likelihood
    q(route | h)    =  Dirichlet(floor + softplus(controller(h)))                  the guide

The prior knows what attention costs; the experts share queries, keys and values; the guide is
amortised and never sees y. Read from top to bottom: experts, network, prior, model and guide,
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
CONCENTRATION = 0.5 * torch.softmax(-COST, -1)  # sparse: a draw of the prior is nearly one expert
PRICE, KL_WEIGHT, FLOOR = 2.0, 0.003, 0.01

# Three experts: (q, k, v) [B, H, T, Dh] -> what the queries at positions `at` read.


def softmax_attention(q, k, v, at, window):
    """Over the last `window` keys: local attention, or full where that is all of them."""
    age = at[:, None] - torch.arange(k.shape[2])  # of key j when query t reads it; < 0: the future
    scores = q[:, :, at] @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill((age < 0) | (age >= window), -math.inf).softmax(-1) @ v


def linear_attention(q, k, v, at):
    """sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j) over the past; phi = elu + 1."""
    phi_q, phi_k = F.elu(q[:, :, at]) + 1, F.elu(k) + 1
    v_and_one = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = (phi_k[..., None] * v_and_one[..., None, :]).cumsum(2)  # every token's, any route
    read = (phi_q[..., None, :] @ state[:, :, at]).squeeze(-2)
    return read[..., :-1] / (read[..., -1:] + 1e-6)


def rotate(x):
    """Rotary positions: the pair (i, i + Dh / 2) at position t turned by t / 10000^(2 i / Dh)."""
    first, second = x.chunk(2, -1)
    half = first.shape[-1]
    angle = torch.arange(x.shape[2])[:, None] * 10_000 ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


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
        mixed = x.new_zeros(len(x), HEADS, x.shape[1], D // HEADS)
        for e, expert in enumerate(self.experts(x)):
            if route.is_floating_point():
                mixed = mixed + route[:, None, :, e, None] * expert(everyone)
            else:
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


class Priced(dist.Dirichlet):
    """Dirichlet(concentration) exp(-tilt . route), up to log Z, which no parameter moves."""

    def __init__(self, concentration, tilt):
        self.tilt = tilt
        super().__init__(concentration, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        """The same for all tokens; a plate asks for it."""
        return Priced(self.concentration.expand(*batch_shape, -1), self.tilt)

    def log_prob(self, value):
        """Log density, [...]."""
        return super().log_prob(value) - value @ self.tilt.to(value)


@register_kl(Dirichlet, Priced)
def kl_priced(q, p):
    """KL(q || Dirichlet) + tilt . E_q[route]: the expected cost is part of the KL."""
    untilted = Dirichlet(p.concentration, validate_args=False)
    return kl_divergence(q, untilted) + q.mean @ p.tilt.to(q.mean)


class Router(nn.Module):
    """A Pyro model and its guide around one network."""

    def __init__(self):
        super().__init__()
        self.network, self.controllers = Network(), nn.ModuleList()
        for _ in range(LAYERS):
            net = nn.Sequential(nn.Linear(D, 16), nn.SiLU(), nn.Linear(16, len(COST)))
            self.controllers.append(net)

    def posterior(self, layer, x):
        """q(route | x), batch shape [B, T]: from the token's own input to that layer."""
        concentration = FLOOR + F.softplus(self.controllers[layer](x))
        return dist.Dirichlet(concentration, validate_args=False)

    def model(self, tokens, targets):
        """p(routes, targets | tokens); w = KL_WEIGHT is the power 1 / w of the likelihood."""
        pyro.module("network", self.network)
        batch, token = plates(tokens)

        def route(layer, x):
            with batch, token:
                return pyro.sample(f"route_{layer}", Priced(CONCENTRATION, PRICE * COST))

        logits = self.network(tokens, route)
        with batch, token, poutine.scale(scale=1 / KL_WEIGHT):
            pyro.sample("targets", dist.Categorical(logits=logits), obs=targets)

    def guide(self, tokens, targets):
        """q(routes | tokens); runs the network too: a layer's input hangs on the routes below."""
        pyro.module("controllers", self.controllers)
        batch, token = plates(tokens)

        def route(layer, x):
            with batch, token:
                return pyro.sample(f"route_{layer}", self.posterior(layer, x))

        self.network(tokens, route)

    @torch.no_grad()
    def execute(self, tokens, hard=True):
        """Logits and choices [L, T] of one text [1, T]: a token takes the expert it favours."""
        choices = []

        def route(layer, x):
            mean = self.posterior(layer, x).mean
            choices.append(mean[0].argmax(-1))
            return choices[-1] if hard else mean

        return self.network(tokens, route), torch.stack(choices)


def plates(tokens):
    """Texts and tokens are independent given what they condition on."""
    B, T = tokens.shape
    return pyro.plate("batch", B, dim=-2), pyro.plate("token", T, dim=-1)


SPEECH = """Four score and seven years ago our fathers brought forth on this continent, a new
nation, conceived in Liberty, and dedicated to the proposition that all men are created equal. Now
we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so
dedicated, can long endure. We are met on a great battle-field of that war."""


def main(steps=200):
    """Fit by SVI, then execute the routes."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    text, router = torch.tensor(list(SPEECH.encode())), Router()
    adam = pyro.optim.ClippedAdam({"lr": 5e-3})
    svi = SVI(router.model, router.guide, adam, TraceMeanField_ELBO())
    for step in range(steps + 1):
        window = text[torch.randint(len(text) - 64, (8, 1)) + torch.arange(65)]
        negative_elbo = svi.step(window[:, :-1], window[:, 1:])  # (nll + w KL) / w, all tokens'
        if step % 50 == 0:
            loss = KL_WEIGHT * negative_elbo / (8 * 64)
            print(f"step {step:4}  loss {loss:.3f} nats per token (the KL weighted by {KL_WEIGHT})")
    for hard in (False, True):
        logits, choices = router.execute(text[None, :64], hard)
        nll = float(F.cross_entropy(logits[0], text[1:65]))
        print(f"{'argmax executed' if hard else 'mean of experts'}  nll {nll:.3f} nats per token")
    load = F.one_hot(choices, len(COST)).double().mean(1)  # [L, E]
    for layer, (full, linear, local) in enumerate(load.tolist()):
        print(f"layer {layer}: full {full:.2f}  linear {linear:.2f}  local {local:.2f}")
    cost = float((load @ COST.double()).mean())
    print(f"attention of the executed route costs {cost:.2f} of full attention")


if __name__ == "__main__":
    main()
