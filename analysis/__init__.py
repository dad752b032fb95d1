"""Studies: one script for each table or figure, `python -m analysis.NAME`; results beside them."""
