"""The faults: a line of code made wrong, and the tests that are to turn red."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault; `old` stands in `file` exactly once."""

    name: str
    file: str
    old: str
    new: str
    tests: str


P = "bayes_router"
T = "tests"

FAULTS = [
    # Those that once passed
    Fault(
        "states are not zeroed at reset",
        f"{P}/attention/decoding/cache.py",
        "        for state in self.states.values():\n            state.zero_()\n        self.longest = 0\n",
        "        self.longest = 0\n",
        f"{T}/attention/test_cache.py",
    ),
    Fault(
        "every layer has the same draws",
        f"{P}/inference/draws.py",
        "seed + 7_919 * self._layer",
        "seed",
        f"{T}/inference/test_draws.py",
    ),
    Fault(
        "a finished row goes on",
        f"{P}/transformer/generate.py",
        "torch.where(finished, last, choose_token(out.logits[:, -1], sampling, generator))",
        "choose_token(out.logits[:, -1], sampling, generator)",
        f"{T}/transformer/test_generate.py",
    ),
    Fault(
        "the same draws at each step",
        f"{P}/training/trainer.py",
        "torch.manual_seed(draw_seed(config.seed, step, shard))",
        "torch.manual_seed(draw_seed(config.seed, 0, shard))",
        f"{T}/training/test_steps.py",
    ),
    Fault(
        "no clipping",
        f"{P}/training/optimise.py",
        "return nn.utils.clip_grad_norm_(model.parameters(), largest)",
        "return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])",
        f"{T}/training/test_steps.py",
    ),
    Fault(
        "a row of the metrics is lost at resume",
        f"{P}/training/metrics.py",
        'frame["step"] <= step',
        'frame["step"] < step',
        f"{T}/training/test_steps.py",
    ),
    Fault(
        "the KL is read in HARD, not in SAMPLE",
        f"{P}/training/evaluate.py",
        "        if mode is RoutingMode.SAMPLE:\n            sums.kl",
        "        if mode is RoutingMode.HARD:\n            sums.kl",
        f"{T}/training/test_evaluate.py",
    ),
    Fault(
        "weights are written before the state",
        f"{P}/training/checkpoint.py",
        "    write_whole(run / STATE, write)\n    save_weights(run, model, settings)\n",
        "    save_weights(run, model, settings)\n    write_whole(run / STATE, write)\n",
        f"{T}/training/test_steps.py",
    ),
    Fault(
        "the prior's mean without its price",
        f"{P}/diagnostics/measures/collapse.py",
        "    if program.price == 0:\n        return posterior_mean(concentration)\n    return tilted_moments",
        "    return posterior_mean(concentration)\n    return tilted_moments",
        f"{T}/diagnostics/test_collapse.py",
    ),
    Fault(
        "a dead expert's threshold is zero",
        f"{P}/diagnostics/measures/collapse.py",
        "if share < t.dead_load]",
        "if share <= 0]",
        f"{T}/diagnostics/test_collapse.py",
    ),
    Fault(
        "the temperature is fitted on what it is judged by",
        f"{P}/diagnostics/measures/calibration.py",
        "fit_temperature(probability[fitted], choice[fitted], right[fitted])",
        "fit_temperature(probability[~fitted], choice[~fitted], right[~fitted])",
        f"{T}/diagnostics/test_calibration.py",
    ),
    Fault(
        "noise is not scaled by the embeddings",
        f"{P}/diagnostics/measures/calibration.py",
        "scale = noise * embed.weight.std()",
        "scale = noise",
        f"{T}/diagnostics/test_calibration.py",
    ),
]
