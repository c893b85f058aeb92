"""The step in score space against plain autograd through everything, and what it reports."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recray.config import Lora, Objective
from recray.lm.layout import candidate_layout
from recray.lm.lora import add_adapter
from recray.lm.scorer import ItemScorer, segments_of, sum_by_slot, to_device
from recray.objectives import sharing
from recray.objectives.family import Pool, ScoreBatch, losses
from recray.objectives.margins import per_negative_margin
from recray.objectives.napo import napo_loss
from recray.objectives.registry import OBJECTIVES
from recray.objectives.sdpo import sdpo_loss
from recray.objectives.watching import WATCHED
from recray.train.feeding import AlignFeed, Share, StreamFeed, windows_of
from recray.train.order import Order, rows_of_step
from recray.train.reference import scores_of_copy, scores_without_adapter
from recray.train.step import AlignStep, MarginCentre, learning_rate_at, stream_step
from recray.train.units import MicroBatch, Unit
from recray.train.validation import ValidationRows, validate

ORDER = Order(num_rows=24, global_batch=9, seed=5)


class Recorder:
    """An engine that keeps gradients instead of stepping."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.boundaries: list[bool] = []
        self.gradients: list[Tensor] = []

    device = torch.device("cpu")

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.boundaries.append(last)
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.gradients = [p.grad.clone() for p in self.module.parameters() if p.requires_grad]
        self.module.zero_grad()
        return learning_rate

    def whole_weights(self) -> dict[str, Tensor]:
        raise NotImplementedError

    save = load = whole_weights


def feed_of(world: Any, share: Share, objective: Objective) -> AlignFeed:
    return AlignFeed(world.shards, world.catalogue, world.item_vectors, ORDER, share, objective, num_negatives=4)


def by_autograd(world: Any, objective: Objective, step: int) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the same global batch, with no score ever cut off from the graph."""
    scorer = world.scorer(torch.float64)
    examples = world.shards.take(rows_of_step(ORDER, step))
    packed = to_device(candidate_layout(segments_of(world.catalogue, examples.histories, list(examples.items))), "cpu")
    score = sum_by_slot(scorer(packed), packed).view(9, 5)
    ratio = score - torch.from_numpy(examples.reference)
    arrays = feed_of(world, Share(1, 10**6), objective).unit(step, 0).arrays
    back = np.argsort(arrays["place"])
    usable = torch.from_numpy(arrays["usable"][back])
    sure = torch.from_numpy(arrays["confidence"][back])
    if objective.name == "napo":
        margin = per_negative_margin(sure.double(), base=objective.margin_base, slope=objective.margin_slope)
        losses = napo_loss(ratio[:, 0], ratio[:, 1:], margin, usable, beta=objective.beta)
    else:
        own = torch.ones(9, 4, dtype=torch.bool)
        losses = sdpo_loss(ratio[:, 0], ratio[:, 1:], own, beta=objective.beta)
    loss = losses.mean()
    return loss.item(), list(torch.autograd.grad(loss, list(scorer.parameters())))


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    flat = [torch.cat([g.flatten() for g in each]) for each in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("share", [Share(1, 10**6), Share(1, 10**6, 3), Share(1, 70)])
@pytest.mark.parametrize("name", ["napo", "sdpo"])
def test_the_gradient_is_that_of_the_whole_global_batch(world: Any, name: str, share: Share) -> None:
    objective = Objective(name=name, beta=0.5)
    engine = Recorder(world.scorer(torch.float64))
    unit = feed_of(world, share, objective).unit(1, 0)
    result = AlignStep(objective, MarginCentre())(engine, unit, learning_rate=0.0)
    loss, gradients = by_autograd(world, objective, 1)
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-10)
    assert relative_error(engine.gradients, gradients) < 1e-10
    assert engine.boundaries == [False] * (len(unit.micro_batches) - 1) + [True]


def drawn_by_step(world: Any, objective: Objective, share: Share) -> Tensor:
    """The draw of each row of step 1, by its place, as the objective gets it."""
    found = torch.zeros(9, dtype=torch.float64)
    for rank in range(share.world_size):
        unit = feed_of(world, share, objective).unit(1, rank)
        step = AlignStep(objective, MarginCentre())
        table = torch.zeros(9, 5, dtype=torch.float64)
        batch = step._batch(table, table, unit, slice(None), 0.0)
        found[batch.place] = batch.draw
    return found


def test_draws_are_the_rows_own_however_the_batch_is_cut(world: Any) -> None:
    objective = Objective(name="rodpo")
    whole = drawn_by_step(world, objective, Share(1, 10**6))
    assert torch.equal(drawn_by_step(world, objective, Share(3, 70)), whole)
    assert len(whole.unique()) == 9
    assert ((whole >= 0) & (whole < 1)).all()


def test_a_confidence_is_the_borrowers_in_the_owners_negative(world: Any) -> None:
    unit = feed_of(world, Share(1, 10**6), Objective()).unit(1, 0)
    examples = world.shards.take(rows_of_step(ORDER, 1))
    sample = feed_of(world, Share(1, 10**6), Objective())._sample_vectors.numpy()
    items = world.item_vectors.numpy()[examples.items[:, 1:]]
    for sure, place in zip(unit.arrays["confidence"], unit.arrays["place"], strict=True):
        liking, others = items @ examples.vector[place], sample @ examples.vector[place]
        below = (others < liking[:, :, None] - 1e-5).mean(axis=2)
        up_to = (others < liking[:, :, None] + 1e-5).mean(axis=2)
        # Half a place of the 30 sampled: the last bit decides whether an item is level with itself.
        np.testing.assert_allclose(sure, 0.5 - (below + up_to) / 2, atol=0.6 / 30)


def test_what_shares_nothing_has_its_own_part_as_if_it_shared(world: Any) -> None:
    shared, own = (feed_of(world, Share(2, 70), Objective(name=name)).unit(1, 1).arrays for name in ("napo", "recpo"))
    assert own["place"].tolist() == shared["place"].tolist()
    mine = np.arange(own["place"].size), own["place"]
    np.testing.assert_array_equal(own["confidence"][:, 0], shared["confidence"][mine])
    assert own["usable"].shape == (own["place"].size, 1, 4)
    assert own["usable"].all()


def tokens_of(world: Any, items: np.ndarray) -> Tensor:
    """How many tokens each item's score is a sum over: those of its title, and the end."""
    lengths = torch.from_numpy(np.asarray(world.catalogue.item_lengths))
    return lengths[torch.from_numpy(items.astype(np.int64))].double()


