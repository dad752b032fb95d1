"""Studies of pretrained models that are routed."""
