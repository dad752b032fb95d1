import sys
import types

import pytest
import torch
from pyro.infer import Predictive

from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.measures.inference_data import draw_groups, to_inference_data
from bayes_router.routing.posterior import posterior_mean
from tests.diagnostics.toy import THETA, MixtureNetwork, toy

PRIOR, GUIDE = torch.tensor([[1.0, 1.5]]), torch.tensor([[4.0, 1.2]])
TOKENS, TARGETS = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, 2], [2, 1, 0]])


def test_groups_are_draws_of_guide_and_prior():
    program, guide = toy(MixtureNetwork(), PRIOR, GUIDE)
    state = torch.get_rng_state()
    groups = draw_groups(program, guide, TOKENS, TARGETS, draws=400)
    assert torch.equal(state, torch.get_rng_state())
    route = groups["posterior"]["route_0"]
    assert route.shape == (1, 400, 2, 3, 2)
    assert route.mean((0, 1, 2, 3)) == pytest.approx(posterior_mean(GUIDE[0]).numpy(), abs=0.02)
    assert groups["prior"]["route_0"].mean((0, 1, 2, 3)) == pytest.approx(
        posterior_mean(PRIOR[0]).numpy(), abs=0.03
    )
    expected = (
        (torch.from_numpy(route[0]) @ THETA)
        .log()
        .gather(-1, TARGETS.expand(400, 2, 3).unsqueeze(-1))
        .squeeze(-1)
    )
    torch.testing.assert_close(
        torch.from_numpy(groups["log_likelihood"]["targets"][0]), expected, atol=1e-5, rtol=1e-5
    )
    assert groups["posterior_predictive"]["targets"].shape == (1, 400, 2, 3)


def test_predictive_works_with_the_pair_of_a_run(finished_run):
    run = load_fitted(finished_run)
    tokens = torch.randint(97, 122, (1, 9))
    draws = Predictive(
        run.program, guide=run.guide, num_samples=3, return_sites=["route_0", "targets"]
    )(tokens)
    assert draws["route_0"].shape == (3, 1, 9, 3) and draws["targets"].shape == (3, 1, 9)


def test_arviz_reads_it():
    pytest.importorskip("arviz")
    program, guide = toy(MixtureNetwork(), PRIOR, GUIDE)
    data = to_inference_data(program, guide, TOKENS, TARGETS, ["full", "local"], draws=20)
    route = data["posterior"]["route_0"]
    assert route.dims == ("chain", "draw", "sequence", "position", "expert") and list(
        route["expert"].values
    ) == [
        "full",
        "local",
    ]
    assert data["log_likelihood"]["targets"].shape == (1, 20, 2, 3)


def test_without_arviz_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    program, guide = toy(MixtureNetwork(), PRIOR, GUIDE)
    with pytest.raises(ValueError, match="pip install arviz"):
        to_inference_data(program, guide, TOKENS, TARGETS, ["a", "b"])


def test_arviz_of_version_one_is_given_all_groups_in_one_argument(monkeypatch):
    """Its `from_dict(data, *, dims, coords, ...)`; 0.x takes the groups by name."""
    given = {}

    def from_dict(data, *, name=None, sample_dims=None, coords=None, dims=None):
        given.update(data=data, coords=coords, dims=dims)
        return "a DataTree"

    module = types.ModuleType("arviz")
    module.__version__, module.from_dict = "1.3.0", from_dict
    monkeypatch.setitem(sys.modules, "arviz", module)
    program, guide = toy(MixtureNetwork(), PRIOR, GUIDE)
    found = to_inference_data(program, guide, TOKENS, TARGETS, ["full", "local"], draws=5)
    groups = draw_groups(program, guide, TOKENS, TARGETS, draws=5)
    assert found == "a DataTree" and given["data"].keys() == groups.keys()
    assert (given["data"]["posterior"]["route_0"] == groups["posterior"]["route_0"]).all()
    assert given["dims"] == {
        "route_0": ["sequence", "position", "expert"],
        "targets": ["sequence", "position"],
    }
    assert list(given["coords"]["expert"]) == ["full", "local"]
