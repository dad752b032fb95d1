"""What a mechanism computes and what it costs; no probability here.

Importing it registers the built-in experts.
"""

from bayes_router.attention import experts  # noqa: F401  (registers them)
