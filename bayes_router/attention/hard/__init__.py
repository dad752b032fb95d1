"""Hard routing: one expert a token, computed by a backend."""
