"""From rows to units: what a data node computes for one rank and one step. Pure but for reading the rows.

Axes:
    G  rows of a global batch        N  negatives      K  candidates: the positive, then the negatives
    B  rows of it on this rank       D  width of user vectors
    I  distinct items among all negatives
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from recray.config import Objective
from recray.data.catalogue import Catalogue
from recray.data.examples import Examples, ExampleShards
from recray.data.hashing import mix
from recray.errors import ConfigError
from recray.lm.layout import Layout
from recray.lm.scorer import lay_out, lay_out_streams, segment_lengths, segments_of
from recray.objectives.margins import confidence
from recray.objectives.reuse import first_allowed, offered_items
from recray.objectives.sharing import (
    above_threshold,
    borrower_chunks,
    near_items,
    own_only,
    products,
    similarity,
    top_fraction,
    usable_negatives,
)
from recray.train.order import Order, rows_of_step
from recray.train.units import MicroBatch, Unit, split

BORROWED_BYTES = 5  # of a unit for each of [B, G, N]: may it be used, and a confidence in float32
MOST_BORROWED = 2**30  # bytes of those in a unit, which travels through an object store
SHOWN = 20  # items that a prompt lists while the model learns to read it, target included


T = TypeVar("T")


class OfStep(Generic[T]):
    """What a function makes of a step, kept until another step is asked for.

    Units are asked for step by step, rank after rank: what is the same for all ranks is worked out once, not G rows for
    each of W ranks.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._kept: tuple[int, T] | None = None

    def __call__(self, step: int) -> T:
        if self._kept is None or self._kept[0] != step:
            self._kept = (step, self._make(step))
        return self._kept[1]


class Share(NamedTuple):
    """How a global batch is cut: over ranks, and inside a rank by tokens."""

    world_size: int
    token_budget: int
    least_micro_batches: int = 1

    def cut(self, lengths: Int[ndarray, " G"]) -> list[list[Int[ndarray, " b"]]]:
        """Return [rank][micro-batch] places of a global batch whose rows have these lengths."""
        return split(lengths, self.world_size, self.token_budget, least=self.least_micro_batches)


class _Aligned(NamedTuple):
    """A step of alignment, before it is handed out."""

    examples: Examples
    items: Int[ndarray, "G K"]
    listed: list[Int[ndarray, " _"]]  # what each user's prompt is followed by: its items, then those it borrows
    places: list[list[Int[ndarray, " b"]]]


class Lent(NamedTuple):
    """What the users of a global batch offer some of them, an item once however many lend it."""

    items: Int[ndarray, " I"]
    offered: Bool[ndarray, "B I"]
    met: Bool[ndarray, "B I"]  # by the borrower in training, or it is being taught as its positive
    confidence: Float[ndarray, "B I"]  # the borrower's


class _Streamed(NamedTuple):
    """A step of streams, before it is handed out."""

    streams: list[Int[ndarray, " T"]]
    scored: int
    places: list[list[Int[ndarray, " b"]]]


class _Shown(NamedTuple):
    """A step of examples, before it is handed out."""

    histories: list[Int[ndarray, " H"]]
    candidates: list[Int[ndarray, " 1"]]
    shown: list[Int[ndarray, " _"]]
    places: list[list[Int[ndarray, " b"]]]


