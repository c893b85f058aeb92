"""Facts that hold for every objective of the registry: its definition, its invariances, its gradient, its edges.

What is true of one objective alone is beside this, a file each.
"""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from recray.config import Objective
from recray.objectives.family import Pool, ScoreBatch, find_loss, losses
from recray.objectives.registry import OBJECTIVES, own_settings, search_ranges, settings_of

USERS, OWNERS, NEGATIVES = 3, 4, 6
OTHER = {  # than the defaults, so that a setting that is not read shows
    "beta": 0.7,
    "target_margin": 0.4,
    "smoothing": 0.3,
    "gap_weight": 1.7,
    "preference_weight": 1.3,
    "pool_size": 3,
}


def variant(name: str, **more: Any) -> Objective:
    return Objective(name=name, **{key: OTHER[key] for key in settings_of(name) if key in OTHER}, **more)


PARTS = [{"boundary": True}, {"dual_margin": True}, {"boundary": True, "dual_margin": True}]
DYNAMIC = [variant(name, **part) for name in ("dmpo", "sdpo", "mppo") for part in PARTS]
EVERY = [*map(variant, OBJECTIVES), *(variant(name, nll_weight=0.6) for name in OBJECTIVES), *DYNAMIC]
BY_FIRST = ("dpo", "cpo", "simpo", "rosepo")  # one negative, the first usable


def spelled(objective: Objective) -> str:
    parts = [part for part in ("boundary", "dual_margin") if objective.settings.get(part)]
    return "-".join([objective.name, *parts, *(["anchored"] if objective.nll_weight == 0.6 else [])])


each_objective = pytest.mark.parametrize("objective", EVERY, ids=spelled)


def has_constant_beta(objective: Objective) -> bool:
    return not (objective.name == "dynamicpo" or objective.settings.get("dual_margin"))


# -- batches -------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What a batch is made of."""

    policy: Tensor
    reference: Tensor
    place: Tensor
    usable: Tensor  # of their own, [B, N]
    confidence: Tensor
    draw: Tensor
    margin: Tensor
    shared: Tensor  # [B, G, N]


def facts(seed: int = 0, users: int = USERS, negatives: int = NEGATIVES) -> Facts:
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    usable = uniform(users, negatives) < 0.7
    usable[:, 0] = True
    shared = uniform(users, OWNERS, negatives) < 0.6
    place = torch.tensor([2, 0, 3])[:users]
    shared[torch.arange(users), place] = usable
    scores = -4 * uniform(OWNERS, 1 + negatives), -4 * uniform(OWNERS, 1 + negatives)
    margin = uniform(users, OWNERS, negatives)
    return Facts(*scores, place, usable, uniform(users, negatives) - 0.5, uniform(users), margin, shared)


def batch_of(objective: Objective, given: Facts) -> ScoreBatch:
    score = given.policy - given.reference if objective.uses_reference else given.policy
    pool = Pool(score[:, 1:], given.shared, given.margin) if objective.has_margins else None
    return ScoreBatch(score, given.policy, given.place, given.usable, given.confidence, given.draw, pool)


def value(objective: Objective, given: Facts) -> Tensor:
    return losses(batch_of(objective, given), objective.name, objective.settings)


def gradient(objective: Objective, given: Facts) -> Tensor:
    policy = given.policy.clone().requires_grad_()
    return torch.autograd.grad(value(objective, given._replace(policy=policy)).sum(), policy)[0]


# -- definitions: loops over numbers, nothing stabilised -------------------------------------


class User(NamedTuple):
    """One user's numbers; negatives that are not usable are left out."""

    policy_positive: float
    policy: list[float]
    positive: float
    negative: list[float]
    confidence: list[float]
    draw: float
    pool: list[tuple[float, float]]  # score and margin of each that may be borrowed


