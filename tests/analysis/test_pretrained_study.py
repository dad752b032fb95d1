"""The study of pretrained models on a tiny one: its tables by hand, its rivals, its reader."""

import argparse
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from tests.integrations.tiny_models import VOCAB, patched, tiny

study = pytest.importorskip("analysis.pretrained.study")

from analysis.pretrained import (  # noqa: E402
    bisect,
    cut_vocabulary,
    freezing,
    holding,
    reading,
    rivals,
    table,
    texts,
)
from analysis.pretrained.contenders import share  # noqa: E402
from analysis.pretrained.loading import load_model  # noqa: E402
from analysis.pretrained.retrieval import Haystack, Question  # noqa: E402
from bayes_router.benchmark.rows import Rows  # noqa: E402
from bayes_router.data.mixture import Mixture  # noqa: E402
from bayes_router.data.stream import TokenStream  # noqa: E402
from bayes_router.transformer.nll import token_kl  # noqa: E402

WINDOW, SINKS, T = 8, 4, 64


def router_of(route_by: str = "head") -> Any:
    """A tiny Llama, 2 layers of 4 query heads, whose tokens route apart."""
    return patched(
        "llama", window=WINDOW, sinks=SINKS, experts=("full", "local"), route_by=route_by
    )[1]


def stream(length: int = 900, seed: int = 0) -> TokenStream:
    ids = np.random.default_rng(seed).integers(3, VOCAB, length)
    return TokenStream(torch.from_numpy(ids), VOCAB, "toy")


def rows_of(contender: str, lost: list[list[float]], **facts: Any) -> list[dict[str, Any]]:
    """A row a seed and piece."""
    one = {"text": "novels", "context": 64, "budget": 0.3, "window": 8, "cost": 0.3} | facts
    return [
        one | {"contender": contender, "seed": seed, "piece": piece, "lost": nats}
        for seed, pieces in enumerate(lost)
        for piece, nats in enumerate(pieces)
    ]


def test_losses_are_means_over_pieces_of_means_over_seeds() -> None:
    lost = [[0.01, 0.03, 0.02], [0.03, 0.05, 0.02]]
    (row,) = table.losses(pd.DataFrame(rows_of(table.OURS, lost))).to_dict("records")
    pieces = np.array([0.02, 0.04, 0.02])
    assert row["lost"] == pytest.approx(100 * math.expm1(pieces.mean()))
    assert row["se"] == pytest.approx(100 * pieces.std(ddof=1) / 3**0.5)
    assert (row["seeds"], row["pieces"]) == (2, 3)
    assert row["between"] == pytest.approx(100 * np.std([0.02, 0.1 / 3], ddof=1))


def test_a_rival_is_compared_on_the_pieces_that_both_read() -> None:
    ours, theirs = [[0.01, 0.02, 0.03]], [[0.02, 0.05]]
    frame = pd.DataFrame(rows_of(table.OURS, ours) + rows_of("rival", theirs))
    (row,) = table.below(frame, "rival", 8).to_dict("records")
    apart = np.array([0.01, 0.03])
    assert row["below"] == pytest.approx(100 * apart.mean()) and row["pieces"] == 2
    assert row["se"] == pytest.approx(100 * apart.std(ddof=1) / 2**0.5)
    assert table.below(frame, "rival", 16).empty


def test_what_kinds_cost_at_one_dial_is_told_from_their_mean() -> None:
    rows: list[dict[str, Any]] = []
    for kind, costs in (("novels", (0.3, 0.4)), ("python", (0.32, 0.4)), ("speeches", (0.28, 0.4))):
        for seed, cost in enumerate(costs):
            more = rows_of(table.OURS, [[0.1, 0.2]] * 2, text=kind, at_fit=cost)
            rows += [row for row in more if row["seed"] == seed]
    assert table.at_one_dial(pd.DataFrame(rows)).empty  # a kind is missing
    rows += rows_of(table.OURS, [[0.1, 0.2]], text="wikitext", at_fit=0.34)
    (row,) = table.at_one_dial(pd.DataFrame(rows)).to_dict("records")
    assert (row["seeds"], row["python"]) == (1, 0.32)
    assert row["mean"] == pytest.approx(0.31) and row["farthest"] == pytest.approx(0.03)


