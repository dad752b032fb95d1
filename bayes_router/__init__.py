"""Transformers in which every token chooses its attention, by Bayesian inference with Pyro.

The floors of the house, arrows downwards only: types, config, data; attention, routing; transformer; inference; training;
diagnostics, integrations; commands, cli. DESIGN.md says what lives where.
"""

from bayes_router.attention.experts.contract import Expert, expert_names, register_expert
from bayes_router.attention.hard.dispatch import Backend, routed_attention
from bayes_router.attention.shapes import ExpertShape
from bayes_router.config import Config, ModelConfig, PriorConfig, load_config
from bayes_router.inference.elbo import NegativeELBO, RoutingELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.presets import preset
from bayes_router.routing.controller import MetaController
from bayes_router.routing.policy import Argmax, Budget, Conservative
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.training.checkpoint import load_run
from bayes_router.training.dial import solve_price
from bayes_router.training.evaluate import Evaluation, evaluate
from bayes_router.training.fit import TrainingDiverged, fit
from bayes_router.training.prior_sweep import sweep_prior
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.generate import Sampling, generate, stream
from bayes_router.transformer.model import RoutedLanguageModel, RoutedTransformer
from bayes_router.transformer.standalone import RoutedAttention
from bayes_router.types import CostModel, LossTerms, RoutingMode, RoutingOutput

__version__ = "0.1.0"

__all__ = [
    "Argmax",
    "Backend",
    "Budget",
    "ComputeAwarePrior",
    "Config",
    "Conservative",
    "CostModel",
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
    "RoutingELBO",
    "RoutingGuide",
    "RoutingMode",
    "RoutingModel",
    "RoutingOutput",
    "Sampling",
    "TrainingDiverged",
    "build_prior",
    "evaluate",
    "expert_names",
    "fit",
    "generate",
    "load_config",
    "load_patch",
    "load_run",
    "patch",
    "preset",
    "register_expert",
    "routed_attention",
    "solve_price",
    "stream",
    "sweep_prior",
]
