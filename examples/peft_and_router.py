"""A LoRA of PEFT and a router on one model: trained together, saved apart, put together again.

Run it: `python examples/peft_and_router.py` (needs peft). The base weights stay; the adapter moves
under routes that are drawn, and the router learns beside it.
"""

import tempfile
from pathlib import Path

import torch
from patch_and_fit import SENTENCE, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from bayes_router import Router, patch


def main(steps=30):
    """Train both; the losses first and last, and whether what was loaded says the same."""
    text = torch.tensor(list((SENTENCE * 60).encode()))
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], init_lora_weights=True
    )
    model = get_peft_model(tiny_model(), lora)
    router = patch(model, window=16, sinks=4, experts=("full", "local"))
    router.requires_grad_(True)
    added = [p for p in [*model.parameters(), *router.parameters()] if p.requires_grad]
    optimiser = torch.optim.AdamW(added, lr=1e-2)
    losses = []
    model.train()
    for step in range(steps):
        window = text[64 * (step % 60) :][None, :64]
        loss = model(window, labels=window).loss
        objective = loss + 0.01 * router.kl()  # a negative ELBO, its KL weighted
        optimiser.zero_grad()
        objective.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    how = router.statistics(tokens=window)[0]
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; executed {how}")
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(text[None, :40]).logits
        model.save_pretrained(Path(folder) / "adapter")
        router.save_pretrained(Path(folder) / "router")
        again = PeftModel.from_pretrained(tiny_model(), Path(folder) / "adapter").eval()
        Router.from_pretrained(again, Path(folder) / "router")
        same = torch.allclose(before, again(text[None, :40]).logits)
    print(f"loaded apart and put together, they say the same: {same}")
    return losses, same


if __name__ == "__main__":
    main()