def users_of(objective: Objective, given: Facts) -> Iterator[User]:
    batch = batch_of(objective, given)
    for i, place in enumerate(given.place.tolist()):
        mine = [n for n in range(NEGATIVES) if given.usable[i, n]]
        shared = [(j, n) for j in range(OWNERS) for n in range(NEGATIVES) if given.shared[i, j, n]]
        yield User(
            given.policy[place, 0].item(),
            [given.policy[place, 1 + n].item() for n in mine],
            batch.score[place, 0].item(),
            [batch.score[place, 1 + n].item() for n in mine],
            [given.confidence[i, n].item() for n in mine],
            given.draw[i].item(),
            [(batch.score[j, 1 + n].item(), given.margin[i, j, n].item()) for j, n in shared],
        )


def minus_log_sigmoid(x: float) -> float:
    return -math.log(1 / (1 + math.exp(-x)))


def minus_log_sigmoid_of_minus_log(total: float) -> float:
    return -math.log(1 / (1 + math.exp(math.log(total))))


def scatter(values: list[float]) -> float:
    middle = sum(values) / len(values)
    return sum((each - middle) ** 2 for each in values)


def plain_boundary(user: User) -> list[int]:
    """H: at least as high as the positive, else the highest of the best three clusters, all ways to cut tried."""
    above = [n for n, score in enumerate(user.policy) if score >= user.policy_positive]
    order = sorted(range(len(user.policy)), key=lambda n: -user.policy[n])
    if above or len(order) < 3:
        return above or order[:1]
    cuts = combinations(range(1, len(order)), 2)
    parts = [([*order[:a]], [*order[a:b]], [*order[b:]]) for a, b in cuts]
    return min(parts, key=lambda three: sum(scatter([user.policy[n] for n in part]) for part in three))[0]


def plain_beta(user: User, n: int, beta: float) -> float:
    boundary = plain_boundary(user)
    easy = [k for k in range(len(user.policy)) if k not in boundary] or boundary
    m1 = user.policy_positive - user.policy[n]
    m2 = user.policy[n] - sum(user.policy[k] for k in easy) / len(easy)
    return beta * (1 + 0.5 * math.tanh((m1 - m2 - 2) / (abs(m1) + abs(m2))))


def plain_pairs(user: User, chosen: Objective, scale: Callable[[float], float] = float) -> list[float]:
    """beta * (positive - negative) of each that counts, with DynamicPO's parts where they are on."""
    dynamic = chosen.name == "dynamicpo"
    counted = plain_boundary(user) if dynamic or chosen.settings.get("boundary") else range(len(user.negative))
    own = dynamic or chosen.settings.get("dual_margin")
    betas = {n: plain_beta(user, n, chosen.beta) if own else chosen.beta for n in counted}
    return [beta * (scale(user.positive) - scale(user.negative[n])) for n, beta in betas.items()]


def plain_napo(user: User, chosen: Any) -> float:
    return minus_log_sigmoid_of_minus_log(sum(math.exp(chosen.beta * (s - user.positive) + g) for s, g in user.pool))


def plain_sdpo(user: User, chosen: Any) -> float:
    return minus_log_sigmoid_of_minus_log(sum(math.exp(-gap) for gap in plain_pairs(user, chosen)))


def plain_dpo(user: User, chosen: Any) -> float:
    return minus_log_sigmoid(chosen.beta * (user.positive - user.negative[0]))


def plain_cross_entropy(user: User, chosen: Any) -> float:
    powers = [math.exp(chosen.beta * score) for score in (user.positive, *user.negative)]
    return -math.log(powers[0] / sum(powers))


def plain_simpo(user: User, chosen: Any) -> float:
    return minus_log_sigmoid(chosen.beta * (user.positive - user.negative[0]) - chosen.target_margin)


def plain_dmpo(user: User, chosen: Any) -> float:
    pairs = plain_pairs(user, chosen)
    return minus_log_sigmoid(sum(pairs) / len(pairs))


def plain_mppo(user: User, chosen: Any) -> float:
    return minus_log_sigmoid(sum(plain_pairs(user, chosen, math.exp)))


def plain_rosepo(user: User, chosen: Any) -> float:
    gap = chosen.beta * (user.positive - user.negative[0])
    doubt = chosen.smoothing * (0.5 - user.confidence[0])
    return (1 - doubt) * minus_log_sigmoid(gap) + doubt * minus_log_sigmoid(-gap)