class AlignFeed:
    """Makes units of alignment examples.

    Raises:
        ConfigError: if a rank's part in who may borrow what would take more than `MOST_BORROWED` bytes.
        ValueError: if examples are cross-fitted and there are no judges, or the other way round.
    """

    def __init__(
        self,
        shards: ExampleShards,
        catalogue: Catalogue,
        item_vectors: Tensor,
        order: Order,
        share: Share,
        objective: Objective,
        *,
        num_negatives: int,
        judges: Sequence[Float[Tensor, "I D"]] = (),
        sample_items: int = 512,
    ) -> None:
        if objective.shares_scores:
            _refuse_wide_sharing(order.global_batch, share.world_size, num_negatives)
        self._shards, self._catalogue, self._order, self._share = shards, catalogue, order, share
        self._objective, self.num_negatives = objective, num_negatives
        self._plan = OfStep(self._planned)
        self._item_vectors = item_vectors
        rng = np.random.default_rng(order.seed)
        sample = rng.choice(len(item_vectors), min(sample_items, len(item_vectors)), replace=False)
        if shards.crossfitted != bool(judges):
            raise ValueError(f"examples are cross-fitted: {shards.crossfitted}; item vectors of {len(judges)} folds")
        self._sample_vectors = item_vectors[torch.from_numpy(sample)]
        # For each fold of users; without folds, one for all.
        self._judges = [(vectors, vectors[torch.from_numpy(sample)]) for vectors in judges]
        self._judges = self._judges or [(item_vectors, self._sample_vectors)]

    def unit(self, step: int, rank: int) -> Unit:
        """Return the unit of one rank in one step."""
        examples, items, listed, every = self._plan(step)
        places = every[rank]
        micro_batches = [
            MicroBatch(own, _candidates_or_company(self._catalogue, examples.histories, listed, own)) for own in places
        ]
        mine = np.concatenate(places)
        reference = np.pad(examples.reference[:, : items.shape[1]], ((0, 0), (0, self._objective.most_borrowed)))
        arrays = {"place": mine, "reference": reference}
        if self._objective.reuses_items:
            arrays["candidates_each"] = np.array([each.size for each in listed], dtype=np.int64)
        if self._objective.shares_scores:
            arrays |= self._borrowing(examples, items, mine)
        else:
            arrays |= self._own(examples, listed, mine)
        return Unit(step, rank, micro_batches, arrays, rows_of_step(self._order, step).tolist())

    def _planned(self, step: int) -> _Aligned:
        examples = self._shards.take(rows_of_step(self._order, step))
        items = examples.items[:, : 1 + self.num_negatives]
        listed = list(items)
        if self._objective.reuses_items:
            borrowed = self._borrowed(examples, items, step)
            listed = [np.concatenate(both) for both in zip(items, borrowed, strict=True)]
        lengths = segment_lengths(self._catalogue, examples.histories, listed)
        return _Aligned(examples, items, listed, self._share.cut(lengths))

    def negatives_of(self, rows: Sequence[int]) -> Int[ndarray, "G N"]:
        """Return the negatives drawn for these rows."""
        return self._shards.take(np.array(rows, dtype=np.int64)).items[:, 1 : 1 + self.num_negatives]

    def listed(self, step: int) -> list[Int[ndarray, " _"]]:
        """Return what each user of a global batch scores under its own prompt: its positive, its negatives, others'."""
        return [items.copy() for items in self._plan(step).listed]

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._objective

    def lent(self, step: int, most: int) -> tuple[Lent, list[int]]:
        """Return what the first `most` users of a global batch are offered, and the row ids of those."""
        examples, items, *_ = self._plan(step)
        mine = np.arange(min(most, len(items)))
        return self._lent(examples, items, mine), examples.row[mine].tolist()

    def _lent(self, examples: Examples, items: Int[ndarray, "G K"], mine: Int[ndarray, " B"]) -> Lent:
        """Return what these users are offered; of items to be reused, none that stand among their own candidates."""
        different, column = np.unique(items[:, 1:], return_inverse=True)
        vectors, user = torch.from_numpy(examples.vector), torch.from_numpy(examples.user)
        place = torch.from_numpy(mine)
        lends = (self._lends(vectors, place, user) & ~own_only(place, len(user))).numpy()
        offered = offered_items(lends, column.reshape(len(items), -1), different.size)
        met = np.zeros_like(offered)
        for borrower, own in enumerate(mine.tolist()):
            met[borrower] = np.isin(different, np.append(examples.met[own], items[own, 0]))
            if self._objective.reuses_items:
                offered[borrower] &= ~np.isin(different, items[own])
        return Lent(different, offered, met, self._sure(examples, mine, different))

    def _borrowed(self, examples: Examples, items: Int[ndarray, "G K"], step: int) -> list[Int[ndarray, " _"]]:
        """Return which items each user of the global batch borrows: drawn uniformly from what it may have.

        The draw follows from seed, epoch, row and item: not from how the batch is cut, and the first of it are those of
        a smaller `reuse_items`.
        """
        settings, (users, negatives) = self._objective, items[:, 1:].shape
        epoch = (step * self._order.global_batch + np.arange(users)) // self._order.num_rows
        found: list[ndarray] = []
        for rows in borrower_chunks(users, users, negatives):
            mine = np.arange(users)[rows]
            lent = self._lent(examples, items, mine)
            allowed = lent.offered & ~lent.met if settings.guard else lent.offered
            if settings.guard_near == "mask":
                allowed &= ~self._near(lent.confidence)
            key = mix(self._order.seed, epoch[mine, None], examples.row[mine, None], lent.items)
            found += [lent.items[chosen] for chosen in first_allowed(key, allowed, settings.reuse_items)]
        return found

    def _near(self, sure: Float[ndarray, "*shape"]) -> Bool[ndarray, "*shape"]:
        """Return which items the borrower likely likes."""
        found: ndarray = near_items(torch.from_numpy(sure), threshold=self._objective.guard_threshold).numpy()
        return found

    def _borrowing(
        self, examples: Examples, items: Int[ndarray, "G K"], mine: Int[ndarray, " B"]
    ) -> dict[str, ndarray]:
        """Return who may use whose score of which negative, and the borrower's confidence in each."""
        place, user = torch.from_numpy(mine), torch.from_numpy(examples.user)
        vectors = torch.from_numpy(examples.vector)
        negatives = items[:, 1:]
        lends = self._lends(vectors, place, user)
        flat = negatives.reshape(-1)
        usable = np.empty((mine.size, *negatives.shape), dtype=bool)
        sure = np.empty(usable.shape, dtype=np.float32)
        liking = 0.0
        for rows in borrower_chunks(*usable.shape):
            own, shape = place[rows], usable[rows].shape
            sure[rows] = self._sure(examples, mine[rows], flat).reshape(shape)
            forbidden = self._forbidden(examples, items, mine[rows], sure[rows])
            may = usable_negatives(lends[rows], forbidden, own, negatives.shape[1])
            if self._masks_own:
                may = may & ~torch.from_numpy(self._near(sure[rows]))
            usable[rows] = may.numpy()
            if self._objective.margin == "batch":
                liking += float((products(vectors[own], self._vectors_of(flat)).reshape(shape).double() * may).sum())
        return {"usable": usable, "confidence": sure, "liking_sum": np.array([liking])}

    def _forbidden(
        self, examples: Examples, items: Int[ndarray, "G K"], mine: Int[ndarray, " B"], sure: Float[ndarray, "B G N"]
    ) -> Bool[Tensor, "B G N"] | None:
        """Return which negatives the guard keeps from these borrowers; None: there is no guard."""
        found = None
        if self._objective.guard:
            found = forbidden_items(examples, items, mine)
        if self._objective.guard_near == "mask":
            near = self._near(sure)
            found = near if found is None else found | near
        return None if found is None else torch.from_numpy(found)

    @property
    def _masks_own(self) -> bool:
        return self._objective.guard_near == "mask" and self._objective.guard_own

    def _own(
        self, examples: Examples, listed: Sequence[Int[ndarray, " _"]], mine: Int[ndarray, " B"]
    ) -> dict[str, ndarray]:
        """Return the same where nobody else's scores are looked at: [B, 1, N], borrowed items after own ones."""
        usable = np.zeros((mine.size, 1, self.num_negatives + self._objective.most_borrowed), dtype=bool)
        sure = np.zeros(usable.shape, dtype=np.float32)
        liking = 0.0
        for row, place in enumerate(mine.tolist()):
            negatives = listed[place][1:]
            usable[row, 0, : negatives.size] = True
            sure[row, 0, : negatives.size] = self._sure(examples, mine[row : row + 1], negatives)[0]
            if self._masks_own:
                usable[row, 0, : self.num_negatives] &= ~self._near(sure[row, 0, : self.num_negatives])
            if self._objective.margin == "batch":
                used = negatives[usable[row, 0, : negatives.size]]
                liked = products(torch.from_numpy(examples.vector[place])[None], self._vectors_of(used))
                liking += float(liked.double().sum())
        return {"usable": usable, "confidence": sure, "liking_sum": np.array([liking])}

    def _sure(self, examples: Examples, mine: Int[ndarray, " B"], items: Int[ndarray, " I"]) -> Float[ndarray, "B I"]:
        """Return how sure the auxiliary model is that each item is a true negative for each of these users."""
        places = torch.from_numpy(items.astype(np.int64))
        users = examples.vector if examples.judge_vector is None else examples.judge_vector
        folds = np.zeros(mine.size, dtype=np.int32) if examples.fold is None else examples.fold[mine]
        found = np.empty((mine.size, items.size), dtype=np.float32)
        for fold, (vectors, sample) in enumerate(self._judges):
            own = folds == fold
            found[own] = confidence(torch.from_numpy(users[mine[own]]), vectors[places], sample).numpy()
        return found

    def _vectors_of(self, items: Int[ndarray, " I"]) -> Float[Tensor, "I D"]:
        return self._item_vectors[torch.from_numpy(items.astype(np.int64))]

    def _lends(self, vectors: Tensor, place: Tensor, user: Tensor) -> Tensor:
        settings = self._objective
        if settings.sharing == "none":
            return own_only(place, len(user))
        similar = similarity(vectors[place], vectors, cosine=settings.similarity == "cosine")
        if settings.sharing == "threshold":
            return above_threshold(similar, place, user, threshold=settings.sharing_threshold)
        return top_fraction(similar, place, user, fraction=settings.sharing_fraction)


