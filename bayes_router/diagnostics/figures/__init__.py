"""Figures: what is drawn."""
