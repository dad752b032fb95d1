"""The information of a route, the token's part and the context's, as planted."""

import math

import pytest
import torch

from bayes_router.routing.information import ByToken, context_information
from bayes_router.routing.posterior import categorical_entropy, route_information
from bayes_router.routing.statistics import routing_statistics


def planted(share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens 0..3, and routes over 2 experts.

    A lookup by the token, but for tokens 2 and 3: with `share` of the time the context decides.
    """
    torch.manual_seed(seed)
    tokens = torch.arange(4).repeat(4000)
    coin = torch.arange(4).repeat_interleave(4).repeat(1000) % 2  # of the context, even for each
    choice = torch.where(tokens >= 2, coin, tokens % 2)
    sharp = torch.nn.functional.one_hot(choice, 2).double()
    blunt = torch.full((2,), 0.5).double()
    p = torch.where((tokens >= 2)[:, None], share * sharp + (1 - share) * blunt, sharp)
    order = torch.randperm(len(tokens))
    return tokens[order], p[order]


def test_a_lookup_by_the_token_holds_nothing_of_the_context() -> None:
    tokens, p = planted(0.0)
    assert float(context_information(tokens, p)) == pytest.approx(0, abs=1e-12)
    assert float(route_information(p)) == pytest.approx(math.log(2) / 2)
    # of any lookup, and never below 0 by rounding
    of_token = torch.rand(50, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    index = torch.randint(4, (500,))
    assert (context_information(index, of_token[:, index]) >= 0).all()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_planted_context_is_measured(share: float) -> None:
    tokens, p = planted(share)
    # half of the tokens are told by the context: log 2 less the entropy of what it says
    said = torch.tensor([(1 + share) / 2, (1 - share) / 2], dtype=torch.float64)
    known = (math.log(2) - float(categorical_entropy(said))) / 2
    found = float(context_information(tokens, p))
    assert found == pytest.approx(known, abs=1e-12)
    # the rest is the token's, however much the context says
    assert float(route_information(p)) - found == pytest.approx(math.log(2) / 2, abs=1e-12)


def test_parts_of_a_text_are_as_the_whole() -> None:
    tokens = torch.randint(90, (3, 50))
    p = torch.softmax(torch.randn(2, 4, 3, 50, 3), -1).double()  # [L, R, B, T, E]
    seen = ByToken()
    for b in range(3):
        seen.add(tokens[b], p[:, :, b])
    whole = p.flatten(2, 3)
    direct = torch.zeros(2, 4).double()
    for token in tokens.unique():
        at = (tokens == token).flatten()
        direct += at.sum() / 150 * categorical_entropy(whole[:, :, at].mean(2))
    torch.testing.assert_close(seen.entropy(), direct)


@pytest.mark.parametrize("units", [1, 2])
def test_statistics_of_a_batch_say_what_is_of_the_context(units: int) -> None:
    tokens, p = planted(1.0)
    given = tokens.view(4, -1)
    q = (1000 * p + 1e-6).view(4, -1, 1, 2).expand(-1, -1, units, -1)
    choice, costs = q.argmax(-1), torch.tensor([1.0, 0.2])
    known = routing_statistics(q, choice, costs, ["full", "local"], given)
    assert known.context_information == pytest.approx(math.log(2) / 2, abs=1e-5)
    assert "information 0.693 nats, 0.347 of it of context;" in repr(known)
    unknown = routing_statistics(q, choice, costs, ["full", "local"])
    assert unknown.context_information is None and "of context" not in repr(unknown)
