"""Which tokens a fitted patch sends to full attention, kept for `analysis.speed.patched`.

    python -m analysis.speed.recorded_routes MODEL analysis/results/routes_smollm2_8192.npz

MODEL is the folder of SmolLM2-135M-Instruct (`patches/smollm2-135m` says of which file). The text
is the end of the State of the Union addresses, on a CPU in float32; the policy is the patch's own.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from analysis.speed.patched_model import write_routes
from bayes_router.data.text import load_corpus
from bayes_router.integrations.huggingface.loading import load_base
from bayes_router.integrations.patching import load_patch


@torch.no_grad()
def main() -> None:
    """Read the text once and write what was executed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patch", default="smollm2-135m-teacher")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    model = load_base(str(args.model), None, torch.device("cpu"))
    router = load_patch(model, args.patch)
    router.full_up_to = 0  # routes are read at every length
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = load_corpus(args.corpus).documents
    text = b"".join(d if isinstance(d, bytes) else d.encode() for d in documents).decode()[
        -10 * args.tokens :
    ]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, -args.tokens :]
    model(ids, use_cache=False, logits_to_keep=1)
    full = router.experts.index("full")
    routes = [router.last.executed[index][0] == full for index in range(len(router.layers))]
    write_routes(args.out, torch.stack(routes))
    shares = [float(route.float().mean()) for route in routes]
    print(f"{sum(shares) / len(shares):.3f} on full; by layer", *(f"{x:.2f}" for x in shares))


if __name__ == "__main__":
    main()
