"""Pyro's global store: a store that was loaded is used.

Models that live together share nothing, and order does not count.
"""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
from pyro.infer import SVI, TraceMeanField_ELBO

from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.transformer.model import RoutedLanguageModel
from tests.tiny import tiny_batch, tiny_concentration, tiny_model

TOKENS, TARGETS = tiny_batch(T=10)


@pytest.fixture(autouse=True)
def fresh() -> None:
    gc.collect()  # models of other tests are gone, their names free
    pyro.clear_param_store()


Fit = tuple[RoutedLanguageModel, RoutingModel, SVI]


def build(seed: int = 0, name: str | None = None, **changes: object) -> Fit:
    lm = tiny_model(seed, num_layers=1, **changes)
    model = RoutingModel(lm.network, tiny_concentration(lm.config), name=name)
    guide = RoutingGuide(model, lm.controller, name=None if name is None else f"{name}_guide")
    return lm, model, SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), TraceMeanField_ELBO())


def losses(fit: Fit, steps: int) -> list[float]:
    pyro.set_rng_seed(1)
    return [fit[2].step(TOKENS, TARGETS) for _ in range(steps)]


@pytest.mark.parametrize("before", ["nothing", "another model", "another fit"])
def test_a_store_that_was_saved_goes_on_where_it_was(before: str, tmp_path: Path) -> None:
    """In a fresh process or a notebook whose cells ran in another order.

    Fresh modules, then the store is loaded.
    """
    first = build()
    losses(first, 25)
    trained = first[2].evaluate_loss(TOKENS, TARGETS)
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    del first
    gc.collect()
    pyro.clear_param_store()
    if before != "nothing":
        other = build(5)
        if before == "another fit":
            losses(other, 2)
        del other
        gc.collect()
    again = build(0)
    untrained = again[2].evaluate_loss(TOKENS, TARGETS)
    pyro.get_param_store().load(str(tmp_path / "store.pt"))
    assert {key.split("$")[0] for key in pyro.get_param_store()} == {"RoutingModel", "RoutingGuide"}
    pyro.set_rng_seed(0)
    loaded = again[2].evaluate_loss(TOKENS, TARGETS)
    assert loaded < 0.5 * untrained and loaded == pytest.approx(trained, rel=0.2)
    assert losses(again, 20)[-1] < loaded  # what is stepped is what is read
    assert pyro.get_param_store()["RoutingModel$$$embed.weight"] is again[0].network.embed.weight


def test_models_that_live_together_and_copies_have_names_of_their_own() -> None:
    fits = [build(0), build(1)]
    copied = copy.deepcopy(fits[0][1])
    fits.append(
        (
            fits[0][0],
            copied,
            SVI(copied, fits[0][2].guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO()),
        )
    )
    for fit in fits:
        losses(fit, 1)
    names = [fit[1].pyro_name for fit in fits]
    assert names == ["RoutingModel", "RoutingModel_1", "RoutingModel_2"]
    store = pyro.get_param_store()
    kept = [store[f"{name}$$$embed.weight"] for name in names]
    assert len({id(x) for x in kept}) == 3


def test_a_name_that_is_given_is_kept_and_refused_twice() -> None:
    one, two = build(0, "left"), build(1, "right")
    losses(two, 1)
    losses(one, 1)
    assert {key.split("$")[0] for key in pyro.get_param_store()} == {
        "left",
        "left_guide",
        "right",
        "right_guide",
    }
    with pytest.raises(ValueError, match="^name: expected one that no other model has; got 'left'"):
        losses(build(2, "left"), 1)
    with pytest.raises(ValueError, match="^name: expected letters"):
        build(0, "a.b")


def test_a_model_built_anew_under_the_name_of_one_that_is_gone_starts_afresh() -> None:
    """A cell that is run again: the old weights are not taken over in silence."""
    first = losses(build(), 20)
    gc.collect()
    again = losses(build(), 20)
    assert again[0] == pytest.approx(first[0], rel=1e-6)
    assert {key.split("$")[0] for key in pyro.get_param_store()} == {"RoutingModel", "RoutingGuide"}


def test_a_cleared_store_takes_the_modules_as_they_are() -> None:
    fit = build()
    losses(fit, 20)
    before = fit[2].evaluate_loss(TOKENS, TARGETS)
    pyro.clear_param_store()
    assert fit[2].evaluate_loss(TOKENS, TARGETS) == pytest.approx(before, rel=0.2)
    assert losses(fit, 5)[-1] < before and len(pyro.get_param_store()) == len(
        list(fit[0].parameters())
    )


def test_a_store_of_another_architecture_is_refused(tmp_path: Path) -> None:
    losses(build(), 1)
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    gc.collect()
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store.pt"))
    wide = build(d_model=32)
    with pytest.raises(
        ValueError, match=r"^parameter store, RoutingModel\$\$\$embed.weight: expected the shape"
    ):
        losses(wide, 1)


IN_A_PROCESS = """
import sys
import pyro
from tests.inference.test_parameter_store import TARGETS, TOKENS, build, losses
what, path = sys.argv[1:]
if what == "load after another":
    other = build(5)  # lives on
    del other
fit = build(0)
fit[2].evaluate_loss(TOKENS, TARGETS)
pyro.get_param_store().load(path)
found = losses(fit, 25)
print(found[0], found[-1])
"""


@pytest.mark.slow  # processes that import torch
def test_another_process_goes_on_from_a_store(tmp_path: Path) -> None:
    path = str(tmp_path / "store.pt")

    def run(what: str) -> tuple[float, ...]:
        command = [sys.executable, "-c", IN_A_PROCESS, what, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return tuple(map(float, done.stdout.split()))

    fit = build(3)
    start, *_, trained = losses(fit, 25)
    pyro.get_param_store().save(path)
    for what in ("load", "load after another"):
        first, last = run(what)
        assert first < trained + 0.1 * (start - trained) and last < first