def over_all(objective: Objective, policy: Tensor, reference: Tensor, unit: Unit, draw: Tensor) -> Tensor:
    """The mean loss of a global batch that one rank has whole, with no score cut off from the graph."""
    score = policy - reference if objective.uses_reference else policy
    back = np.argsort(unit.arrays["place"])
    usable, sure = (torch.from_numpy(unit.arrays[name][back]) for name in ("usable", "confidence"))
    margin = per_negative_margin(sure.double(), base=objective.margin_base, slope=objective.margin_slope)
    own, pool = torch.arange(9), Pool(score[:, 1:], usable, margin)
    mine = own, own if objective.shares_scores else 0
    batch = ScoreBatch(score, policy, own, usable[mine], sure[mine].double(), draw, pool)
    return losses(batch, objective.name, objective.settings).mean()


FAMILY = [
    *(Objective(name=name, beta=0.5) for name in OBJECTIVES),
    *(
        Objective(name=name, beta=0.5, length_normalised=not Objective(name=name).length_normalised)
        for name in OBJECTIVES
    ),
    Objective(name="dmpo", beta=0.5, boundary=True, nll_weight=0.3),
    Objective(beta=0.5, nll_weight=0.3, length_normalised=True),
]


@pytest.mark.parametrize("objective", FAMILY, ids=lambda each: f"{each.name}-{each.length_normalised}")
def test_every_objectives_gradient_is_that_of_plain_autograd(world: Any, objective: Objective) -> None:
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    rng = np.random.default_rng(3)
    every, reference = (torch.from_numpy(rng.normal(-30, 2, size=(9, 5))) for _ in range(2))
    lengths = torch.from_numpy(rng.integers(2, 9, size=(9, 5)).astype(float)) if objective.length_normalised else None
    found = AlignStep(objective, MarginCentre())._differentiate(every, reference, unit, lengths)
    leaf = every.clone().requires_grad_()
    length = 1.0 if lengths is None else lengths
    loss = over_all(
        objective, leaf / length, reference / length, unit, drawn_by_step(world, objective, Share(1, 10**6))
    )
    assert found.metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(found.grad, torch.autograd.grad(loss, leaf)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share", [Share(1, 10**6), Share(1, 10**6, 3)])
def test_scores_are_normalised_by_the_tokens_they_are_sums_over(world: Any, share: Share) -> None:
    objective = Objective(beta=0.5, length_normalised=True, sharing_fraction=1.0)
    engine = Recorder(world.scorer(torch.float64))
    result = AlignStep(objective, MarginCentre())(
        engine, feed_of(world, share, objective).unit(1, 0), learning_rate=0.0
    )
    scorer = world.scorer(torch.float64)
    examples = world.shards.take(rows_of_step(ORDER, 1))
    packed = to_device(candidate_layout(segments_of(world.catalogue, examples.histories, list(examples.items))), "cpu")
    each = sum_by_slot(scorer(packed), packed).view(9, 5), torch.from_numpy(examples.reference)
    policy, reference = (scores / tokens_of(world, examples.items) for scores in each)
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    loss = over_all(objective, policy, reference, unit, torch.zeros(9))
    assert result.metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert relative_error(engine.gradients, list(torch.autograd.grad(loss, list(scorer.parameters())))) < 1e-9


def test_what_is_watched_is_the_same_however_a_batch_is_cut(world: Any) -> None:
    objective = Objective(beta=0.5, sharing_fraction=1.0)
    found = []
    for share in (Share(1, 10**6), Share(1, 10**6, 3)):
        unit = feed_of(world, share, objective).unit(1, 0)
        metrics = AlignStep(objective, MarginCentre())(Recorder(world.scorer()), unit, learning_rate=0.0).metrics
        found.append([metrics[name] for name in (*WATCHED, "log_pool")])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    assert sum(found[0][:2]) == pytest.approx(1.0)
    counts = unit.arrays["usable"].sum(axis=(1, 2))
    assert found[0][-1] == pytest.approx(np.log(counts).mean(), rel=1e-6)


def test_validation_reads_no_vectors_and_leaves_the_margins_average_alone(world: Any) -> None:
    # The released code evaluates through its step: training vectors by validation row, and the average moves.
    objective = Objective(margin="batch")
    feed, rows = feed_of(world, Share(1, 10**6), objective), np.arange(6)
    examples = world.shards.take(rows)
    validation = ValidationRows(examples.histories, examples.items[:, 0].astype(np.int64), list(examples.items))
    assert set(signature(validate).parameters) == {"engine", "catalogue", "rows", "token_budget", "popularity"}
    asked = {}
    for between in ("nothing", "validation", "evaluated by the step"):
        engine, step = Recorder(world.scorer()), AlignStep(objective, MarginCentre())
        step(engine, feed.unit(0, 0), learning_rate=0.0)
        if between == "validation":
            validate(engine, world.catalogue, validation, token_budget=10**6)
        elif between != "nothing":
            step(engine, feed.unit(1, 0), learning_rate=0.0)
        asked[between] = step(engine, feed.unit(2, 0), learning_rate=0.0).metrics["asked_margin"]
    assert asked["validation"] == asked["nothing"] != asked["evaluated by the step"]


def test_borrowed_negatives_send_gradient_through_their_owners_prompt(world: Any) -> None:
    # The released code detaches what it gathers: there, the two gradients would be the same.
    shared, own = Objective(sharing_fraction=1.0, margin="none"), Objective(sharing="none", margin="none")
    engines = []
    for objective in (shared, own):
        engine = Recorder(world.scorer(torch.float64))
        unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
        AlignStep(objective, MarginCentre())(engine, unit, learning_rate=0.0)
        engines.append(engine)
    assert relative_error(engines[0].gradients, engines[1].gradients) > 0.1


def test_at_the_start_the_policy_is_the_reference(world: Any) -> None:
    objective = Objective(name="sdpo")
    engine = Recorder(world.scorer())
    unit = feed_of(world, Share(1, 10**6), objective).unit(0, 0)
    metrics = AlignStep(objective, MarginCentre())(engine, unit, learning_rate=0.0).metrics
    assert metrics["loss"] == pytest.approx(math.log(5), abs=1e-5)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["effective_negatives"] == pytest.approx(4.0, abs=1e-4)


def test_taking_the_pools_size_out_undoes_what_a_larger_pool_adds(world: Any) -> None:
    losses = []
    for fraction in (0.0, 1.0):
        objective = Objective(sharing_fraction=fraction, margin="none", guard=False, subtract_log_pool=True)
        engine = Recorder(world.scorer())
        unit = feed_of(world, Share(1, 10**6), objective).unit(0, 0)
        losses.append(AlignStep(objective, MarginCentre())(engine, unit, learning_rate=0.0).metrics["loss"])
    # Where policy and reference agree, every pool is then worth one negative: ln 2.
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_the_batch_margin_follows_its_own_moving_average(world: Any) -> None:
    objective = Objective(margin="batch", margin_base=1.0, margin_slope=0.3)
    centre = MarginCentre()
    step = AlignStep(objective, centre)
    engine = Recorder(world.scorer())
    feed = feed_of(world, Share(1, 10**6), objective)
    means, asked = [], []
    for number in range(3):
        unit = feed.unit(number, 0)
        means.append(float(unit.arrays["liking_sum"][0]) / unit.arrays["usable"].sum())
        asked.append(step(engine, unit, learning_rate=0.0).metrics["asked_margin"])
    first = 1.0
    second = 1 - 0.3 * (means[1] - means[0])
    third = 1 - 0.3 * (means[2] - (0.9 * means[0] + 0.1 * means[1]))
    assert asked == pytest.approx([first, second, third], abs=1e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"sharing_fraction": 1.0},
        {"sharing": "none"},
        {"reuse": "item", "reuse_items": 6, "sharing_fraction": 0.15},
        {"sharing_fraction": 1.0, "margin": "batch"},
        {"sharing_fraction": 1.0, "subtract_log_pool": True},
    ],
    ids=["score", "none", "item", "batch", "log_pool"],
)
def test_the_guard_shrinks_margins_of_what_it_looks_at_and_of_nothing_else(
    world: Any, settings: dict[str, Any], own: bool
) -> None:
    more = {"guard_near": "shrink", "guard_threshold": -0.1, "guard_own": own}
    objective = Objective(beta=0.5, **settings, **more)
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    step, scores = AlignStep(objective, MarginCentre()), torch.zeros(9, 5 + objective.most_borrowed)
    pool = step._batch(scores, scores, unit, slice(2, 7), 0.8).pool
    assert pool is not None
    place, sure, usable = (unit.arrays[name][2:7] for name in ("place", "confidence", "usable"))
    shrunk = 0
    for (b, j, n), c in np.ndenumerate(sure.astype(float)):
        margin = 0.8 if objective.margin == "batch" else 1 + 0.3 * c
        mine = n < 4 if objective.reuses_items else not objective.shares_scores or j == place[b]
        if (own or not mine) and c < -0.1:
            margin, shrunk = margin * (c + 0.5) / 0.4, shrunk + 1
        if objective.subtract_log_pool:
            margin -= math.log(usable[b].sum())
        assert pool.margin[b, j, n].item() == pytest.approx(margin, abs=1e-6)
    assert bool(shrunk) == (own or objective.sharing != "none")


