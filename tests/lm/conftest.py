"""A tokenizer, a catalogue and small models that the tests of the engine share."""

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model

LABELS = [
    f"The {word} of {place} {year}" for word in ("Fox", "Owl", "Elk") for place in ("Rome", "Oslo") for year in (1, 22)
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the labels."""
    return train_tokenizer(training_texts(find_template("titles"), LABELS), 320)


@pytest.fixture
def catalogue(tokenizer: PreTrainedTokenizerBase) -> Catalogue:
    """Twelve items under a plain stream."""
    return Catalogue.build(LABELS, tokenizer, find_template("titles"), 96)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A two-layer Llama with random weights."""
    return make_model(tokenizer, hidden_size=32, layers=2, heads=2, intermediate_size=48, max_positions=256, seed=3)


@pytest.fixture
def rows() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ragged histories and candidates; one history is empty."""
    rng = np.random.default_rng(1)
    histories = [rng.integers(12, size=size) for size in (3, 0, 6, 1)]
    candidates = [rng.permutation(12)[:size] for size in (4, 1, 6, 2)]
    return histories, candidates
