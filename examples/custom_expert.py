"""A mechanism of your own in a routed language model: the average of all values so far.

Run it: `python examples/custom_expert.py`. The text repeats itself, so that some tokens need to
look back and others do not; the router learns which, at the prices that the experts name.
"""

import torch

from bayes_router import (
    Expert,
    ModelConfig,
    RoutedLanguageModel,
    RoutingELBO,
    RoutingGuide,
    RoutingModel,
    register_expert,
)

EXPERTS = ("full", "running_mean", "local")
SENTENCE = "Four score and seven years ago our fathers brought forth a new nation. "


@register_expert("running_mean")
class RunningMean(Expert):
    """The average of all values so far."""

    cost_ratio = 0.05  # of full attention's

    def forward(self, q, k, v):
        """Q [B, H, Tq, Dh]; k, v [B, Hkv, Tk, Dh]; the queries are the last Tq positions."""
        counts = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        mean = (v.cumsum(2) / counts)[:, :, -q.shape[2] :]
        return mean.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def flops_per_token(self, context):
        """One addition and one division a value."""
        return 2 * self.shape.num_heads * self.shape.head_dim


def main(steps=150):
    """Fit; the losses, and the share of tokens that each expert takes."""
    torch.manual_seed(0)
    text = torch.tensor(list((SENTENCE * 60).encode()))
    config = ModelConfig(d_model=32, num_layers=2, num_heads=2, window=8, experts=EXPERTS)
    lm = RoutedLanguageModel(config)
    model = RoutingModel(lm.network, torch.full((2, 3), 0.17), torch.tensor([1.0, 0.05, 0.3]), 5.0)
    elbo = RoutingELBO(kl_weight=0.003)(model, RoutingGuide(model, lm.controller))
    windows, losses = text[: len(text) // 65 * 65].view(-1, 65), []
    optimiser = torch.optim.AdamW(elbo.parameters(), lr=3e-3)
    for step in range(steps):
        batch = windows[torch.arange(8 * step, 8 * step + 8) % len(windows)]
        loss = elbo(batch[:, :-1], batch[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        route = lm(windows[:8], mode="hard").route
    load = torch.bincount(route.flatten(), minlength=len(EXPERTS)) / route.numel()
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} nats per token, the KL weighted")
    for name, share in zip(EXPERTS, load.tolist(), strict=True):
        print(f"{name} {share:.0%}")
    return losses, load


if __name__ == "__main__":
    main()
