"""Where `measures/amortisation.py` was: what imports it from here still finds it."""

from bayes_router.diagnostics.measures.amortisation import (
    AmortisationGap,
    amortisation_gap,
    nuts_comparison,
)

__all__ = ["AmortisationGap", "amortisation_gap", "nuts_comparison"]
