"""Studies of models trained from scratch."""
