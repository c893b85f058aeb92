"""BPR: Bayesian personalised ranking, the control that recommenders themselves were long trained with.

Axes:
    B  users
    N  negatives drawn for each

Reference: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback",
https://arxiv.org/abs/1205.2618, section 4.1.
"""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from recray.objectives.terms import checked_beta, lead, usable_mean


def bpr_loss(
    positive_score: Float[Tensor, " B"],
    negative_score: Float[Tensor, "B N"],
    usable: Bool[Tensor, "B N"],
    *,
    beta: float,
) -> Float[Tensor, " B"]:
    r"""Return one loss per user, unreduced.

        loss_i = mean_n -log sigmoid(beta * (s_pi - s_in))

    The mean over pairs is what drawing one of them a step expects; DMPO has it inside the logistic. BPR has no beta,
    which is 1, but its scores are not log-probabilities, whose scale is given. Its weight decay is the optimiser's.

    Args:
        positive_score: [B] `log pi(item | prompt)` of the positive, in nats: no reference is subtracted.
        negative_score: [B, N] the same of each negative.
        usable: [B, N] which negatives count; the mean is over these.
        beta: Factor of the scores; must be positive.

    Returns:
        [B] loss in nats, float32 or wider; 0 and no gradient where no negative is usable.

    Raises:
        ValueError: If beta is not positive.

    >>> import torch
    >>> bpr_loss(torch.zeros(1), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), beta=1.0)
    tensor([0.6931])
    """
    each = -logsigmoid(checked_beta(beta) * lead(positive_score[:, None], negative_score, usable))
    return usable_mean(each, usable)
