"""Saving what a patch added, to a folder or to the hub."""

from typing import Any

from bayes_router.checks import require
from bayes_router.data.stream import TokenStream
from bayes_router.hub import Sent
from bayes_router.integrations.patch.accounts import Accounted
from bayes_router.integrations.patch.identity import Identity
from bayes_router.integrations.patch.saving import PatchRecord, save_patch


class Savable(Accounted, Sent):
    """A routed model whose added parts can be written, without the model."""

    held_out: TokenStream | None = None
    made_for: Identity | None

    def save(self, folder: Any, held_out: bool = False) -> None:
        """Write what was added, see `load_patch`. None of your text is written, unless asked for.

        With `held_out` also up to 32,768 tokens of the text that `fit` held out, as they are, for
        `bayes-router inspect` and `report` to show; without them these ask for a text.

        Warns:
            UserWarning: the model's own weights moved since the patch (a fit with `weights_lr`,
                training of your own): the patch then fits that model alone, which has to be saved
                beside it.
        """
        lacking = held_out and self.held_out is None
        fix = "fit keeps the end of its text; or save without, and give the report a text"
        require(not lacking, "held_out", "text that fit held out", None, fix)
        record = PatchRecord(
            self.model, type(self).__name__, self.state_dict(), self.settings, self.policy,
            self.fitted, self.made_for,
            self.held_out if held_out else None, self.controller.evidence, self.controller.risk,
            self.frozen,
        )  # fmt: skip
        save_patch(record, folder)

    def save_pretrained(self, folder: Any, held_out: bool = False) -> None:
        """`save`, by the name that Hugging Face's models have for it.

        `Router.from_pretrained` reads it.
        """
        self.save(folder, held_out)