def test_the_stream_loss_is_the_mean_over_all_scored_tokens_however_cut(world: Any) -> None:
    lengths = np.array([history.size for history in world.histories])
    order = Order(int(windows_of(lengths, 3)[0].size), 9, 0)
    found = []
    for share in (Share(1, 10**6), Share(1, 40), Share(1, 10**6, 4)):
        engine = Recorder(world.scorer(torch.float64))
        unit = StreamFeed(world.histories, world.catalogue, order, share, window_items=3).unit(0, 0)
        result = stream_step(engine, unit, learning_rate=0.0)
        found.append((result.metrics["loss"], engine.gradients))
    total, tokens = 0.0, 0
    scorer = world.scorer(torch.float64)
    for micro in unit.micro_batches:
        values = scorer(to_device(micro.layout, "cpu"))
        total, tokens = total - values.sum().item(), tokens + values.numel()
    for loss, gradients in found:
        assert loss == pytest.approx(total / tokens, rel=1e-6)
        assert relative_error(gradients, found[0][1]) < 1e-10


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [learning_rate_at(step, 101, peak=2.0, warmup_fraction=0.0, final_fraction=0.1) for step in range(101)]
    assert rates[0] == 2.0
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert rates[100] == pytest.approx(0.2)
    warm = [learning_rate_at(step, 100, peak=1.0, warmup_fraction=0.1, final_fraction=0.0) for step in range(12)]
    assert warm[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert warm[10] == 1.0


def adapted(world: Any, dropout: float = 0.0) -> ItemScorer:
    """The model with an adapter that has moved away from where it started."""
    scorer = world.scorer()
    add_adapter(scorer.model, Lora(rank=3, dropout=dropout), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return scorer


@pytest.mark.parametrize("share", [Share(1, 10**6), Share(1, 10**6, 3)])
def test_table_adapter_off_and_frozen_copy_are_one_reference(world: Any, share: Share) -> None:
    objective = Objective(beta=0.5)
    found = []
    for reference in (None, scores_without_adapter, scores_of_copy(world.scorer())):
        engine = Recorder(adapted(world))
        unit = feed_of(world, share, objective).unit(1, 0)
        if reference is not None:
            unit.arrays["reference"][:] = np.nan
        result = AlignStep(objective, MarginCentre(), reference)(engine, unit, learning_rate=0.0)
        assert result.metrics["kl"] > 1e-3
        found.append((result.metrics, engine.gradients))
    for metrics, gradients in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
        assert relative_error(gradients, found[0][1]) < 1e-5


def test_dropout_in_training_does_not_touch_the_reference(world: Any) -> None:
    scorer = adapted(world, dropout=0.5)
    copy = world.scorer().train()
    for layer in (*scorer.model.model.layers, *copy.model.model.layers):
        layer.self_attn.attention_dropout = 0.5
    expected = world.scorer().eval()
    examples = world.shards.take(rows_of_step(ORDER, 0))
    packed = to_device(candidate_layout(segments_of(world.catalogue, examples.histories, list(examples.items))), "cpu")
    with torch.no_grad():
        right = sum_by_slot(expected(packed), packed)
        dropped = [sum_by_slot(scorer.train()(packed), packed) for _ in range(2)]
    assert not torch.allclose(*dropped)
    for reference in (scores_without_adapter, scores_of_copy(copy)):
        (scores,) = reference(Recorder(scorer.train()), [packed])
        torch.testing.assert_close(scores, right, atol=1e-5, rtol=0)
        assert scorer.training
        assert not scores.requires_grad


class Kept:
    """Bytes that autograd holds for backward: now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is saved inside, each storage once for as long as it is held."""
        held: dict[int, int] = {}

        def let_go(key: int, size: int) -> None:
            held[key] -= 1
            if not held[key]:
                self.now -= size

        def pack(tensor: Tensor) -> list[Tensor]:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if not held.get(key):
                self.now += size
                self.most = max(self.most, self.now)
            held[key] = held.get(key, 0) + 1
            box = Box([tensor])
            weakref.finalize(box, let_go, key, size)
            return box

        with saved_tensors_hooks(pack, lambda box: box[0]):
            yield


class Box(list):  # type: ignore[type-arg]
    """A list that can be referred to weakly."""


def repeated(unit: Unit, times: int) -> Unit:
    """The same micro-batch over and over, as so many micro-batches of one global batch."""
    (micro,) = unit.micro_batches
    each = micro.places.size
    every = times * each
    negatives = unit.arrays["usable"].shape[2]
    rng = np.random.default_rng(0)
    arrays = {
        "place": np.arange(every),
        "reference": np.tile(unit.arrays["reference"][micro.places], (times, 1)),
        "usable": np.ones((every, every, negatives), dtype=bool),
        "confidence": rng.uniform(-0.5, 0.5, size=(every, every, negatives)).astype(np.float32),
        "liking_sum": np.zeros(1),
    }
    micro_batches = [MicroBatch(np.arange(each) + each * number, micro.layout) for number in range(times)]
    return Unit(unit.step, unit.rank, micro_batches, arrays, list(range(every)))


def test_what_is_kept_for_backward_is_one_micro_batch_however_many_there_are(world: Any) -> None:
    order = Order(24, 3, 5)
    share = Share(1, 10**6)
    feed = AlignFeed(world.shards, world.catalogue, world.item_vectors, order, share, Objective(), num_negatives=4)
    most = {}
    for times in (2, 16):
        kept, unit = Kept(), repeated(feed.unit(0, 0), times)
        with kept.counted():
            AlignStep(Objective(), MarginCentre())(Recorder(world.scorer()), unit, learning_rate=0.0)
        assert kept.now == 0
        most[times] = kept.most
    assert most[16] == most[2] > 10**5


@pytest.fixture
def in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """At most so many elements of [B, G, N] at once: two borrowers of the nine."""
    size = 2 * 9 * 4 + 5
    monkeypatch.setattr(sharing, "ELEMENTS_AT_ONCE", size)
    return size


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and not leaf._is_view()]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize(
    "objective",
    [
        Objective(beta=0.5),
        Objective(beta=0.5, subtract_log_pool=True, sharing="threshold", sharing_threshold=0.0),
        Objective(beta=0.5, margin="batch"),
        Objective(beta=0.5, detach_shared=True),
        Objective(name="sdpo", beta=0.5),
    ],
    ids=["napo", "log_pool", "batch", "detached", "sdpo"],
)
def test_borrowers_taken_in_chunks_add_up(world: Any, objective: Objective, in_small_chunks: int) -> None:
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    scores = torch.from_numpy(np.random.default_rng(3).normal(-30, 2, size=(9, 5)))
    reference = torch.from_numpy(unit.arrays["reference"])
    found, largest = [], []
    for size in (in_small_chunks, 2**22):
        sharing.ELEMENTS_AT_ONCE = size
        step = AlignStep(objective, MarginCentre())
        with Largest() as mode:
            found.append(step._differentiate(scores.clone(), reference, unit))
        largest.append(mode.elements)
    chunked, whole = found
    assert (chunked.grad - whole.grad).norm() <= 1e-12 * whole.grad.norm()
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-12, atol=0)
    assert chunked.metrics == pytest.approx(whole.metrics, rel=1e-12)
    # What shares nothing makes no [B, G, N] at all.
    assert (largest[1] >= 9 * 9 * 4) is objective.shares_scores
    assert largest[0] <= in_small_chunks