def test_kinds_are_read_at_one_price_and_with_the_budget_held() -> None:
    router = router_of()
    router.full_up_to = 0
    kinds = {kind: stream(1500, seed) for seed, kind in enumerate(table.KINDS)}
    frame = pd.DataFrame(holding.windows(router, kinds, T, 0.6, 20)).assign(window=WINDOW)
    shown = holding.summary(frame).set_index("way")
    assert list(shown["windows"]) == [20, 20] and len(frame) == 2 * 4 * 20
    assert shown.loc["held", "farthest"] < 0.02 and abs(frame["keys"] - frame["cost"]).max() < 0.1
    same = frame[frame["text"] == "novels"].groupby("way")["cost"].first()
    assert same["held"] == same["at one price"]  # the first window knows of none before it


def test_how_far_a_contender_is_from_the_unpatched_model_is_a_mean_over_pieces() -> None:
    rows = rows_of(table.OURS, [[0.01, 0.03], [0.03, 0.05]])
    for row, kl in zip(rows, (0.02, 0.04, 0.02, 0.06), strict=True):
        row["kl"] = kl
    (row,) = table.far(pd.DataFrame(rows + rows_of("unread", [[0.1]]))).to_dict("records")
    assert (row["contender"], row["kl"]) == (table.OURS, pytest.approx(3.5))
    assert row["se"] == pytest.approx(100 * np.std([0.02, 0.05], ddof=1) / 2**0.5)
    assert table.far(pd.DataFrame(rows_of(table.OURS, [[0.1]]))).empty


def test_kinds_of_text_that_no_fit_reads_have_a_role_of_their_own(tmp_path: Any) -> None:
    roles = ("fit novels", "read novels", "other C", "own novels")
    ids = {name: np.full(9, i, np.uint16) for i, name in enumerate(roles)}
    np.savez(tmp_path / "ids.npz", **ids)
    found = texts.others(tmp_path / "ids.npz", VOCAB)
    assert {name: int(one.tokens[0]) for name, one in found.items()} == {"C": 2}


