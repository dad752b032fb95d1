"""What the prior of a run says before any text, and how far the posterior moved from it: `python -m analysis.prior RUN`.

Table: by layer the prior mean (tilt included), expected cost and entropies, beside the posterior's load and its KL. Figure:
posteriors and prior on the simplex, for three experts, in the layer that tells tokens apart best.
"""

from collections.abc import Callable

import pandas as pd
import torch
from matplotlib.axes import Axes

from analysis.figures import parse, write
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior as draw
from bayes_router.diagnostics.fitted import FittedRun, load_fitted
from bayes_router.diagnostics.measures.collapse import prior_mean
from bayes_router.diagnostics.reading import read, windows
from bayes_router.routing.posterior import categorical_entropy, expected_entropy

DRAWS = 250


def prior_table(run: FittedRun, layers: pd.DataFrame) -> pd.DataFrame:
    """One row a layer; entropies in nats, of the Dirichlet before the tilt, cost relative to full attention."""
    mean, concentration = prior_mean(run.program).mean(1), run.program.concentration.double().cpu()  # mean over units
    concentration = concentration.mean(1) if concentration.dim() == 3 else concentration
    table = pd.DataFrame(mean.numpy(), columns=[f"prior mean {name}" for name in run.experts])
    table["prior cost"] = (mean @ run.prior.cost_ratio.double()).numpy()
    table["total concentration"] = concentration.sum(-1).numpy()
    table["entropy of prior mean"] = categorical_entropy(mean).numpy()
    table["expected entropy"] = expected_entropy(concentration).numpy()
    table.index.name = "layer"
    return table.join(layers[[f"load {name}" for name in run.experts] + ["kl", "prior_distance"]])


def main() -> None:
    """Parse, examine, write, print the table."""
    options = parse(__doc__)
    run = load_fitted(options.run)
    examined = Examination(run, effort=Effort(tokens=options.tokens))
    layers = examined.collapse.layers()
    table, figures = prior_table(run, layers), dict[str, Callable[[], Axes]]()
    if len(run.experts) == 3:
        best = int(layers["route_information"].argmax())
        reading = next(read(run.model, windows(examined.source, run.config, options.tokens)))
        torch.manual_seed(0)
        prior = run.program.token_prior(best).sample(torch.Size([DRAWS])).flatten(0, -2)
        concentration = reading.concentration[best].flatten(0, 2)
        figures["simplex"] = lambda: draw.plot_simplex_density(concentration, prior, run.experts)
    paths = write(options.out, {"prior_by_layer": table}, figures)
    print(table.to_string(float_format=lambda x: f"{x:.3f}"))
    print(f"\n{len(paths)} files in {options.out}")


if __name__ == "__main__":
    main()
