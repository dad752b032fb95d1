"""The harness of the study at toy size.

Every contender trains, is read on the executed route, and is not run twice.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis.routes.contenders import Contender
from analysis.routes.layouts import HEADLINE, HEADS, LONG, QUOTING, RECIPE, SHORT
from analysis.routes.sweep import WORDS, identity, planned, run_one, settings, sweep
from analysis.routes.tiny_lm import deciding, markdown, paired, plan, rivals, summarise
from analysis.routes.tiny_lm_figure import kind_of
from analysis.routes.variants import (
    ChainedController,
    ConvolvedController,
    SegmentController,
    with_controller,
)
from bayes_router.attention.experts.contract import expert_class
from bayes_router.attention.shapes import ExpertShape
from bayes_router.benchmark.rows import Rows
from bayes_router.config import ModelConfig, config_from_dict
from bayes_router.presets import preset

COLUMNS = {
    "contender",
    "corpus",
    "context",
    "tokens",
    "seed",
    "nll_mean",
    "nll_hard",
    "cost_paper",
    "cost_flops",
    "route_information",
    "routing_entropy",
}


@pytest.fixture(scope="module")
def frame(corpus: str) -> pd.DataFrame:
    return pd.DataFrame([run_one(job) for job in plan("toy", f"text:{corpus}", 1, list(SHORT))])


def test_every_contender_has_a_row_at_the_same_tokens(frame: pd.DataFrame) -> None:
    assert set(frame["contender"]) == set(SHORT)
    assert set(frame) >= COLUMNS
    assert frame["tokens"].nunique() == 1
    assert frame[["nll_mean", "nll_hard"]].lt(7).all().all()


def test_static_contenders_cost_what_their_pattern_says(frame: pd.DataFrame) -> None:
    cost = frame.set_index("contender")["cost_paper"]
    assert cost["full attention"] == pytest.approx(1.0)
    assert cost["linear"] == pytest.approx(0.15)
    assert cost["static: local, local, local, full"] == pytest.approx((3 * 0.3 + 1) / 4)
    assert cost["static: gated, local, gated, full"] == pytest.approx((2 * 0.15 + 0.3 + 1) / 4)
    static = frame[frame["contender"].isin(["full attention", "local", "linear"])]
    assert (static["nll_mean"] - static["nll_hard"]).abs().max() < 1e-3
    assert static["route_information"].abs().max() < 1e-6


def test_contenders_of_the_longer_study_and_of_the_recipe_train(corpus: str) -> None:
    layouts = [name for name in LONG if name.startswith("static")]
    # of the layouts one trains: they differ in their letters alone
    names = [layouts[-1], *(n for n in (*LONG, *RECIPE) if n not in (*SHORT, *layouts))]
    rows = [run_one(job) for job in plan("toy", f"text:{corpus}", 1, names)]
    assert [row["contender"] for row in rows] == names
    assert all(row["nll_hard"] < 7 for row in rows)
    posteriors = [row["kl"] for row in rows if row["contender"].startswith("ours")]
    assert all(kl == kl for kl in posteriors)
    assert all(row["kl"] != row["kl"] for row in rows if row["contender"].startswith("static"))


def test_heads_of_a_layer_take_their_own_experts_and_pay_for_them(corpus: str) -> None:
    names = [
        "static gll, 1 of 4 heads f",
        "static gll, 2 of 8 heads f",
        "static gll, 1 of 4 heads window 256",
        "ours by head, from 1 of 4 heads f, price 20",
    ]
    rows = [run_one(job) for job in plan("toy", f"text:{corpus}", 1, names)]
    one, two, window, ours = rows
    cheap = 0.15 + 2 * 0.3
    assert one["cost_paper"] == pytest.approx((cheap + (1 + 3 * 0.3) / 4) / 4)
    assert two["cost_paper"] == pytest.approx(one["cost_paper"])  # a quarter of the heads
    assert window["cost_paper"] == pytest.approx((cheap + 0.3) / 4)
    assert window["cost_flops"] == pytest.approx(one["cost_flops"])  # 256 keys are all there are
    assert ours["cost_flops"] == pytest.approx(one["cost_flops"])  # it starts there
    assert json.loads(ours["load"])[-1] == [0.25, 0.0, 0.75]


def test_contenders_at_a_tenth_of_the_cost_are_the_same_in_both_sizes() -> None:
    def told(names: object) -> list[str]:
        return [name.replace("gllll", "gll") for name in names if "window" not in name]  # type: ignore[attr-defined]

    assert told(HEADS) == told(QUOTING)
    (by_head,) = plan("heads", "stdlib", 1, ["ours by head, from gllllf, price 80"])
    config = Contender(**by_head["contender"]).config(
        config_from_dict(by_head["common"], preset("tiny"))
    )
    assert (config.model.num_units, config.prior.price, config.prior.cost) == (4, 80.0, "flops")
    assert config.schedule.kl_weight * config.model.num_units == pytest.approx(0.003)


@pytest.mark.parametrize("name", ["convolved", "segments", "chained"])
def test_controllers_that_see_more_see_no_future(name: str) -> None:
    torch.manual_seed(0)
    model = with_controller(ModelConfig(d_model=16, num_heads=2, num_layers=3, vocab_size=50), name)
    for layer in model.controller.layers:
        torch.nn.init.normal_(layer.out.weight)
    tokens = torch.randint(50, (2, 30))
    changed = tokens.clone()
    changed[:, 17:] = torch.randint(50, (2, 13))
    before, after = model(tokens).concentration, model(changed).concentration
    torch.testing.assert_close(before[:, :, :17], after[:, :, :17])
    assert not torch.allclose(before[:, :, 17:], after[:, :, 17:])


def test_heads_that_are_learned_once_are_the_same_for_every_token() -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, num_heads=4, num_layers=2, vocab_size=50, route_by="head")
    model = with_controller(config, "constant")
    for layer in model.controller.layers:
        for part in layer.children():
            torch.nn.init.normal_(part.weight)
            torch.nn.init.normal_(part.bias)
    found = model(torch.randint(50, (2, 30))).concentration  # [L, B, T, R, E]
    assert found.shape[3:] == (4, 3)
    torch.testing.assert_close(found, found[:, :1, :1].expand_as(found))
    assert found[0, 0, 0].unique(dim=0).shape[0] == 4  # and each head has its own
    found.sum().backward()
    moved = [layer.hidden.weight.grad for layer in model.controller.layers]
    assert all(grad is not None and grad.abs().min() > 0 for grad in moved)  # not its biases alone


def test_controllers_see_what_they_say() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 20, 8)
    for make, reach in ((SegmentController, 16), (ConvolvedController, 16)):
        controller = make(8, 3, 0)
        torch.nn.init.normal_(controller.out.weight)
        moved = hidden.clone()
        moved[:, 16] += 1.0
        changed = (controller(hidden) != controller(moved)).flatten(2).any(-1)[0]
        assert changed.nonzero().flatten().tolist() == list(range(reach, 20))
    chained = ChainedController(ModelConfig(d_model=8, num_heads=2, num_layers=2))
    for layer in chained.layers:
        torch.nn.init.normal_(layer.out.weight)
    second = [
        chained.posterior(1, hidden).concentration
        for x in (hidden, hidden + 1.0)
        if chained.posterior(0, x)
    ]
    assert not torch.allclose(*second)


@pytest.mark.parametrize("expert", ["mapped", "short_convolution"])
def test_cheap_experts_see_no_future(expert: str) -> None:
    torch.manual_seed(0)
    made = expert_class(expert)(ExpertShape(4, 8, 16))
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    q, k, v = torch.randn(3, 2, 4, 70, 8).unbind(0)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 40:] = 0.0
    whole = made(q, k, v)
    torch.testing.assert_close(whole[:, :, :40], made(*later)[:, :, :40])
    torch.testing.assert_close(whole[:, :, 60:], made(q[:, :, 60:], k, v))


def test_a_run_of_other_settings_is_another_run() -> None:
    jobs = [plan("toy", "sotu", 1, ["ours"], lr=lr)[0] for lr in (1e-3, 3e-3)]
    assert planned(jobs[0]) != planned(jobs[1])
    row = {
        "contender": "ours",
        "corpus": "sotu",
        "context": 64,
        "seed": 0,
        "settings": settings(jobs[0]),
    }
    assert identity(row) == planned(jobs[0])


def test_a_finished_row_is_not_run_again(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = plan("toy", f"text:{corpus}", 1, ["local"])
    first = sweep(jobs, tmp_path / "r.csv", 1)
    monkeypatch.setattr("analysis.routes.sweep.run_one", lambda job: pytest.fail("ran again"))
    pd.testing.assert_frame_equal(sweep(jobs, tmp_path / "r.csv", 1), first, check_dtype=False)


def test_a_hash_of_digits_alone_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = pd.DataFrame({"settings": ["0123456789"], "commit": ["7038747"], "nll_hard": [1.5]})
    written.to_csv(tmp_path / "r.csv", index=False)
    pd.testing.assert_frame_equal(
        Rows(tmp_path / "r.csv", resume=True, words=WORDS).frame(), written
    )


def test_the_table_counts_seeds_and_their_error() -> None:
    rows = [
        {
            "corpus": "c",
            "context": 8,
            "contender": "a",
            "nll_mean": x,
            "nll_hard": x,
            "cost_paper": 0.3,
            "cost_flops": 0.2,
        }
        | {"route_information": 0.1, "routing_entropy": 0.5}
        for x in (1.0, 2.0, 3.0)
    ]
    table = summarise(pd.DataFrame(rows))
    assert (table["n"].item(), table["nll_hard"].item()) == (3, 2.0)
    assert table["se"].item() == pytest.approx(1 / 3**0.5)
    assert "| a | 3 | 2.0000 | 0.5774 |" in markdown(table)


def test_seeds_are_paired_with_themselves() -> None:
    nll = {"ours": {0: 1.0, 1: 2.0, 2: 3.0}, "static f": {0: 1.2, 1: 2.4, 3: 9.0}}
    rows = [
        {"corpus": "c", "context": 8, "contender": name, "seed": seed, "nll_hard": value}
        for name, seeds in nll.items()
        for seed, value in seeds.items()
    ]
    (row,) = paired(pd.DataFrame(rows), "ours").to_dict("records")
    assert (row["contender"], row["n"]) == ("static f", 2)
    assert row["below"] == pytest.approx(0.3) and row["se"] == pytest.approx(0.1)
    assert row["standard errors"] == pytest.approx(3.0)


def test_the_rivals_are_the_best_as_cheap_and_the_cheapest_as_good() -> None:
    read = {  # nll and cost of each seed
        "ours": [(0.8, 0.10), (0.9, 0.10)],
        "static cheap": [(1.0, 0.06), (1.2, 0.06)],
        "static as dear": [(0.9, 0.10), (1.1, 0.10)],
        "static good": [(0.8, 0.20), (0.8, 0.20)],
        "static good, dearer": [(0.7, 0.30), (0.7, 0.30)],
        "softmax": [(0.1, 0.01), (0.1, 0.01)],  # no static contender
        "static of one seed": [(0.1, 0.01)],
    }
    rows = [
        {"corpus": "c", "context": 8, "contender": name, "seed": seed}
        | dict(zip(("nll_hard", "cost_flops"), cell, strict=True))
        for name, cells in read.items()
        for seed, cell in enumerate(cells)
    ]
    first, second = rivals(pd.DataFrame(rows), "ours").to_dict("records")
    assert (first["what"], first["contender"]) == ("best as cheap", "static as dear")
    assert first["below"] == pytest.approx(0.15) and first["n"] == 2
    assert (second["what"], second["contender"]) == ("cheapest as good", "static good")
    assert second["cost_flops"] == pytest.approx(0.2)


def test_controllers_cost_what_their_products_do() -> None:
    full = 4 * 256 * (2048 + 1) / 2  # queries by keys and weights by values, half of the pairs
    one = 2 * (256 * 64 + 64 * 4 * 3)  # to 64 neurons, and on to three experts of four heads
    cost = deciding("heads", "ours by head, from gllllf, price 20")
    assert cost == pytest.approx(one / full, rel=1e-3)
    assert deciding("heads", "static gllll, 1 of 4 heads f") == 0


def test_headline_rows_get_the_seeds() -> None:
    jobs = plan("toy", "sotu", 5, list(SHORT))
    seeds = pd.Series([job["name"] for job in jobs]).value_counts()
    assert all(seeds[name] == (5 if name in HEADLINE else 2) for name in SHORT)


def test_the_legend_tells_routers_from_static_layouts() -> None:
    results = Path(__file__).parents[2] / "analysis" / "results"
    table = summarise(pd.read_csv(results / "long_recipe.csv").assign(lr=0.002))
    kinds = pd.Series(
        list(map(kind_of, table["contender"], table["routing_entropy"])), list(table["contender"])
    )
    assert kinds.value_counts().to_dict() == {"ours": 28, "static": 4, "softmax router": 3}
    assert all(name.startswith("static") for name in kinds.index[kinds == "static"])
    assert (
        kind_of("Dirichlet, literal ELBO", 1.0) == "Dirichlet"
        and kind_of("gated linear", 3e-11) == "static"
        and kind_of("static heads learned, from gllllf, price 20", 0.3) == "static"
    )
