"""Serve a routed model with a static cache.

Memory for all keys at once, no growth while it generates.

Run it: `python examples/serve_static_cache.py`. Requests of different lengths are padded on the
left.
"""

import torch
from patch_and_fit import SENTENCE, tiny_model

from bayes_router import patch


def main(new_tokens=12, steps=20):
    """Answer a batch of requests under both caches; the tokens, which are the same."""
    text = torch.tensor(list((SENTENCE * 60).encode()))
    model = tiny_model()
    router = patch(model, window=16, sinks=4, experts=("full", "local"))
    router.fit(text, steps=steps, context=64, batch_size=2, budget=0.6)
    requests = [text[:40], text[90:110]]
    longest = max(map(len, requests))
    tokens = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, request in enumerate(requests):
        tokens[row, longest - len(request) :] = request
        mask[row, longest - len(request) :] = 1
    common = {
        "attention_mask": mask,
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    static = model.generate(tokens, cache_implementation="static", **common)
    growing = model.generate(tokens, **common)
    for row, answer in enumerate(static[:, longest:].tolist()):
        print(f"request {row}: {answer}")
    print(f"the same as with a cache that grows: {torch.equal(static, growing)}")
    return static, growing


if __name__ == "__main__":
    main()
