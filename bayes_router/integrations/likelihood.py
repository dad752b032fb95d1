"""What a fit of routes is scored on: the text's own next tokens, or all that the unpatched model says of them."""

from enum import Enum

from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn import functional as F

from bayes_router.inference.elbo import RoutingELBO
from bayes_router.inference.model import NextToken


class Likelihood(Enum):
    """Whose next tokens are observed."""

    MODEL = "model"  # the unpatched model's, in expectation over its whole distribution: self-distillation
    TEXT = "text"  # the text's, one draw a token: far noisier


class ExpectedToken(NextToken):
    """E_{y ~ teacher} log p(y | logits) in place of log p(y): the expected log likelihood of tokens that the teacher writes.

    It is minus the teacher's entropy minus KL(teacher || student); logits and teacher [B, T, V], the value is not read.
    """

    def __init__(self, logits: Tensor, teacher: Tensor):
        super().__init__(logits)
        self.teacher = teacher

    def log_prob(self, value: Tensor) -> Tensor:
        """[B, T], nats."""
        probability = self.teacher.float().softmax(-1)
        loss = F.cross_entropy(self.logits.flatten(0, -2), probability.flatten(0, -2).to(self.logits), reduction="none")
        return -loss.view(value.shape)


class TeacherELBO(RoutingELBO):
    """`RoutingELBO` whose observed tokens are the teacher's, in expectation; `teacher` holds its logits for the batch."""

    teacher: Tensor | None = None

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        if self.teacher is not None:
            observed = model_trace.nodes["targets"]
            observed["fn"] = ExpectedToken(observed["fn"].logits, self.teacher)
        return super()._differentiable_loss_particle(model_trace, guide_trace)


def entropy(teacher: Tensor) -> Tensor:
    """Entropy of the teacher's next token, nats, [B, T]; logits [B, T, V]."""
    log = teacher.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)
