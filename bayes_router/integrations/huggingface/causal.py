"""A model trained here, as one of Hugging Face's: `AutoModelForCausalLM` opens its folder.

    import bayes_router.integrations.huggingface.causal  # registers the model type bayes_router
    model = AutoModelForCausalLM.from_pretrained("runs/tiny")

What it says is what HARD routes say. What it cannot do honestly it refuses by name: training (HARD
passes the routes no gradient), left padding, embeddings in the place of tokens, attention weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from bayes_router.attention.decoding.model_cache import RoutedCache
from bayes_router.checks import require
from bayes_router.hub import folder_of
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import mean_nll
from bayes_router.transformer.pretrained import (
    ARCHITECTURE,
    MODEL_TYPE,
    config_json,
    from_config_json,
)
from bayes_router.types import RoutingMode

OF_AUTO = ("adapter_kwargs", "trust_remote_code", "_from_auto", "_commit_hash", "code_revision")
"""What `AutoModelForCausalLM` adds of its own: there is neither an adapter nor code to fetch."""


class RoutedConfig(PreTrainedConfig):
    """config.json of a model trained here.

    Args:
        model: fields of `ModelConfig`.
        policy: of HARD, as `policy_to_dict` writes it.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        saved = {"model": dict(model or {}), "policy": dict(policy or {"name": "argmax"})}
        self.model, self.policy = saved["model"], saved["policy"]
        self.routed, _ = from_config_json({"model_type": MODEL_TYPE, **saved})
        self.vocab_size, self.hidden_size = self.routed.vocab_size, self.routed.d_model
        self.num_hidden_layers = self.routed.num_layers
        self.num_attention_heads = self.routed.num_heads
        self.num_key_value_heads = self.routed.kv_heads
        super().__init__(**{"tie_word_embeddings": True, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the settings once, not what is derived from them."""
        values: dict[str, Any] = super().to_dict()
        values.pop("routed", None)
        return values


class RunCache:
    """A `RoutedCache` by the names that `generate` asks a cache for."""

    is_compileable = False
    is_croppable = False

    def __init__(self, routed: RoutedCache):
        self.routed = routed

    def get_seq_length(self) -> int:
        """Tokens that the longest row holds."""
        return int(self.routed.lengths.max())

    def reorder_cache(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was."""
        self.routed.reorder(index.long())


@dataclass
class RoutedOutput(CausalLMOutputWithPast):
    """Logits and loss, and by which route.

    Attributes:
        concentration: of the posterior, [L, B, T, R, E].
        route: the expert that each token took, int64 [L, B, T, R].
    """

    concentration: Tensor | None = None
    route: Tensor | None = None


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A `RoutedLanguageModel` on its HARD routes, behind the interface of transformers."""

    config_class = RoutedConfig
    main_input_name = "input_ids"
    _is_stateful = True  # states of linear attention cannot be taken back: no assisted generation

    def __init__(self, config: RoutedConfig, model: RoutedLanguageModel | None = None):
        super().__init__(config)
        _, policy = from_config_json({"model_type": MODEL_TYPE, **config.to_dict()})
        self.model = model or RoutedLanguageModel(config.routed, policy)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The model has initialised itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens, which is the head too."""
        return self.model.network.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: a run keeps the vocabulary of its tokeniser."""
        raise ValueError(
            "embeddings: expected those of the run, whose vocabulary is its tokeniser's; got "
            f"{type(value).__name__}; fit a run with another tokeniser"
        )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: Path | str,
        *args: Any,
        config: RoutedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **others: Any,
    ) -> "RoutedForCausalLM":
        """The model of a run folder, of `save_pretrained`, or of a repository.

        Weights are compared with their checksum, as `RoutedLanguageModel.from_pretrained` does.

        Args:
            folder_or_name: see there.
            args: none.
            config: as `AutoModelForCausalLM` passes it; the folder's own decides.
            dtype: of the weights; "auto" and None keep float32, in which they are saved.
            device_map: one device for all: "cpu", "cuda:0", {"": 0}, "auto" where there is one.
            revision: branch, tag or commit of a repository.
            local_files_only: of a repository: take what the cache has and ask nobody.
            others: refused by name, but for those at their defaults.

        Raises:
            ValueError: an option that this model has no use for; or see there.
        """
        told = {name: value for name, value in others.items() if name not in OF_AUTO}
        _refuse(dict(enumerate(args)) | told, "from_pretrained")
        model = RoutedLanguageModel.from_pretrained(
            folder_of(folder_or_name, revision, local_files_only)
        )
        made = cls(_config_of(model), model)
        made.config.name_or_path = str(folder_or_name)
        if dtype not in (None, "auto"):
            made = made.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return made.to(_one_device(device_map)).eval()

    def save_pretrained(self, save_directory: Path | str, **others: Any) -> None:
        """`RoutedLanguageModel.save_pretrained`; other options are refused by name."""
        if others.pop("is_main_process", True):
            others.pop("state_dict", None)  # a trainer passes the model's own
            _refuse(others, "save_pretrained")
            self.model.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """`RoutedLanguageModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, private=private, token=token)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RunCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> RoutedOutput | tuple[Any, ...]:
        """Logits of the HARD routes, and the mean negative log-likelihood of `labels`.

        Args:
            input_ids: int64 [B, T]; they continue `past_key_values` where it is given.
            attention_mask: [B, T], 0 on the right of each row's tokens; what comes out there means
                nothing.
            past_key_values: of `new_cache`; the tokens are added to it.
            labels: int64 [B, T], moved by one inside; -100 is not scored. No gradient trains the
                routes by it: evaluation mode alone.
            use_cache: whether there is a cache is decided by `past_key_values`.
            logits_to_keep: 1 for those of each row's last token alone, 0 for all.
            return_dict: False gives a tuple.
            others: refused by name, but for None and False.

        Raises:
            ValueError: an input that this model cannot honour, by its name.
        """
        _refuse(others, "forward")
        require(input_ids is not None, "input_ids", "token ids [B, T]", None)
        assert input_ids is not None
        require(logits_to_keep in (0, 1), "logits_to_keep", "0 or 1", logits_to_keep)
        require(
            labels is None or not self.training,
            "labels",
            "evaluation mode, as HARD passes the routes no gradient",
            "training mode",
            "call eval(), or train on the ELBO: bayes_router.fit, or RoutingModel and Pyro's SVI",
        )
        cache = None if past_key_values is None else past_key_values.routed
        lengths = _lengths(attention_mask, input_ids, cache)
        out = self.model(
            input_ids,
            RoutingMode.HARD,
            cache=cache,
            last_only=logits_to_keep == 1 and labels is None,
            lengths=lengths,
        )
        loss = None if labels is None else _loss(out.logits, labels)
        said = RoutedOutput(
            loss=loss,
            logits=out.logits,
            past_key_values=past_key_values,
            concentration=out.concentration,
            route=out.route,
        )
        return said.to_tuple() if return_dict is False else said

    def new_cache(self, batch: int, capacity: int) -> RunCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        return RunCache(self.model.network.new_cache(batch, capacity))

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """`generate` gets a cache of this model's, of the length that it will need."""
        require(
            generation_config.cache_implementation is None,
            "cache_implementation",
            "none: the model has a cache of its own",
            generation_config.cache_implementation,
        )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rows = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs["past_key_values"] = self.new_cache(
                batch_size * rows, max_cache_length + 1
            )

    def generate(self, *args: Any, **options: Any) -> Any:
        """`generate` of transformers: greedy, sampling, beams, processors, streamers.

        Raises:
            ValueError: padding on the left, which moves the positions of the tokens; give prompts
                of one length, or `bayes_router.generate`, which takes a list of them.
        """
        mask = options.get("attention_mask")
        require(
            mask is None or bool(mask.bool().all()),
            "attention_mask",
            "prompts of one length",
            "padding",
            "generate row by row, or take bayes_router.generate, which takes a list of prompts",
        )
        return super().generate(*args, **options)


def _config_of(model: RoutedLanguageModel) -> RoutedConfig:
    about = config_json(model.config, model.policy)
    return RoutedConfig(about["model"], about["policy"], architectures=[ARCHITECTURE])


def _refuse(options: Mapping[Any, Any], where: str) -> None:
    """Nothing is accepted and ignored."""
    plain = (None, False)
    harmless = {"return_dict": True, "safe_serialization": True, "weights_only": True}
    for name, value in options.items():
        fine = any(value is one for one in plain) or harmless.get(name, plain) is value
        require(fine, str(name), f"nothing: {where} of this model has no use for it", value)


def _one_device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map: expected one device for the whole model; got {device_map!r}"
        ) from error


def _lengths(mask: Tensor | None, tokens: Tensor, cache: RoutedCache | None) -> Tensor | None:
    """[B] real tokens, from a mask with padding on the right; None where all are."""
    if mask is None or bool(mask.bool().all()):
        return None
    real = mask.bool()
    fine = (
        cache is None and real.shape == tokens.shape and bool((real[:, 1:] <= real[:, :-1]).all())
    )
    require(
        fine,
        "attention_mask",
        "1 for each token, then 0 for padding on the right, and none beside a cache",
        "another" if real.shape == tokens.shape else tuple(real.shape),
        "pad on the right (tokenizer.padding_side)",
    )
    return real.sum(1)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return mean_nll(logits[:, :-1], labels[:, 1:])


AutoConfig.register(MODEL_TYPE, RoutedConfig)
AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM)
