"""Serve a routed model: a static cache, and on a GPU its prompts and steps from CUDA graphs.

Memory for all keys at once, no growth while it generates, and with `graphs` no launches on the
host: prompts are captured by length, a step once, and taken again for the next batch of requests.

Run it: `python examples/serve_static_cache.py`. Requests of different lengths are padded on the
left; on a CPU, which has no graphs, the same calls run as they are called.
"""

import torch
from patch_and_fit import SENTENCE, tiny_model

from bayes_router import patch


def main(new_tokens=12, steps=20):
    """Answer batches of requests under both caches; the tokens, which are the same."""
    text = torch.tensor(list((SENTENCE * 60).encode()))
    model = tiny_model()
    router = patch(model, window=16, sinks=4, experts=("full", "local"))
    router.fit(text, steps=steps, context=64, batch_size=2, budget=0.6)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    router.graphs = device.type == "cuda"  # one setting; generate() stays what it is
    answers = []
    for requests in ([text[:40], text[90:110]], [text[34:74], text[5:45]]):
        longest = max(map(len, requests))
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, longest - len(request) :] = request
            mask[row, longest - len(request) :] = 1
        common = {
            "attention_mask": mask.to(device),
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        # as long for every batch, so that keys and graphs of the last one are taken again
        static = {"cache_implementation": "static", "max_cache_len": 128}
        answers.append(model.generate(tokens.to(device), **static, **common))
        replayed = router.last.replayed
        growing = model.generate(tokens.to(device), **common)
        for row, answer in enumerate(answers[-1][:, longest:].tolist()):
            print(f"request {row}: {answer}")
        same = torch.equal(answers[-1], growing)
        print(f"the same as with a cache that grows: {same}; from a graph: {replayed}")
        assert same
    return answers


if __name__ == "__main__":
    main()
