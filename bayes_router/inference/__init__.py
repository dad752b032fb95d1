"""The probabilistic program; all of Pyro lives here."""
