"""Which layers of a run have collapsed, and when: `python -m analysis.collapse RUN`.

Tables: load, information and distance from the prior by layer on held-out text; the same at every evaluation of training.
"""

from analysis.figures import parse, write
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior as draw
from bayes_router.diagnostics.fitted import load_fitted


def main() -> None:
    """Parse, examine, write, print the verdicts."""
    options = parse(__doc__)
    run = load_fitted(options.run)
    examined = Examination(run, effort=Effort(tokens=options.tokens))
    layers, training = examined.collapse.layers(), examined.training
    tables = {"collapse_by_layer": layers}
    figures = {"load_by_layer": lambda: draw.plot_load_by_layer(layers, run.experts)}
    if len(training):
        tables["collapse_over_training"] = training
        figures["effective_experts"] = lambda: draw.plot_collapse_over_training(training)
        figures["route_information"] = lambda: draw.plot_collapse_over_training(training, "route_information")
    paths = write(options.out, tables, figures)
    print(layers.to_string(float_format=lambda x: f"{x:.3f}"))
    for verdict in examined.verdicts(quick=True):
        print(verdict)
    print(f"\n{len(paths)} files in {options.out}")


if __name__ == "__main__":
    main()