def _refuse_wide_sharing(global_batch: int, world_size: int, negatives: int) -> None:
    """Raise where an even share of the global batch is too much for one unit."""
    rows = -(-global_batch // world_size)
    asked = BORROWED_BYTES * rows * global_batch * negatives
    if asked <= MOST_BORROWED:
        return
    raise ConfigError(
        f"a global batch of {global_batch} users with {negatives} negatives over {world_size} ranks is {rows} users a "
        f"rank, each of which may borrow from all: {asked / 2**30:.1f} GiB a rank and step, and at most "
        f"{MOST_BORROWED / 2**30:.1f} GiB are allowed; use more workers, a smaller align.global_batch or fewer "
        f"align.num_negatives"
    )


def forbidden_items(examples: Examples, items: Int[ndarray, "G K"], mine: Int[ndarray, " B"]) -> Bool[ndarray, "B G N"]:
    """Return which negatives each of my users met in training or is being taught as its positive."""
    negatives = items[:, 1:].reshape(-1)
    forbidden = np.zeros((mine.size, negatives.size), dtype=bool)
    for borrower, place in enumerate(mine.tolist()):
        met = np.append(examples.met[place], items[place, 0])
        forbidden[borrower] = np.isin(negatives, met)
    return forbidden.reshape(mine.size, items.shape[0], -1)


class StreamFeed:
    """Makes units of item streams, in which every item is a target; for supervised fine-tuning.

    A row is one window of `window_items` items of one history. In every epoch a history's windows begin at another
    seeded place, so that an item is not always seen behind the same context; each item is a target once an epoch.
    A share `shuffled` of the histories, others in every epoch, has its items in a seeded random order, so that a window
    holds items from anywhere in the history: what goes together, beside what follows what. A share `replaced` of all
    items, others in every epoch, gives way to items drawn uniformly from the catalogue, as context and as targets.
    """

    def __init__(
        self,
        histories: Sequence[ndarray],
        catalogue: Catalogue,
        order: Order,
        share: Share,
        *,
        window_items: int,
        shuffled: float = 0.0,
        replaced: float = 0.0,
    ) -> None:
        self._histories, self._catalogue, self._share = histories, catalogue, share
        self._order, self._window = order, window_items
        self._shuffled, self._replaced = shuffled, replaced
        self._plan = OfStep(self._planned)
        self._history, self._number, self._slack = windows_of(
            np.array([history.size for history in histories], dtype=np.int64), window_items
        )

    def unit(self, step: int, rank: int) -> Unit:
        """Return the unit of one rank in one step."""
        streams, scored, places = self._plan(step)
        micro_batches = [
            MicroBatch(own, _streams_or_company(self._catalogue, [streams[place] for place in own]))
            for own in places[rank]
        ]
        rows = rows_of_step(self._order, step).tolist()
        return Unit(step, rank, micro_batches, {"scored_tokens": np.array([scored])}, rows)

    def _planned(self, step: int) -> _Streamed:
        rows = rows_of_step(self._order, step)
        epoch = (step * self._order.global_batch + np.arange(rows.size)) // self._order.num_rows
        streams = [
            self._catalogue.prompt(self._items(int(row), int(when))) for row, when in zip(rows, epoch, strict=True)
        ]
        lengths = np.array([stream.size for stream in streams], dtype=np.int64)
        return _Streamed(streams, max(1, int((lengths - 1).sum())), self._share.cut(lengths))

    def _items(self, row: int, epoch: int) -> Int[ndarray, " n"]:
        history = self._histories[int(self._history[row])]
        slack = int(self._slack[row])
        # Keyed by the history, not the row: all its windows are cut from one order, at one shift.
        rng = np.random.default_rng([self._order.seed, epoch, int(self._history[row])])
        shift = int(rng.integers(slack + 1)) if slack else 0
        if rng.random() < self._shuffled:
            history = rng.permutation(history)
        start = int(self._number[row]) * self._window - shift
        return self._noisy(history[max(0, start) : start + self._window], row, epoch)

    def _noisy(self, items: Int[ndarray, " n"], row: int, epoch: int) -> Int[ndarray, " n"]:
        if not self._replaced:
            return items
        rng = np.random.default_rng([self._order.seed, epoch, row, 1])
        others = rng.integers(self._catalogue.num_items, size=items.size)
        return np.where(rng.random(items.size) < self._replaced, others, items)


def windows_of(lengths: Int[ndarray, " H"], window: int) -> tuple[ndarray, ndarray, ndarray]:
    """Return for each window its history, its number inside it, and by how much the history's windows may shift."""
    counts = -(-lengths // window)
    history = np.repeat(np.arange(lengths.size), counts)
    number = np.arange(history.size) - np.repeat(np.cumsum(counts) - counts, counts)
    # A shift of at most counts * window - length keeps the number of windows; the first must keep an item.
    slack = np.minimum(counts * window - lengths, window - 1)
    return history, number, slack[history]


class ExampleFeed:
    """Makes units of (history, target) examples; for supervised fine-tuning with an instruction template.

    A template that shows candidates shows the target among items drawn uniformly, others in every epoch.
    """

    def __init__(
        self,
        histories: Sequence[ndarray],
        targets: Int[ndarray, " R"],
        catalogue: Catalogue,
        order: Order,
        share: Share,
    ) -> None:
        self._histories, self._targets = histories, targets
        self._catalogue, self._order, self._share = catalogue, order, share
        self._plan = OfStep(self._planned)

    def unit(self, step: int, rank: int) -> Unit:
        """Return the unit of one rank in one step."""
        histories, candidates, shown, places = self._plan(step)
        micro_batches = [
            MicroBatch(own, _candidates_or_company(self._catalogue, histories, candidates, own, shown))
            for own in places[rank]
        ]
        rows = rows_of_step(self._order, step)
        scored = np.array([int(self._catalogue.item_lengths[self._targets[rows]].sum())])
        return Unit(step, rank, micro_batches, {"scored_tokens": scored}, rows.tolist())

    def _planned(self, step: int) -> _Shown:
        rows = rows_of_step(self._order, step)
        epoch = (step * self._order.global_batch + np.arange(rows.size)) // self._order.num_rows
        histories = [self._histories[row] for row in rows.tolist()]
        candidates = list(self._targets[rows][:, None])
        shown = [self._shown(int(row), int(when)) for row, when in zip(rows, epoch, strict=True)]
        lengths = segment_lengths(self._catalogue, histories, candidates, shown)
        return _Shown(histories, candidates, shown, self._share.cut(lengths))

    def _shown(self, row: int, epoch: int) -> Int[ndarray, " C"]:
        """Return the items a prompt lists, where its template lists any: the target and others, seeded."""
        target = self._targets[row]
        if not self._catalogue.template.shows_candidates:
            return np.array([target])
        rng = np.random.default_rng([self._order.seed, epoch, row])
        drawn = rng.choice(self._catalogue.num_items, min(SHOWN, self._catalogue.num_items), replace=False)
        return np.append(drawn[drawn != target][: SHOWN - 1], target)


def _candidates_or_company(
    catalogue: Catalogue,
    histories: Sequence[ndarray],
    candidates: list[ndarray],
    own: Int[ndarray, " b"],
    shown: list[ndarray] | None = None,
) -> Layout:
    if not own.size:
        return company(catalogue)
    listed = candidates if shown is None else shown
    chosen = ([each[place] for place in own] for each in (histories, candidates, listed))
    return lay_out(catalogue, segments_of(catalogue, *chosen))


def _streams_or_company(catalogue: Catalogue, streams: list[ndarray]) -> Layout:
    return lay_out_streams(catalogue, streams) if streams else company(catalogue)


def company(catalogue: Catalogue) -> Layout:
    """Return the layout of an empty micro-batch: two tokens whose score nobody uses.

    A rank without rows still passes through the model, as the others' collectives in ZeRO-3 wait for it.
    """
    return lay_out_streams(catalogue, [np.array([catalogue.end, catalogue.end], dtype=np.int64)])
