"""Numbers and figures that show the posterior."""
