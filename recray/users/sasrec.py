"""SASRec: a causal transformer over item ids, the light auxiliary recommender.

Axes:
    B  histories of a batch
    L  items of the longest of them
    D  width of states and item vectors
    I  items of the catalogue

Reference: Kang and McAuley, "Self-Attentive Sequential Recommendation", https://arxiv.org/abs/1808.09781. We differ
in five ways. Blocks are pre-norm, and the hidden layer is four times as wide, as transformers are built today.
Histories are padded on the right: under a causal mask no item can see padding, so states need no mask and don't
depend on how a batch was padded. Positions count from the end of a history, so its latest item is always at 1. A
learned start comes before the first item: what it predicts is a user's first item, and its state is the vector
of an empty history. The loss is a softmax, not one negative an item (`recray.users.losses`).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

from recray.errors import ModelError
from recray.users.ragged import Ragged, latest, padded, take

WEIGHTS, SHAPE = "model.safetensors", "sasrec.json"


@dataclass(frozen=True)
class Shape:
    """What a SASRec is made of."""

    num_items: int
    dim: int
    layers: int
    heads: int
    max_history: int
    dropout: float


class SASRec(nn.Module):
    """Item vectors, positions, and the blocks between them and a state.

    Raises:
        ValueError: if the heads don't divide the width.
    """

    def __init__(self, shape: Shape, *, seed: int) -> None:
        super().__init__()
        if shape.dim % shape.heads:
            raise ValueError(f"users.dim must be a multiple of users.heads, got {shape.dim} and {shape.heads}")
        self.shape = shape
        self.items = nn.Embedding(shape.num_items, shape.dim)
        self.start = nn.Parameter(torch.empty(shape.dim))
        self.positions = nn.Embedding(shape.max_history + 1, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim)
        _initialise(self, seed)

    def forward(self, items: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B L+1 D"]:
        """Return the state after the start and after each item; state t has seen the first t items.

        Args:
            items: [B, L] histories in time order, padded on the right with any item.
            lengths: [B] items of each history, at most `max_history`. States beyond `lengths` mean nothing.
        """
        batch, width = items.shape
        start = self.start.expand(batch, 1, -1)
        x = torch.cat([start, self.items(items)], dim=1) * math.sqrt(self.shape.dim)
        from_end = lengths[:, None] - torch.arange(width + 1, device=items.device)
        x = x + self.positions(from_end.clamp(min=0))
        x = dropout(x, self.shape.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.norm(x)
        return states


class Block(nn.Module):
    """Causal self-attention, then a hidden layer; each adds to what it was given, normalised."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.norm_attention = nn.LayerNorm(shape.dim)
        self.query_key_value = nn.Linear(shape.dim, 3 * shape.dim)
        self.attended = nn.Linear(shape.dim, shape.dim)
        self.norm_hidden = nn.LayerNorm(shape.dim)
        self.widen = nn.Linear(shape.dim, 4 * shape.dim)
        self.narrow = nn.Linear(4 * shape.dim, shape.dim)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the states of the next layer."""
        batch, width, dim = x.shape
        parts = self.query_key_value(self.norm_attention(x))
        query, key, value = parts.view(batch, width, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        seen = scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        seen = self.attended(seen.transpose(1, 2).reshape(batch, width, dim))
        x = x + dropout(seen, self.dropout, self.training)
        hidden = self.narrow(gelu(self.widen(self.norm_hidden(x))))
        return x + dropout(hidden, self.dropout, self.training)


@torch.no_grad()
def user_vectors(model: SASRec, histories: Ragged, *, rows_at_once: int = 1024) -> Float[ndarray, "R D"]:
    """Return the state after each whole history, float32; of a long one, after its latest `max_history` items."""
    was_training = model.training
    model.eval()
    device = model.start.device
    vectors = np.empty((histories.num_lists, model.shape.dim), dtype=np.float32)
    for first in range(0, histories.num_lists, rows_at_once):
        rows = np.arange(first, min(first + rows_at_once, histories.num_lists))
        batch = latest(take(histories, rows), model.shape.max_history)
        items = torch.from_numpy(padded(batch)[0]).to(device)
        lengths = torch.from_numpy(batch.lengths).to(device)
        states = model(items, lengths)
        last = states[torch.arange(len(rows), device=device), lengths]
        vectors[rows] = last.float().cpu().numpy()
    model.train(was_training)
    return vectors


def item_vectors(model: SASRec) -> Float[ndarray, "I D"]:
    """Return every item's vector, float32: its dot product with a user's vector is the item's score.

    An item that training never met was only ever pushed away from users' states, as a negative of the softmax: it
    scores low, not at random.
    """
    return np.asarray(model.items.weight.detach().float().cpu().numpy())


def save(model: SASRec, folder: Path) -> None:
    """Write weights and shape into `folder`, making it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / SHAPE).write_text(json.dumps(asdict(model.shape), indent=1), encoding="utf-8")


def load(folder: Path) -> SASRec:
    """Return the model that `save` wrote into `folder`, on the CPU and without dropout.

    Raises:
        ModelError: if the folder holds no SASRec.
    """
    try:
        shape = Shape(**json.loads((folder / SHAPE).read_text(encoding="utf-8")))
        model = SASRec(shape, seed=0)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no SASRec ({error}); expected {SHAPE} and {WEIGHTS}: run the users stage again"
        ) from error
    return model.eval()


@torch.no_grad()
def _initialise(model: SASRec, seed: int) -> None:
    """Draw every weight from its own seed; biases 0, norms the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value.zero_()
        else:
            value.normal_(0.0, 0.02, generator=generator)
