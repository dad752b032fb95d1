"""What does routing lose at this token?

An estimate of KL(reference || routed) from what the routed pass knows.

The reference is the model as it was before a patch, or, of a run trained from scratch, its
strongest static choice. A small network reads the last hidden state, the mean route of each layer
and the entropy of the prediction, and answers with log KL; a factor brings the mean of its
estimates to that of the fit's text, which the exponential of a mean logarithm falls short of.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_router.checks import require
from bayes_router.routing.posterior import categorical_entropy, posterior_mean

WIDTH = 256
LEAST_KL = 1e-6  # nats: what float32 softmaxes of two equal passes differ by


def risk_features(hidden: Tensor, concentration: Tensor, logits: Tensor) -> Tensor:
    """What a routed pass knows of its tokens, [B, T, F], float32.

    Args:
        hidden: [B, T, D], what the head of the model reads.
        concentration: [L, B, T, E], or [L, B, T, R, E], whose mean over units is taken.
        logits: [B, T, V].
    """
    mean = posterior_mean(concentration)
    mean = mean if mean.dim() == 4 else mean.mean(-2)
    gates = mean.permute(1, 2, 0, 3).flatten(2)  # [B, T, L E]
    entropy = categorical_entropy(logits.float().softmax(-1)).unsqueeze(-1)
    parts = (hidden, gates, entropy, (entropy + 1e-3).log())
    return torch.cat([part.detach().to(hidden.device, torch.float32) for part in parts], -1)


class RiskFit(NamedTuple):
    """How a head is trained."""

    steps: int = 1500
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0
    width: int = WIDTH


class RiskHead(nn.Module):
    """Features [..., F] -> estimated KL [...], nats, of tokens like those of its fit."""

    mean: Tensor  # [F]
    scale: Tensor  # [F]
    factor: Tensor  # []

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(features, 1)
        self.body = nn.Sequential(
            nn.Linear(features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        for name, value in (
            ("mean", torch.zeros(features)),
            ("scale", torch.ones(features)),
            ("factor", torch.tensor(1.0)),
        ):
            self.register_buffer(name, value)

    def log_kl(self, features: Tensor) -> Tensor:
        """The mean of log KL, before the factor."""
        x = (features - self.mean) / self.scale
        out: Tensor = (self.linear(x) + self.body(x)).squeeze(-1)
        return out

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.factor * self.log_kl(features).clamp_max(20).exp()

    @classmethod
    def fit(cls, features: Tensor, kl: Tensor, settings: RiskFit | None = None) -> "RiskHead":
        """Least squares on log KL of features [N, F] and kl [N].

        The caller's generator is left as it was.

        Raises:
            ValueError: too few tokens, or routing changed nothing.
        """
        settings = settings or RiskFit()
        require(len(kl) >= 64, "texts", "at least 64 tokens", len(kl), "give more text")
        require(
            float(kl.max()) > LEAST_KL,
            "texts",
            "tokens at which routing changes the prediction",
            "none",
            "set a budget",
        )
        target = kl.clamp_min(LEAST_KL).log()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            head, order = (
                cls(features.shape[1], settings.width).to(features.device),
                torch.Generator().manual_seed(settings.seed),
            )
            head.mean.copy_(features.mean(0))
            spread = features.std(0)
            head.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))
            nn.init.constant_(head.linear.bias, float(target.mean()))
            nn.init.zeros_(head.linear.weight)
            optimiser = torch.optim.AdamW(
                head.parameters(), settings.lr, weight_decay=settings.weight_decay
            )
            for step in range(settings.steps):
                optimiser.param_groups[0]["lr"] = (
                    settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
                )
                rows = torch.randint(len(kl), (settings.batch_size,), generator=order)
                rows = rows.to(features.device)
                loss = (head.log_kl(features[rows]) - target[rows]).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            head.factor.copy_(kl.mean() / head(features).mean())
        return head.requires_grad_(False).eval()


class Risk:
    """A fitted head as it is kept beside a controller.

    No module, so that no optimiser or state dict of the model sees it.
    """

    def __init__(self, head: RiskHead):
        self.head = head.requires_grad_(False).eval()

    def __call__(self, features: Tensor) -> Tensor:
        """Features [..., F] -> estimated KL [...], nats, where the features are."""
        risk: Tensor = self.head.to(features.device)(features)
        return risk