@pytest.mark.parametrize("share", [Share(1, 10**6), Share(1, 10**6, 3)])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_score_is_laid_to_its_row_and_not_to_those_who_borrow_it(world: Any, bad: float, share: Share) -> None:
    objective = Objective(beta=0.5, sharing_fraction=1.0, guard=False)
    unit = feed_of(world, share, objective).unit(1, 0)
    unit.arrays["reference"][4, 3] = bad
    engine, centre = Recorder(world.scorer()), MarginCentre(0.5)
    result = AlignStep(objective, centre)(engine, unit, learning_rate=0.0)
    assert result.skipped
    assert result.bad_rows == (unit.rows[4],)
    assert any(not gradient.isfinite().all() for gradient in engine.gradients)  # which no engine takes


def test_where_scores_are_finite_and_a_loss_is_not_its_row_is_named(world: Any) -> None:
    objective = Objective(name="sdpo", beta=1e300)
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    unit.arrays["reference"][4, 3] = -3e38
    result = AlignStep(objective, MarginCentre())(Recorder(world.scorer()), unit, learning_rate=0.0)
    assert result.metrics["loss"] == math.inf
    assert (result.skipped, result.bad_rows) == (True, (unit.rows[4],))


def test_where_only_the_gradient_overflows_all_rows_of_the_step_are_named(world: Any) -> None:
    objective = Objective(margin="batch")
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    engine, centre = Recorder(world.scorer()), MarginCentre(0.5)
    engine.step = lambda _: math.inf  # type: ignore[method-assign]
    result = AlignStep(objective, centre)(engine, unit, learning_rate=0.0)
    assert math.isfinite(result.metrics["loss"])
    assert result.skipped
    assert result.bad_rows == tuple(sorted(set(unit.rows)))
    assert centre.value == 0.5  # as if the step had not been


