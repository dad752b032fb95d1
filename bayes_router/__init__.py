"""Transformers in which every token chooses its attention, by Bayesian inference with Pyro.

The floors of the house, arrows downwards only: types, config, data; attention, routing;
transformer; inference; training; diagnostics, integrations; commands, cli. DESIGN.md says what
lives where.

A public name is imported when it is first asked for (PEP 562), so that the command line answers
before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayes_router.attention.experts.contract import Expert, expert_names, register_expert
    from bayes_router.attention.hard.backend import Backend, register_backend
    from bayes_router.attention.hard.dispatch import routed_attention
    from bayes_router.attention.shapes import ExpertShape
    from bayes_router.config import Config, ModelConfig, PriorConfig, load_config
    from bayes_router.inference.elbo import NegativeELBO, RoutingELBO, tempered
    from bayes_router.inference.guide import RoutingGuide
    from bayes_router.inference.matching import check_guide
    from bayes_router.inference.model import RoutingModel
    from bayes_router.inference.prior import DirichletPrior
    from bayes_router.inference.tilted import TiltedDirichlet
    from bayes_router.integrations.patch.settings import RouterConfig
    from bayes_router.integrations.patching import Router, load_patch, patch
    from bayes_router.presets import preset
    from bayes_router.routing.controller import MetaController
    from bayes_router.routing.policy import Argmax, Budget, Conservative, register_policy
    from bayes_router.routing.prior import ComputeAwarePrior
    from bayes_router.training.checkpoint import load_run
    from bayes_router.training.dial import solve_price
    from bayes_router.training.evaluate import Evaluation, evaluate
    from bayes_router.training.fit import TrainingDiverged, fit
    from bayes_router.training.prior_sweep import sweep_prior
    from bayes_router.transformer.build import build_prior
    from bayes_router.transformer.generate import Sampling, generate, stream
    from bayes_router.transformer.model import RoutedLanguageModel
    from bayes_router.transformer.network import RoutedTransformer
    from bayes_router.transformer.standalone import RoutedAttention
    from bayes_router.types import CostModel, LossTerms, RoutingMode, RoutingOutput

__version__ = "0.2.0"

__all__ = [
    "Argmax",
    "Backend",
    "Budget",
    "ComputeAwarePrior",
    "Config",
    "Conservative",
    "CostModel",
    "DirichletPrior",
    "Evaluation",
    "Expert",
    "ExpertShape",
    "LossTerms",
    "MetaController",
    "ModelConfig",
    "NegativeELBO",
    "PriorConfig",
    "RoutedAttention",
    "RoutedLanguageModel",
    "RoutedTransformer",
    "Router",
    "RouterConfig",
    "RoutingELBO",
    "RoutingGuide",
    "RoutingMode",
    "RoutingModel",
    "RoutingOutput",
    "Sampling",
    "TiltedDirichlet",
    "TrainingDiverged",
    "build_prior",
    "check_guide",
    "evaluate",
    "expert_names",
    "fit",
    "generate",
    "load_config",
    "load_patch",
    "load_run",
    "patch",
    "preset",
    "register_backend",
    "register_expert",
    "register_policy",
    "routed_attention",
    "solve_price",
    "stream",
    "sweep_prior",
    "tempered",
]

_HOMES = {
    "attention.experts.contract": "Expert expert_names register_expert",
    "attention.hard.backend": "Backend register_backend",
    "attention.hard.dispatch": "routed_attention",
    "attention.shapes": "ExpertShape",
    "config": "Config ModelConfig PriorConfig load_config",
    "inference.elbo": "NegativeELBO RoutingELBO tempered",
    "inference.guide": "RoutingGuide",
    "inference.matching": "check_guide",
    "inference.model": "RoutingModel",
    "inference.prior": "DirichletPrior",
    "inference.tilted": "TiltedDirichlet",
    "integrations.patch.settings": "RouterConfig",
    "integrations.patching": "Router load_patch patch",
    "presets": "preset",
    "routing.controller": "MetaController",
    "routing.policy": "Argmax Budget Conservative register_policy",
    "routing.prior": "ComputeAwarePrior",
    "training.checkpoint": "load_run",
    "training.dial": "solve_price",
    "training.evaluate": "Evaluation evaluate",
    "training.fit": "TrainingDiverged fit",
    "training.prior_sweep": "sweep_prior",
    "transformer.build": "build_prior",
    "transformer.generate": "Sampling generate stream",
    "transformer.model": "RoutedLanguageModel",
    "transformer.network": "RoutedTransformer",
    "transformer.standalone": "RoutedAttention",
    "types": "CostModel LossTerms RoutingMode RoutingOutput",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """The public name, from the module that defines it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What there is, the names that nobody has asked for yet included."""
    return sorted({*globals(), *__all__})