def plain_recpo(user: User, chosen: Any) -> float:
    each = zip(user.negative, user.confidence, strict=True)
    total = sum(math.exp(chosen.beta * (s - user.positive) + chosen.gap_weight * (0.5 + c)) for s, c in each)
    return minus_log_sigmoid_of_minus_log(total)


def plain_rodpo(user: User, chosen: Any) -> float:
    top = sorted(range(len(user.policy)), key=lambda n: -user.policy[n])[: chosen.pool_size]
    drawn = user.negative[top[math.floor(user.draw * len(top))]]
    return chosen.preference_weight * minus_log_sigmoid(chosen.beta * (user.positive - drawn))


def plain_bpr(user: User, chosen: Any) -> float:
    return sum(minus_log_sigmoid(chosen.beta * (user.positive - s)) for s in user.negative) / len(user.negative)


PLAIN: dict[str, Callable[[User, Any], float]] = {
    "napo": plain_napo,
    "sdpo": plain_sdpo,
    "dpo": plain_dpo,
    "cross_entropy": plain_cross_entropy,
    "cpo": plain_dpo,  # on scores without a reference, and its anchor with every anchor below
    "simpo": plain_simpo,
    "dmpo": plain_dmpo,
    "mppo": plain_mppo,
    "rosepo": plain_rosepo,
    "recpo": plain_recpo,
    "dynamicpo": plain_dmpo,
    "rodpo": plain_rodpo,
    "bpr": plain_bpr,
}


def by_definition(objective: Objective, given: Facts) -> Tensor:
    each = [
        PLAIN[objective.name](user, objective) - objective.nll_weight * user.policy_positive
        for user in users_of(objective, given)
    ]
    return torch.tensor(each, dtype=torch.float64)


def test_every_objective_has_a_definition_here() -> None:
    assert PLAIN.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("seed", range(5))
@each_objective
def test_it_is_its_definition(objective: Objective, seed: int) -> None:
    given = facts(seed)
    assert_close(value(objective, given), by_definition(objective, given), rtol=1e-10, atol=1e-12)


# -- invariances -----------------------------------------------------------------------------


@each_objective
def test_the_order_of_users_does_not_matter(objective: Objective) -> None:
    given, order = facts(), torch.tensor([2, 0, 1])
    names = ("place", "usable", "confidence", "draw", "margin", "shared")
    moved = given._replace(**{name: getattr(given, name)[order] for name in names})
    assert_close(value(objective, moved), value(objective, given)[order], rtol=1e-12, atol=0)


@each_objective
def test_the_order_of_negatives_does_not_matter(objective: Objective) -> None:
    # But for which is the first, where only that is compared.
    given = facts()
    order = torch.tensor([0, 4, 2, 5, 1, 3] if objective.name in BY_FIRST else [5, 4, 2, 0, 1, 3])
    columns = torch.cat([torch.tensor([0]), 1 + order])
    moved = Facts(
        given.policy[:, columns],
        given.reference[:, columns],
        given.place,
        given.usable[:, order],
        given.confidence[:, order],
        given.draw,
        given.margin[:, :, order],
        given.shared[:, :, order],
    )
    assert_close(value(objective, moved), value(objective, given), rtol=1e-12, atol=0)


@each_objective
def test_a_users_loss_is_one_number_of_its_own(objective: Objective) -> None:
    given = facts()
    whole = value(objective, given)
    assert whole.shape == (USERS,)
    for i in range(USERS):
        mine = {name: getattr(given, name)[i : i + 1] for name in Facts._fields[2:]}
        assert_close(value(objective, given._replace(**mine)), whole[i : i + 1], rtol=1e-12, atol=0)


# -- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [each for each in EVERY if has_constant_beta(each)], ids=spelled)
def test_the_gradient_is_that_of_finite_differences(objective: Objective) -> None:
    given = facts()
    policy = given.policy.clone().requires_grad_()
    torch.autograd.gradcheck(lambda p: value(objective, given._replace(policy=p)), (policy,))


