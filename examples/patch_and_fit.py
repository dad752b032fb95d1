"""Patch a Hugging Face model, fit its router to text, set a budget, save it and open it again.

Run it: `python examples/patch_and_fit.py`. The model is a tiny one with random weights, so that
nothing is downloaded; `AutoModelForCausalLM.from_pretrained(NAME)` and its tokenizer stand in its
place.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_router import Router, patch

SENTENCE = (
    "Four score and seven years ago our fathers brought forth on this continent a new nation. "
)


def tiny_model():
    """A Llama of two layers that reads bytes; the same weights every time."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()


def main(steps=50, budget=0.5):
    """Fit, spend a budget, save, load.

    The executed cost, and whether what was loaded says the same.
    """
    text = torch.tensor(list((SENTENCE * 60).encode()))
    model = tiny_model()
    router = patch(model, window=16, sinks=4, experts=("full", "local"))
    fitted = router.fit(text, steps=steps, context=128, batch_size=2, budget=budget)
    last = fitted.iloc[-1]
    print(
        f"fit: nll {last['nll']:.3f} nats per token, KL {last['kl']:.3f}, executed cost "
        f"{last['cost']:.3f}"
    )
    cost = router.set_budget(budget, context=128, tolerance=0.2)
    print(f"budget {budget}: executed cost {cost:.3f} on text that the fit did not read")
    prompt = text[None, :40]
    with torch.no_grad():
        before = model(prompt).logits
    for layer, statistics in enumerate(router.statistics(tokens=prompt)):
        print(f"layer {layer}: {statistics}")
    with tempfile.TemporaryDirectory() as folder:
        router.save_pretrained(folder)
        again = tiny_model()
        Router.from_pretrained(again, folder)
    with torch.no_grad():
        same = torch.equal(before, again(prompt).logits)
    print(f"loaded on a fresh model, it says the same: {same}")
    return cost, same


if __name__ == "__main__":
    main()
