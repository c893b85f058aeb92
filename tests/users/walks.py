"""Histories that follow a rule: after an item comes, nine times in ten, one certain other."""

import numpy as np

from recray.users.fit import Validation
from recray.users.ragged import Ragged, from_lengths

NUM_ITEMS = 50


def walk(rng: np.random.Generator, length: int) -> list[int]:
    """Return one user's items."""
    items = [int(rng.integers(NUM_ITEMS))]
    while len(items) < length:
        follows = (7 * items[-1] + 3) % NUM_ITEMS
        items.append(follows if rng.random() < 0.9 else int(rng.integers(NUM_ITEMS)))
    return items


def histories_and_validation(num_users: int = 120) -> tuple[Ragged, Validation]:
    """Return histories of all lengths, some beyond the model's, and rows that ask for what the rule says comes next."""
    rng = np.random.default_rng(0)
    walks = [walk(rng, int(rng.integers(2, 20))) for _ in range(num_users)]
    targets = np.array([(7 * each[-1] + 3) % NUM_ITEMS for each in walks], dtype=np.int32)
    candidates = [rng.permutation(np.unique(np.append(rng.permutation(NUM_ITEMS)[:30], target))) for target in targets]
    return _ragged(walks), Validation(_ragged(walks), _ragged(candidates), targets)


def _ragged(lists: list) -> Ragged:
    return from_lengths(np.concatenate(lists), np.array([len(each) for each in lists]))
