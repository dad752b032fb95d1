"""What `inspect` and `report` open.

A run folder, or the folder of a saved patch with the model that it belongs to.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch
from jsonargparse import Namespace

from bayes_router.checks import require
from bayes_router.config import config_from_dict
from bayes_router.data.load import load_data
from bayes_router.data.stream import MaskedStream
from bayes_router.data.text import load_corpus, split_documents
from bayes_router.data.tokens import TokenDataset, TokenSource
from bayes_router.diagnostics.fitted import FittedRun, fitted_patch, load_fitted
from bayes_router.integrations.patch.saving import is_patch, read_origin
from bayes_router.integrations.patching import load_patch
from bayes_router.training.distributed import pick_device

if TYPE_CHECKING:
    from bayes_router.integrations.huggingface.loading import PretrainedTokeniser
    from bayes_router.integrations.huggingface.model import RoutedPretrained

CONTEXT = 512  # tokens of a window of a patched model, at most, unless asked for
LEAST_WINDOWS = 4  # of a short text


def read_text(path: Optional[Path]) -> Optional[bytes]:
    """The bytes of a file; ValueError where there is none."""
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"text: expected a file; {path} does not exist; correct the path")
    return path.read_bytes()


def open_fitted(options: Namespace, text: Optional[bytes] = None) -> FittedRun:
    """The fit that `options.run` holds, with its held-out text where it is not the run's own.

    Raises:
        ValueError: the folder is neither a run nor a patch, the base model is missing or another,
            or there is no text.
    """
    if is_patch(options.run):
        return _open_patch(options, text)
    for name in ("base", "gguf_file", "context"):
        require(
            options[name] is None,
            name,
            "none for a run (a patch has a base model)",
            options[name],
            "leave it out",
        )
    fitted = load_fitted(options.run, str(pick_device(options.device)))
    if options.corpus is not None:
        config, data = load_data(
            config_from_dict({"data": {"corpus": options.corpus}}, fitted.config)
        )
        known, got = fitted.config.model.vocab_size, config.model.vocab_size
        require(
            known == got,
            "corpus",
            f"one of the run's vocabulary, {known} ids",
            f"{options.corpus} with {got}",
        )
        return FittedRun(**{**vars(fitted), "config": config, "held_out": data.valid})
    return fitted


def _open_patch(options: Namespace, text: Optional[bytes]) -> FittedRun:
    # transformers, where it is needed
    from bayes_router.integrations.huggingface.loading import load_base, load_tokeniser_of

    origin = read_origin(options.run)
    kind, name = origin.model, origin.base
    made_for = f"{kind or 'model'}{f' ({name})' if name else ''}"
    require(
        origin.router != "RoutedTorch",
        "run",
        "the patch of a language model, whose tokens can be shown and scored",
        f"{options.run}, the patch of a torch module {kind}",
        "it reads tensors, not tokens: see statistics() and kl() of what load_patch returns, after "
        "a pass",
    )
    require(
        options.base is not None,
        "base",
        f"the {made_for} that the patch {options.run} was made for",
        None,
        f"give --base {name or 'FOLDER, or its Hugging Face name'}",
    )
    device = torch.device(pick_device(options.device))
    model = load_base(options.base, options.gguf_file, device, kind)
    router = load_patch(model, options.run)
    tokeniser = load_tokeniser_of(options.base, options.gguf_file, router.config.vocab_size)
    shown, source = _held_out(options, text, router, tokeniser)
    context = _context(options.context, router.fitted, model, source)
    return fitted_patch(
        router, source, context=context, tokeniser=tokeniser, path=options.run, name=shown
    )


def _held_out(
    options: Namespace,
    text: Optional[bytes],
    router: "RoutedPretrained",
    tokeniser: "PretrainedTokeniser | None",
) -> tuple[str, TokenSource]:
    """What a patch is read on, and its name: a corpus, what the fit held out, or the given text."""
    needs = "a base model with a tokenizer, to read text"
    if options.corpus is not None:
        require(tokeniser is not None, "corpus", needs, options.base, _NO_TOKENIZER)
        assert tokeniser is not None
        documents = split_documents(load_corpus(options.corpus))[1]
        return options.corpus, _stream(documents, tokeniser, options.corpus, router.causal)
    if router.held_out is not None:
        return "the fit", router.held_out
    if text is None:
        raise ValueError(
            f"text: expected held-out text; the patch {options.run} was saved without any; give "
            f"--corpus NAME or --text FILE"
        )
    require(tokeniser is not None, "text", needs, options.base, _NO_TOKENIZER)
    assert tokeniser is not None
    fix = "name a file with text in it"
    require(len(text) > 0, "text", "at least one token", "an empty text", fix)
    return options.text.name, _stream([text], tokeniser, options.text.name, router.causal)


def _stream(
    documents: Sequence[bytes], tokeniser: "PretrainedTokeniser", name: str, causal: bool
) -> TokenDataset:
    """Next tokens to predict, or for an encoder hidden ones."""
    text = TokenDataset(documents, tokeniser, name)
    if causal:
        return text
    require(
        tokeniser.mask_token is not None,
        "tokenizer",
        "one with a mask token, for an encoder",
        tokeniser.name,
    )
    assert tokeniser.mask_token is not None
    return MaskedStream(text.tokens.long(), tokeniser.vocab_size, tokeniser.mask_token, name)


_NO_TOKENIZER = "put its tokenizer files beside the model"


def _context(asked: Optional[int], fitted: object, model: object, source: TokenSource) -> int:
    """Tokens of a window: as asked, else those of the fit up to `CONTEXT`.

    Fewer where the text is short.
    """
    require(asked is None or asked >= 1, "context", "at least 1 token", asked)
    assert isinstance(source, TokenDataset)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or CONTEXT
    wanted = asked or min(int(getattr(fitted, "context", CONTEXT)), CONTEXT)
    require(
        wanted <= positions, "context", f"at most the {positions} positions of the model", wanted
    )
    return max(1, min(wanted, (len(source) - 1) // LEAST_WINDOWS))
