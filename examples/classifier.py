"""A text classifier with routed attention and a Bayesian head: which of two marks is in a text?

Run it: `python examples/classifier.py`. Routes and the weights of the head are latents of one Pyro
program; the guide of the routes is the library's, that of the head Pyro's AutoNormal. Weights are
drawn once a pass, routes for every token.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, autoguide
from pyro.nn import PyroModule, PyroSample

from bayes_router import (
    MetaController,
    ModelConfig,
    RoutedTransformer,
    RoutingELBO,
    RoutingGuide,
    RoutingModel,
)


class Classifier(PyroModule):
    """tokens [B, T] -> logits of the label, [B, 1, 2]: one row a text."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.body = RoutedTransformer(config)
        self.head = PyroModule[torch.nn.Linear](config.d_model, 2)
        self.head.weight = PyroSample(dist.Normal(0.0, 0.3).expand([2, config.d_model]).to_event(2))

    def forward(self, tokens, route):
        """The largest of each feature over the text, then the head."""
        return self.head(self.body.norm(self.body.hidden(tokens, route)).amax(1, keepdim=True))


def fit(steps=150):
    """The program and the guide, fitted; prints the loss."""
    config = ModelConfig(vocab_size=50, d_model=32, num_layers=2, window=4)
    prior = torch.tensor([[0.05, 0.25, 0.2]]).expand(2, 3)  # over full, gated and local attention
    model = RoutingModel(Classifier(config), prior, likelihood=lambda x: dist.Categorical(logits=x))
    head = autoguide.AutoNormal(pyro.poutine.block(model, expose=["head.weight"]), init_scale=0.05)
    guide = RoutingGuide(model, MetaController(32, num_layers=2, num_experts=3), rest=head)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 3e-3}), RoutingELBO(kl_weight=0.003))
    for step in range(steps):
        loss = svi.step(*texts(32))
        if step % 50 == 0:
            print(f"step {step:4}  loss {loss:.4f}")
    return model, guide


def texts(count):
    """Tokens [count, 24] with the mark 1 or 2 at one place each, and the labels [count, 1]."""
    tokens, labels = torch.randint(3, 50, (count, 24)), torch.randint(2, (count, 1))
    return tokens.scatter(1, torch.randint(24, (count, 1)), labels + 1), labels


if __name__ == "__main__":
    pyro.set_rng_seed(0)
    model, guide = fit()
    tokens, labels = texts(200)
    votes = Predictive(model, guide=guide, num_samples=20)(tokens)["targets"].float().mean(0)
    accuracy = float(((votes > 0.5) == labels).float().mean())
    print(f"accuracy of 20 posterior draws' vote on 200 texts: {accuracy:.3f}")
