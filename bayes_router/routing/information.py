"""How much of what a route knows is more than the token at hand.

Between token and route of a text there are `route_information` nats. A route that is looked up by
the token's identity x holds them all without a look at the text before it. With p_t the posterior
mean of token t, and H the entropy:

    I(context; choice | x) = sum_x n_x / N H(mean of p_t over the n_x tokens x) - mean H(p_t)

0 where the route is a lookup by the token; the rest of the route information,
`route_information` - I(context; choice | x), is I(x; choice). An identity that is seen once shows
no context, so that a short text of a large vocabulary is told too little.
"""

import torch
from torch import Tensor

from bayes_router.routing.posterior import categorical_entropy


class ByToken:
    """Sums of distributions over experts by token identity, over a text of any length."""

    def __init__(self) -> None:
        self.ids = torch.empty(0, dtype=torch.int64)  # those seen, sorted
        self.count = torch.empty(0, dtype=torch.float64)
        self.mean: Tensor | None = None  # [ids, ..., E], sums

    def add(self, tokens: Tensor, probability: Tensor) -> None:
        """Take in `probability` [..., N, E] of the tokens [N]."""
        ids, index = tokens.flatten().cpu().unique(return_inverse=True)
        rows = probability.detach().double().cpu().movedim(-2, 0)  # [N, ..., E]
        mean = rows.new_zeros(len(ids), *rows.shape[1:]).index_add_(0, index, rows)
        count = index.bincount(minlength=len(ids)).double()
        if self.mean is None:
            self.ids, self.count, self.mean = ids, count, mean
            return
        both, index = torch.cat([self.ids, ids]).unique(return_inverse=True)
        sums = mean.new_zeros(len(both), *mean.shape[1:])
        self.mean = sums.index_add_(0, index, torch.cat([self.mean, mean]))
        old = torch.cat([self.count, count])
        self.ids, self.count = both, old.new_zeros(len(both)).index_add_(0, index, old)

    def entropy(self) -> Tensor:
        """H(choice | token), [...] nats: of each token's mean, by how often it was seen."""
        assert self.mean is not None
        shape = (-1, *(1 for _ in self.mean.shape[1:]))
        found = categorical_entropy(self.mean / self.count.view(shape))  # [ids, ...]
        return (found * self.count.view(shape[:-1])).sum(0) / self.count.sum()


def context_information(tokens: Tensor, probability: Tensor) -> Tensor:
    """I(context; choice | token) of one text, [...] nats; see the module.

    `probability` [..., N, E] is the distribution over experts of each of the N `tokens` [N].
    """
    seen = ByToken()
    seen.add(tokens, probability)
    mean = categorical_entropy(probability.double().cpu()).mean(-1)
    return (seen.entropy() - mean).clamp_min(0.0)  # below 0 by rounding alone
