"""Faults in the probabilistic program, and in what judges its posterior."""

from tests.mutants.planted import Fault

INF, ME = "bayes_router/inference", "bayes_router/diagnostics/measures"
PROGRAM = "tests/inference"

OF_PROGRAM = [
    Fault(
        "the pass of a guide serves other routes",
        f"{INF}/model.py",
        "if all(drawn[layer] is route for layer, route in enumerate(kept.routes)):",
        "if True:",
        f"{PROGRAM}/test_idioms.py",
    ),
    Fault(
        "particles in another order",
        f"{INF}/sites.py",
        "return output.reshape(*self.lead, *ones, self.B",
        "return output.flip(0).reshape(*self.lead, *ones, self.B",
        f"{PROGRAM}/test_idioms.py",
    ),
    Fault(
        "the guide's pass draws weights of its own",
        f"{INF}/guide.py",
        'msg["value"], msg["done"] = self.drawn[msg["name"]]["value"], True',
        "pass",
        f"{PROGRAM}/test_idioms.py",
    ),
    Fault(
        "logits are cut to float32",
        f"{INF}/likelihood.py",
        "logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits",
        "logits.float()",
        f"{PROGRAM}/test_idioms.py",
    ),
    Fault(
        "what a model that is gone left in the store is kept",
        f"{INF}/parameters.py",
        "            del store[full]",
        "            pass",
        f"{PROGRAM}/test_parameter_store.py",
    ),
    Fault(
        "the network is not shown to Pyro",
        f"{INF}/model.py",
        "            self.show_parameters(self.network)",
        "            pass",
        f"{PROGRAM}/test_elbo.py",
    ),
    Fault(
        "a guide over other latents is taken",
        f"{INF}/matching.py",
        "    check_sites(*pair)\n",
        "",
        f"{PROGRAM}/test_misfits.py",
    ),
    Fault(
        "check_guide moves the draws that follow",
        f"{INF}/matching.py",
        "with torch.random.fork_rng(devices=devices), torch.no_grad():",
        "with torch.no_grad():",
        f"{PROGRAM}/test_misfits.py",
    ),
    Fault(
        "integer targets below zero are zero",
        f"{INF}/fits.py",
        "targets = torch.where(counts, targets, 0)",
        "targets = targets.clamp_min(0)",
        f"{PROGRAM}/test_parts.py",
    ),
    Fault(
        "the sampler infers from other rows' targets",
        f"{ME}/simulation.py",
        "        sampler.run(tokens, targets)\n",
        "        sampler.run(tokens, targets.flip(0))\n",
        "tests/diagnostics/test_simulation.py",
    ),
    Fault(
        "the limit of k-hat is .7 for few draws",
        f"{ME}/importance.py",
        "return min(1 - 1 / math.log10(draws), 0.7)",
        "return 0.7",
        "tests/diagnostics/test_fit_quality.py",
    ),
]