def test_a_sound_step_names_nobody(world: Any) -> None:
    unit = feed_of(world, Share(1, 10**6), Objective()).unit(1, 0)
    result = AlignStep(Objective(), MarginCentre())(Recorder(world.scorer()), unit, learning_rate=0.0)
    assert (result.skipped, result.bad_rows) == (False, ())


def test_a_margin_that_is_no_number_skips_the_step_and_is_forgotten(world: Any) -> None:
    objective = Objective(margin="batch")
    unit = feed_of(world, Share(1, 10**6), objective).unit(1, 0)
    unit.arrays["liking_sum"][0] = math.nan
    centre = MarginCentre(0.5)
    assert AlignStep(objective, centre)(Recorder(world.scorer()), unit, learning_rate=0.0).skipped
    assert centre.value == 0.5


def test_a_rank_without_rows_keeps_company_and_sends_nothing(world: Any) -> None:
    unit = feed_of(world, Share(12, 10**6), Objective()).unit(1, 11)  # nine rows over twelve ranks
    assert unit.arrays["usable"].shape == (0, 9, 4)
    engine = Recorder(world.scorer())
    result = AlignStep(Objective(), MarginCentre())(engine, unit, learning_rate=0.0)
    assert not result.skipped
    assert engine.boundaries == [True]
    assert all(not gradient.any() for gradient in engine.gradients)