def test_means_alone_are_printed_as_they_are(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    pd.DataFrame({"variant": ["half"], "lost": [0.44]}).to_csv(tmp_path / "rows.csv", index=False)
    monkeypatch.setattr("sys.argv", ["table", str(tmp_path / "rows.csv")])
    table.main()
    assert "| half | 0.44 |" in capsys.readouterr().out


def test_rows_without_retrieval_are_printed(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    pd.DataFrame(rows_of(table.OURS, [[0.01, 0.03]])).to_csv(tmp_path / "rows.csv")
    monkeypatch.setattr("sys.argv", ["table", str(tmp_path / "rows.csv")])
    table.main()
    assert "2.02 +- 1.00" in capsys.readouterr().out


def test_a_blind_router_learns_a_choice_that_no_token_moves() -> None:
    router = study.patch(
        tiny("llama"), window=WINDOW, sinks=SINKS, experts=("full", "local"), route_by="head",
        controller_hidden=0,
    )  # fmt: skip
    rivals.blind(router)
    router.fit(
        stream(), steps=3, distil_steps=0, context=T, batch_size=1, controller_lr=0.1,
        budget=(0.4, 0.9), progress=False,
    )  # fmt: skip
    for controller in router.controller.layers:
        assert not controller.out.weight.any() and controller.out.bias.std() > 0
    with torch.no_grad():
        raw = router.controller.layers[0](torch.randn(1, 5, 32))
    assert torch.equal(raw, raw[:, :1].expand_as(raw))


def test_units_are_chosen_in_the_order_of_their_scores() -> None:
    router = router_of()
    score = torch.linspace(-1, 1, 8)[torch.randperm(8)].view(2, 4)
    rivals.choose_by(router, score)
    for count, dial in ((8, -9.0), (0, 9.0)):
        setting = reading.Setting(router, dial)
        full = sum(
            int((setting(layer, torch.randn(1, 3, 32)) == 0).all((0, 1)).sum()) for layer in (0, 1)
        )
        assert full == count
    middle = reading.Setting(router, 0.0)
    chosen = torch.stack([middle(layer, torch.randn(1, 1, 32))[0, 0] == 0 for layer in (0, 1)])
    assert chosen.any() and not chosen.all() and score[chosen].min() > score[~chosen].max()


def test_the_rivals_own_objective_moves_its_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    router = router_of("kv_head")
    hay = Haystack(lambda t: [3 + ord(c) % 97 for c in t], stream().tokens.tolist(), ["a"])
    chosen: list[torch.Tensor] = []
    monkeypatch.setattr(rivals, "choose_by", lambda router, score: chosen.append(score))
    found = rivals.passkeys(router, hay, 620, math.inf, 4, 0, lr=0.1)
    # at the start every gate is on full, so the penalty of 0.05 is all there is
    assert len(found) == 4 and found[0] == pytest.approx(0.05, abs=1e-4)
    assert chosen[0].shape == (2, 2) and chosen[0].max() < 0.999  # the penalty has pulled


def test_an_executed_cost_is_counted_in_keys() -> None:
    router = router_of()
    local = share(T, WINDOW, SINKS)
    setting = reading.Setting(router)
    chosen = torch.ones(1, T, 4, dtype=torch.int64)
    chosen[:, T // 2 :, ::2] = 0  # half of the units send the later half to full
    setting.taken = [chosen] * 2
    keys = sum(t + 1 for t in range(T))
    near = [min(t + 1, WINDOW) + min(max(t + 1 - WINDOW, 0), SINKS) for t in range(T)]
    read = sum(near) + 0.5 * sum(t + 1 - near[t] for t in range(T // 2, T))
    assert float(setting.cost(T)) == pytest.approx(read / keys)
    assert not setting.taken
    assert float(reading.Setting(router, width=WINDOW).cost(T)) == pytest.approx(local)


def test_a_reader_meets_a_budget_and_reads_what_it_costs() -> None:
    router, text = router_of(), stream()
    reader = reading.Reader(router)
    dial, _ = reader.meet(text, T, 0.6)
    assert reader.spent(text, T, 8, reading.Setting(router, dial)) == pytest.approx(0.6, abs=0.03)
    rows = list(reader.lost("toy", text, T, 3, reading.Setting(router, dial)))
    assert [row["piece"] for row in rows] == [0, 1, 2]
    everywhere = list(reader.lost("toy", text, T, 3, reading.Setting(router, -99.0)))
    assert [row["lost"] for row in everywhere] == pytest.approx([0, 0, 0], abs=1e-5)
    assert [row["cost"] for row in everywhere] == pytest.approx([1, 1, 1])
    assert rows[0]["unpatched"] == everywhere[0]["unpatched"] and abs(rows[0]["lost"]) > 1e-5
    wide = list(reader.lost("toy", text, T, 3, reading.Setting(router, width=T)))
    assert [row["lost"] for row in wide] == pytest.approx([0, 0, 0], abs=1e-5)


def test_units_a_hair_apart_are_split_at_the_budget() -> None:
    router, text = router_of(), stream()
    rivals.choose_by(router, 0.3 + 1e-5 * torch.randperm(8).view(2, 4))
    reader, local = reading.Reader(router), share(T, WINDOW, SINKS)
    dial, _ = reader.meet(text, T, 0.6)
    (row,) = reader.lost("toy", text, T, 1, reading.Setting(router, dial))
    units = [local + (1 - local) * n / 8 for n in range(9)]
    assert row["cost"] == pytest.approx(min(units, key=lambda cost: abs(cost - 0.6)))


def test_a_reader_says_how_far_from_the_unpatched_model_a_setting_is() -> None:
    router, text = router_of(), stream()
    reader = reading.Reader(router, divergence=True)
    tokens, _ = next(reader.pieces(text, T, 1))
    local = router.experts.index("local")
    with torch.no_grad():
        full, near = (router.network(tokens, lambda *_, e=e: e)[0] for e in (1 - local, local))
    p, q = full.log_softmax(-1), near.log_softmax(-1)
    (row,) = reader.lost("toy", text, T, 1, reading.Setting(router, width=WINDOW))
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    (row,) = reader.lost("toy", text, T, 1, reading.Setting(router, -99.0))
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in next(reading.Reader(router).lost("toy", text, T, 1, reading.Setting(router)))


def test_a_contender_is_fitted_and_read_from_end_to_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TASKS", ("needle",))
    hay = Haystack(lambda t: [3 + ord(c) % 97 for c in t], stream().tokens.tolist(), ["a"])
    args = argparse.Namespace(
        contexts="160,80", price=2000.0, total=2.0, window=WINDOW, steps=2, seconds=math.inf,
        rows=1, lr=0.01, seed=0, model="toy", through="mean", graph=False, likelihood="both",
        shares=study.SHARES,
    )  # fmt: skip
    texts = Mixture({"novels": stream(), "python": stream(seed=1)}, {"novels": 0.5, "python": 0.5})
    router = study.fit(tiny("llama"), texts, "token x query head", args)
    plan = reading.Extent((160,), 320, 1, ("novels",), (0.5, 0.05), windows=True)
    rows = Rows(tmp_path / "rows.csv", {"window": WINDOW, "seed": 0})
    reading.read(router, "token x query head", {"novels": stream()}, hay, plan, rows)
    frame = rows.finish()
    lost = frame[frame["lost"].notna()]
    assert set(lost["contender"]) == {"token x query head", "one window of equal cost"}
    assert set(lost["budget"]) == {0.5}  # 0.05 is less than the window costs
    assert lost.groupby("contender")["piece"].nunique().tolist() == [2, 2]
    asked = frame[frame["right"].notna()]
    assert set(asked["text"]) == {"needle"} and 1.0 in set(asked["budget"])
    printed = "\n".join(table.lines(table.spread(table.losses(frame))))
    assert "one window of equal cost" in printed


def test_planted_effects_of_a_bisect_are_found() -> None:
    frame = pd.read_csv(bisect.RESULTS)
    fits = frame["draws"].notna()
    first = frame[fits].iloc[0]
    planted = {"draws": -0.2, "lengths": 0.5, "rates": -0.3}
    frame.loc[fits, "lost"] = sum(
        size * (frame[fits][d] != first[d]) for d, size in planted.items()
    )
    found = bisect.effects(frame)
    assert len(found) == 9
    for name in (*bisect.DIFFERENCES, "none"):
        assert found[name].to_numpy() == pytest.approx(planted.get(name, 0.0), abs=1e-9), name
    with pytest.raises(ValueError, match="each level in half of them"):
        bisect.effects(frame[frame["fit"] != "r8"])


def test_what_freezing_frees_is_measured_in_bytes() -> None:
    router = router_of()
    with torch.no_grad():
        for controller in router.controller.layers:  # the second key head stands on local
            weight = controller.out.weight.view(4, 2, -1)
            bias = controller.out.bias.view(4, 2)
            weight[2:], bias[2:] = 0.0, torch.tensor([-5.0, 5.0])
    texts = {name: stream(seed=seed) for seed, name in enumerate(("novels", "python"))}
    tokens = freezing.mixed(texts, 100, 4)
    assert torch.equal(tokens[100:200], texts["python"].tokens[:100])
    assert torch.equal(tokens[200:300], texts["novels"].tokens[225:325])
    frame = pd.DataFrame(freezing.freeze(router, texts, 100, 4, 0.4, (0.0, 0.3), (0.3,)))
    assert list(frame["piece"]) == [0, 1, 2, 3] * 3 and router.frozen is None
    rows = frame[frame["piece"] == 0].to_dict("records")
    assert rows[0]["frozen"] >= 4 and rows[0]["short"] >= 2
    whole = 2 * 2 * 2 * 100 * 8 * 4  # layers, keys and values, heads, tokens, Dh, float32
    assert whole <= rows[0]["bytes_before"] <= 2 * whole  # room to grow
    assert rows[0]["bytes"] < rows[0]["bytes_before"] - 0.3 * whole
    assert rows[1]["bytes"] <= rows[0]["bytes"]
    lost = frame.groupby(["by", "asked"])["lost"].apply(lambda x: x.abs().max())
    assert lost["share", 0.3] >= lost["share", 0.0]
    assert (rows[2]["by"], rows[2]["short"]) == ("free", 2)  # of four, 0.225 of the cache each
    # KL is read of the same windows, under what is frozen
    first = tokens[None, 400:500]
    with torch.no_grad():
        apart = token_kl(router.unrouted(first)[0], router(first, "hard").logits[0])
    assert frame["kl_before"][0] == pytest.approx(float(apart.mean()), rel=1e-4)
    assert frame["kl"][4] != frame["kl_before"][4]
    shown = freezing.summary(frame.assign(fit="ours", window=WINDOW, seed=0))
    assert list(shown["windows"]) == [4] * 3
    line = shown[(shown["rule"] == "share") & (shown["asked"] == 0)].iloc[0]
    assert line["bytes freed, %"] == pytest.approx(
        100 * (1 - rows[0]["bytes"] / rows[0]["bytes_before"]), abs=0.05
    )
    two = frame.assign(fit="ours", window=WINDOW, seed=0)
    two = pd.concat([two, two.assign(seed=1, lost=two["lost"] + 0.02)])
    again = freezing.summary(two)
    assert list(again["seeds"]) == [2] * 3 and np.allclose(again["SE"], shown["SE"], atol=2e-3)
    assert np.allclose(again["lost, %"], shown["lost, %"] + 1, atol=0.05)


def test_retrieval_counts_whole_answers_beside_the_unpatched_model() -> None:
    rows = [
        {"contender": "ours", "window": 8, "text": "needle", "context": 64, "budget": b,
         "seed": 0, "piece": i, "right": r, "nats": n}
        for b, right, nats in ((1.0, (1, 1, 0.5), (1, 2, 3)), (0.3, (1, 0.5, 0), (2, 2, 6)))
        for i, (r, n) in enumerate(zip(right, nats, strict=True))
    ]  # fmt: skip
    found = table.retrieved(pd.DataFrame(rows)).set_index("budget")
    assert list(found["whole"]) == [1, 2] and list(found["prompts"]) == [3, 3]  # of 0.3, of 1
    assert found.loc[0.3, "right"] == pytest.approx(0.5)
    assert found.loc[0.3, "more"] == pytest.approx(4 / 3)
    assert found.loc[0.3, "se"] == pytest.approx(np.std([1, 0, 3], ddof=1) / 3**0.5)
    assert found.loc[1.0, "more"] == 0


def test_rivals_are_compared_with_ours_on_the_prompts_that_both_answer() -> None:
    one = {"window": 8, "text": "needle", "context": 64, "budget": 0.3}
    said = {
        (table.OURS, 0): [(1, 1.0), (1, 2.0), (0, 3.0)], (table.OURS, 1): [(1, 1.0), (0, 4.0)],
        ("rival", 0): [(0, 2.0), (1, 3.5), (0, 9.0)],
    }  # fmt: skip
    frame = pd.DataFrame([
        one | {"contender": name, "seed": seed, "piece": i, "right": right, "nats": nats}
        for (name, seed), answers in said.items() for i, (right, nats) in enumerate(answers)
    ])  # fmt: skip
    (row,) = table.outdone(frame).to_dict("records")
    assert (row["whole"], row["the rival's"], row["prompts"]) == (1.5, 1, 3)
    apart = [1.0, 0.5, 6.0]  # ours: 1, 3, 3
    assert row["beyond"] == pytest.approx(np.mean(apart))
    assert row["se"] == pytest.approx(np.std(apart, ddof=1) / 3**0.5)


def test_the_cost_of_prompts_is_what_their_routes_read() -> None:
    router = router_of()
    reader = reading.Reader(router)
    asked = [Question((5, 6, 7, 8) * 16, ((7, 8),))] * 2
    cost = reader.retrieval(asked, reading.Setting(router, 99.0))[1].cost
    assert cost == pytest.approx(share(63, WINDOW, SINKS))  # the last token is not read
    assert [one.cost for one in reader.retrieval(asked, None)] == [1, 1]


def test_a_cut_tokenizer_says_the_same_of_what_is_left() -> None:
    trained = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    words = "low lower lowest new newer newest wide wider widest slow slower slowest"
    trained.train_from_iterator([words] * 9, BpeTrainer(special_tokens=["<unk>", "<0x41>"]))
    text = "newest lower slow"
    ids = trained.encode(text).ids
    old, _ = cut_vocabulary.renumbered({"fit": np.array(ids)}, [])
    cut = cut_vocabulary.cut_tokenizer(trained, old)
    assert [int(old[i]) for i in cut.encode(text).ids] == ids
    assert cut.get_vocab_size() < trained.get_vocab_size()


def test_a_cut_vocabulary_answers_as_the_whole_one_over_what_is_left(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = tiny("gemma3")
    texts = {"fit novels": np.array([5, 9, 9, 30]), "read novels": np.array([9, 12])}
    old, new = cut_vocabulary.renumbered(texts, [2])
    assert list(old) == [2, 5, 9, 12, 30] and list(new["read novels"]) == [2, 3]
    ids = torch.tensor([[2, 9, 5, 30, 12]])
    whole = model(ids).logits[..., torch.from_numpy(old)]
    cut_vocabulary.cut(model, old, 2)
    again = torch.from_numpy(np.searchsorted(old, ids))
    torch.testing.assert_close(model(again).logits, whole)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.device("cpu"), "float32")
    torch.testing.assert_close(loaded(again).logits, whole)
    begun = again.clone()
    begun[:, 0] = 3  # the first token of a text is the beginning of texts, whatever stands there
    torch.testing.assert_close(loaded(begun).logits, whole)
    assert study.whole_layers(model) == (1,) and study.whole_layers(tiny("llama")) is None
