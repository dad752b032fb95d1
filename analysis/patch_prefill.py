"""Does routing a pretrained architecture save time in prefill? `python -m analysis.patch_prefill [--device D]`.

A Llama with the layers of SmolLM2-135M (hidden 576, 9 query and 3 key heads of 64), some of them, random weights; time does not
hang on them. Unpatched, patched with every token on full, and routed by drawn routes: full and local with sinks. The three take
turns; medians, ratios to the unpatched model.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_router.attention.latency import device_name, isolated_ms
from bayes_router.integrations.patching import patch
from bayes_router.training.distributed import pick_device

RESULTS = Path(__file__).parent / "results"


def build(layers: int, device: torch.device) -> LlamaForCausalLM:
    """The model; bfloat16 on a GPU."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65_536,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device).eval()
    return model.to(torch.bfloat16) if device.type == "cuda" else model


@torch.no_grad()
def measure(layers: int, length: int, window: int, share: float, repeats: int, device: torch.device) -> list[dict[str, object]]:
    """One row a variant."""
    model = build(layers, device)
    plain = copy.deepcopy(model)
    router = patch(model, window=window, sinks=4, experts=("full", "local"), context=length)
    tokens = torch.randint(1024, (1, length), device=device)
    drawn = (torch.rand(layers, 1, length, device=device) >= share).long()  # 0 full, 1 local

    def routed(route: Callable[[int, Tensor], Tensor | int]) -> Callable[[], object]:
        def call() -> object:
            with router.routed_by(route):
                return model(tokens, use_cache=True, logits_to_keep=1)

        return call

    calls: dict[str, Callable[[], object]] = {
        "unpatched": lambda: plain(tokens, use_cache=True, logits_to_keep=1),
        "every token on full": routed(lambda layer, hidden: 0),
        "routed": routed(lambda layer, hidden: drawn[layer]),
    }
    turns = [{name: isolated_ms(call, device)[1] for name, call in calls.items()} for _ in range(repeats + 1)][1:]
    rows: list[dict[str, object]] = []
    for name in calls:
        ratio = statistics.median(turn[name] / turn["unpatched"] for turn in turns)
        median = statistics.median(turn[name] for turn in turns)
        rows.append({"T": length, "variant": name, "prefill_ms": median, "over_unpatched": ratio})
    return rows


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.5, help="of tokens on full")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = pick_device(options.device)
    rows = []
    for length in options.lengths:
        rows += measure(options.layers, length, options.window, options.share, options.repeats, device)
    table = pd.DataFrame(rows)
    table["window"], table["share_on_full"], table["layers"] = options.window, options.share, options.layers
    table["device"], table["torch"] = device_name(device), torch.__version__
    path = RESULTS / f"patch_prefill_{device.type}.csv"
    table.to_csv(path, index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
