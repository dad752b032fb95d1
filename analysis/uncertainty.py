"""Is the routing posterior of a run sure, and is it right? `python -m analysis.uncertainty RUN`.

Tables: uncertainty by layer, position and kind of token; regret of forced routes; reliability before and after tempering;
stability; k-hat of the guide; other text; and `figures_to_quote.csv`.
"""

from analysis.figures import parse, write
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior as draw
from bayes_router.diagnostics.fitted import load_fitted


def main() -> None:
    """Parse, examine, write, print the figures to quote."""
    options = parse(__doc__)
    examined = Examination(load_fitted(options.run), effort=Effort(tokens=options.tokens))
    uncertainty, calibration = examined.uncertainty, examined.calibration
    quoted = examined.figures().to_frame()
    quoted.index.name = "figure"
    tables = {
        "uncertainty_by_layer": uncertainty.layers(),
        "uncertainty_by_position": uncertainty.positions(),
        "uncertainty_by_kind": uncertainty.kinds_frame(),
        "regret": examined.regret,
        "reliability": calibration.before,
        "reliability_tempered": calibration.after,
        "stability": examined.stability,
        "k_hat": examined.k_hat,
        "figures_to_quote": quoted,
    }
    figures = {
        "uncertainty_by_position": lambda: draw.plot_by_position(uncertainty.positions()),
        "reliability": lambda: draw.plot_reliability(calibration.before, calibration.after),
        "k_hat": lambda: draw.plot_k_hat(examined.k_hat),
    }
    if len(examined.other_text):
        tables["other_text"] = examined.other_text
        figures["other_text"] = lambda: draw.plot_other_text(examined.other_text)
        figures["uncertainty_by_kind"] = lambda: draw.plot_by_kind(uncertainty.kinds_frame())
    paths = write(options.out, tables, figures)
    print(quoted.to_string(float_format=lambda x: f"{x:.3f}"))
    print(f"\n{len(paths)} files in {options.out}")


if __name__ == "__main__":
    main()