@pytest.mark.parametrize("objective", [each for each in EVERY if each.name != "rosepo"], ids=spelled)
def test_the_positive_is_pushed_up_and_no_negative_is(objective: Objective) -> None:
    # RosePO alone asks a doubted positive to lead by so much and no more.
    given = facts()
    found = gradient(objective, given)
    assert (found[given.place, 0] < 0).all()
    assert (found[:, 1:] >= 0).all()
    assert (found[:, 1:] > 0).any(dim=1)[given.place].all()


# -- masks -----------------------------------------------------------------------------------


@each_objective
def test_an_unusable_nan_reaches_neither_loss_nor_gradient(objective: Objective) -> None:
    given = facts()
    given.usable[:, 2] = False
    given.shared[:, :, 2] = False
    expected, slope = value(objective, given), gradient(objective, given)
    for table in (given.policy, given.reference):
        table[:, 3] = torch.nan
    given.confidence[:, 2] = torch.nan
    given.margin[:, :, 2] = torch.nan
    # Anomaly mode raises on a NaN anywhere in backward, also one that a mask hides later.
    with torch.autograd.set_detect_anomaly(True):
        found = gradient(objective, given)
    assert_close(value(objective, given), expected, rtol=0, atol=0)
    assert_close(found, slope, rtol=0, atol=0)
    assert (found[:, 3] == 0).all()


@each_objective
def test_a_user_without_a_usable_negative_is_silent(objective: Objective) -> None:
    given = facts()
    given.usable[0] = False
    given.shared[0] = False
    given.shared[:, given.place[0]] = False  # nor does it lend any
    with torch.autograd.set_detect_anomaly(True):
        found = gradient(objective, given)
    each = value(objective, given)
    assert each[0] == 0
    assert (each[1:] > 0).all()
    assert (found[given.place[0]] == 0).all()
    assert (found[given.place[1:]] != 0).any(dim=1).all()


# -- extremes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e37])
@each_objective
def test_extreme_scores_stay_finite(objective: Objective, size: float, dtype: torch.dtype) -> None:
    given = facts()
    given.policy[:, 0], given.policy[:, 1:] = -size, size
    given.policy[:, 4] = -size
    given = given._replace(policy=given.policy.to(dtype), reference=given.reference.to(dtype))
    if abs(size) < 1e5:
        given.reference[:, 0], given.reference[:, 1:] = size, -size
    assert value(objective, given).isfinite().all()
    assert gradient(objective, given).isfinite().all()


@each_objective
def test_bfloat16_scores_meet_in_float32(objective: Objective) -> None:
    given = facts()
    given.policy[:, 0] = -40.0
    zeros = torch.zeros_like(given.policy)
    coarse = given._replace(policy=given.policy.bfloat16(), reference=zeros.bfloat16(), margin=given.margin.float())
    found = value(objective, coarse)
    assert found.dtype == torch.float32
    fine = coarse._replace(policy=coarse.policy.float(), reference=coarse.reference.float())
    assert_close(found, value(objective, fine), rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.0, -1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_beta_must_be_positive(name: str, beta: float) -> None:
    objective = variant(name)
    with pytest.raises(ValueError, match="beta must be positive"):
        losses(batch_of(objective, facts()), name, objective.settings | {"beta": beta})


# -- the registry ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_line_names_a_function_and_what_a_batch_has(name: str) -> None:
    assert callable(find_loss(name))
    for read in OBJECTIVES[name].reads:
        assert isinstance(getattr(ScoreBatch, read), property) or read in ScoreBatch._fields
    assert set(settings_of(name)) <= Objective.model_fields.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_setting_that_is_passed_changes_the_loss(name: str) -> None:
    objective, changed = variant(name), {"nll_weight": 0.35, "pool_size": 1, "boundary": True, "dual_margin": True}
    given = facts(2)
    before = value(objective, given)
    for key in {*OTHER, *changed} & set(settings_of(name)):
        settings = objective.settings | {key: changed.get(key, 1.1 * OTHER.get(key, 0))}
        assert (losses(batch_of(objective, given), name, settings) != before).any(), key


def test_what_is_worth_searching_lies_within_bounds() -> None:
    for name in OBJECTIVES:
        for key, (low, high) in search_ranges(name).items():
            setting = own_settings()[key]
            assert setting.least <= low <= setting.default <= high <= (setting.most or math.inf)
