"""The examples run, and the router in one file is the library's on the same weights."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from bayes_router.config import ModelConfig
from bayes_router.inference.elbo import RoutingELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.transformer.model import RoutedLanguageModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mini() -> ModuleType:
    return load("mini_router")


def twins(mini: ModuleType) -> tuple[torch.nn.Module, RoutedLanguageModel, dict[str, str]]:
    """The router of the file and the library's model with its weights, in float64; and whose
    parameter is whose."""
    torch.manual_seed(0)
    router = mini.Router().double()
    torch.nn.init.normal_(router.controllers[1][2].weight, std=1.0)
    config = ModelConfig(
        vocab_size=mini.VOCABULARY,
        d_model=mini.D,
        num_layers=mini.LAYERS,
        num_heads=mini.HEADS,
        window=mini.WINDOW,
        experts=("full", "linear", "local"),
        controller_hidden=16,
        concentration_floor=mini.FLOOR,
    )
    model = RoutedLanguageModel(config).double()
    names = {}
    for name, _ in router.named_parameters():
        known = name.replace("network.layers.", "network.blocks.").replace(
            "controllers.", "controller.layers."
        )
        known = known.replace("before_attention", "attention_norm").replace(
            "before_mlp", "mlp_norm"
        )
        known = (
            re.sub(r"\.(qkv|out)\.weight", r".attention.\1.weight", known)
            if "network" in known
            else known
        )
        known = re.sub(r"(controller\.layers\.\d)\.0\.", r"\1.hidden.", known)
        names[name] = re.sub(r"(controller\.layers\.\d)\.2\.", r"\1.out.", known)
    model.load_state_dict({names[name]: value for name, value in router.state_dict().items()})
    return router, model, names


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(128, (2, 31), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def test_its_loss_and_gradient_are_the_librarys(mini: ModuleType) -> None:
    router, model, names = twins(mini)
    concentration, cost = mini.CONCENTRATION.double().expand(2, 3), mini.COST.double()
    program = RoutingModel(model.network, concentration, cost, mini.PRICE)
    tokens, targets = batch()
    with pyro.settings.context(module_local_params=True):
        torch.manual_seed(1)
        ours = RoutingELBO(mini.KL_WEIGHT).differentiable_loss(
            program, RoutingGuide(program, model.controller), tokens, targets
        )
        torch.manual_seed(1)
        negative_elbo = TraceMeanField_ELBO().differentiable_loss(
            router.model, router.guide, tokens, targets
        )
        theirs = mini.KL_WEIGHT * negative_elbo / tokens.numel()
    log_z = float(program.dirichlet_prior.log_normaliser.sum())
    assert theirs.item() == pytest.approx(ours.item() - mini.KL_WEIGHT * log_z, rel=1e-8)
    known = dict(model.named_parameters())
    parameters = dict(router.named_parameters())
    theirs_by_name = dict(
        zip(parameters, torch.autograd.grad(theirs, parameters.values()), strict=True)
    )  # type: ignore
    ours_by_name = dict(zip(known, torch.autograd.grad(ours, known.values()), strict=True))  # type: ignore
    for name, gradient in theirs_by_name.items():
        # both turn queries and keys by angles in float32
        torch.testing.assert_close(
            gradient, ours_by_name[names[name]], rtol=1e-5, atol=1e-8, msg=name
        )


def test_it_executes_what_the_library_executes(mini: ModuleType) -> None:
    router, model, _ = twins(mini)
    tokens = batch()[0][:1]
    for hard, mode in ((False, "mean"), (True, "hard")):
        logits, choices = router.execute(tokens, hard)
        with torch.no_grad():
            out = model(tokens, mode)
        torch.testing.assert_close(logits, out.logits, rtol=1e-6, atol=1e-8)
    assert torch.equal(choices, out.route[:, 0, :, 0]) and len(choices.unique()) > 1


def test_it_runs_and_learns(mini: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    mini.main(steps=20)
    printed = capsys.readouterr().out
    executed = float(re.search(r"argmax executed  nll ([\d.]+)", printed).group(1))  # type: ignore[union-attr]
    assert executed < 3.0 < 4.85  # log 128 = 4.85
    pyro.clear_param_store()


def test_it_imports_torch_and_pyro_alone() -> None:
    tree = ast.parse((EXAMPLES / "mini_router.py").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    assert {name.split(".")[0] for name in imported} == {"math", "pyro", "torch"}


def test_the_classifier_learns_and_is_short() -> None:
    example = load("classifier")
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    model, guide = example.fit(steps=90)
    tokens, labels = example.texts(100)
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=5)(tokens)
    votes = draws["targets"].float().mean(0)
    assert float(((votes > 0.5) == labels).float().mean()) > 0.9
    heads = draws["head.weight"].flatten(1)
    assert float(heads.std(0).mean()) > 1e-3  # the head is a posterior, not a point
    tree = ast.parse((EXAMPLES / "classifier.py").read_text(encoding="utf-8"))
    parts = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in ("Classifier", "fit")
    ]
    lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in parts)
    assert lines <= 30
    pyro.clear_param_store()
