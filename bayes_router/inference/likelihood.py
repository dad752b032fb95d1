"""Likelihoods: what the output of a network says of the targets.

Any callable from it to a distribution is one.
"""

from collections.abc import Callable
from enum import Enum

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from bayes_router.transformer.nll import token_nll

Likelihood = Callable[[Tensor], dist.TorchDistribution]
"""Output of the network [B, ...] -> a distribution of batch shape [B, T], or [B, 1] for one
target a row."""


class NextToken(dist.TorchDistribution):
    """Categorical over the vocabulary by logits [..., V].

    Its log density is the fused one of cross-entropy; float32 at least.
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.nonnegative_integer

    def __init__(self, logits: Tensor):
        self.logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        super().__init__(logits.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, [...]."""
        logits, value = self._together(value)
        return -token_nll(logits, value)

    def _together(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and value of one shape: particles and draws share what they are compared with."""
        if value.shape == self.batch_shape:
            return self.logits, value
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return self.logits.expand(*shape, -1), value.expand(shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Token ids, int64."""
        return torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(
            sample_shape
        )

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "NextToken":
        """Broadcast over outer plates (particles)."""
        return type(self)(self.logits.expand((*batch_shape, self.logits.shape[-1])))


class ExpectedToken(NextToken):
    """E_{y ~ teacher} log p(y | logits) in place of log p(y).

    The expected log likelihood of tokens that the teacher writes.

    It is minus the teacher's entropy minus KL(teacher || student); logits and teacher [..., V].

    Args:
        logits: of the student.
        teacher: logits of the teacher.
        text: share of the observation that is the value itself: the expectation is then under
            text * [y = value] + (1 - text) * teacher. 0 reads no value.
    """

    def __init__(self, logits: Tensor, teacher: Tensor, text: float = 0.0):
        super().__init__(logits)
        self.teacher, self.text = teacher, text

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, [...]."""
        logits, value = self._together(value)
        teacher = self.teacher.expand_as(logits).float().softmax(-1)
        if self.text:
            seen = value[..., None].clamp_min(0)  # what is not scored is masked later
            share = torch.full_like(seen, self.text, dtype=teacher.dtype)
            teacher = (teacher * (1 - self.text)).scatter_add(-1, seen, share)
        loss = F.cross_entropy(
            logits.flatten(0, -2), teacher.flatten(0, -2).to(logits), reduction="none"
        )
        return -loss.view(value.shape)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "ExpectedToken":
        """Broadcast over outer plates (particles)."""
        shape = (*batch_shape, self.logits.shape[-1])
        return ExpectedToken(self.logits.expand(shape), self.teacher.expand(shape), self.text)


class Teacher:
    """The likelihood of self-distillation.

    `logits` holds what the teacher says of the batch at hand; None: the text's own tokens are
    scored. `text` is their share beside a teacher, see `ExpectedToken`. `student` is what was said
    last beside a teacher.
    """

    logits: Tensor | None = None
    student: Tensor | None = None
    text: float = 0.0

    def __call__(self, output: Tensor) -> NextToken:
        """See `Likelihood`."""
        if self.logits is None:
            return NextToken(output)
        self.student = output.detach()
        return ExpectedToken(output, self.logits, self.text)


class Observed(Enum):
    """Whose next tokens a fit of a patch observes."""

    # the unpatched model's, in expectation over its whole distribution: self-distillation
    MODEL = "model"
    TEXT = "text"  # the text's, one draw a token: noisier, and the model may get better at them
    BOTH = "both"  # half of each

    @property
    def text(self) -> float:
        """The share of the text."""
        return {Observed.MODEL: 0.0, Observed.TEXT: 1.0, Observed.BOTH: 0.5}[self]
