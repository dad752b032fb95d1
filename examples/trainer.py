"""Train a patched model and its router together by Hugging Face's Trainer.

It logs KL, cost and load.

Run it: `python examples/trainer.py`. Give `report_to="tensorboard"` or "wandb" and the figures go
there.
"""

import tempfile

import torch
from patch_and_fit import SENTENCE, tiny_model
from transformers import TrainingArguments

from bayes_router import patch
from bayes_router.integrations.huggingface.trainer import RoutingTrainer


class Windows(torch.utils.data.Dataset):
    """Neighbouring windows of a text, each its own labels."""

    def __init__(self, text, length):
        self.windows = text[: len(text) // length * length].view(-1, length)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main(steps=60, folder=None):
    """Train for some steps; what was logged, a row a time."""
    text = torch.tensor(list((SENTENCE * 60).encode()))
    model = tiny_model()
    patch(model, window=16, sinks=4, experts=("full", "local"))
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            folder or temporary,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=max(steps // 3, 1),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = RoutingTrainer(model=model, args=arguments, train_dataset=Windows(text, 64))
        trainer.train()
        if folder:
            trainer.save_model()  # the model, and the patch beside it
    rows = [row for row in trainer.state.log_history if "routing_kl" in row]
    for row in rows:
        print(
            f"loss {row['loss']:.3f}  KL {row['routing_kl']:.3f}  executed cost "
            f"{row['routing_cost']:.3f}"
        )
    return rows


if __name__ == "__main__":
    main()
