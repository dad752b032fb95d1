"""Peak memory of one attention call: `bayes_router.benchmark.memory`, under the name by which the studies know it."""

from bayes_router.benchmark.memory import peak_bytes

__all__ = ["peak_bytes"]
