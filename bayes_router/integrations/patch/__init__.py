"""The patch: what is added to a model, kept, saved and loaded; no library's name in it."""
