"""Log-probabilities of items under a causal language model, one pass over each prompt.

Axes: as in `recray.lm.layout`; D is the hidden size, V the vocabulary, U the states that predict something.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recray.data.catalogue import Catalogue
from recray.errors import DataError
from recray.lm.attention import BLOCK, FLEX, block_masks, dense_masks, mask_form
from recray.lm.layout import (
    ARRAYS,
    PADDING,
    Layout,
    Segments,
    candidate_layout,
    one_a_row,
    separate_layout,
    stream_layout,
)
from recray.lm.load import open_recommender, stored_dtype
from recray.lm.prefix_attention import PREFIX, PrefixPlan, as_mask, prefix_plan

LOGITS_KEPT = 2**24  # so many are kept for backward, 64 MiB in float32; more are made again,
LOGITS_AT_ONCE = 2**22  # in chunks of so many
WIDE = 400  # tokens of a row from which attention without masks is faster than with one
PRIORS_A_ROW = 128  # items scored behind one prompt of an empty history
_NO_HISTORY = np.zeros(0, dtype=np.int32)


class Packed(NamedTuple):
    """A `Layout` as tensors on the device, its scored tokens by rising place of what predicts them.

    The last token of a prompt predicts the first of every candidate behind it: one state, and one row of logits.
    """

    tokens: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    segment: Int[Tensor, "R T"]
    branch: Int[Tensor, "R T"]
    state: Int[Tensor, " U"]  # flat place (row * T + column) of each hidden state that predicts something
    source: Int[Tensor, " S"]  # which of those predicts `label`; never falls
    label: Int[Tensor, " S"]
    slot: Int[Tensor, " S"]
    num_scores: int
    plain: bool = False


class ItemScorer(nn.Module):
    """A causal language model that returns log-probabilities of scored tokens only.

    The head is applied where an item's token is predicted and nowhere else; where that is more than `LOGITS_KEPT`
    logits, in chunks whose logits are made again in backward. Logits of [rows, tokens, vocabulary] never exist.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._vocabulary = int(config.vocab_size)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._mask_form = mask_form(model)

    def forward(self, packed: Packed) -> Float[Tensor, " S"]:
        """Return log pi(label | everything it may see), in nats, float32 or wider, one a scored token."""
        hidden = self.hidden(packed)
        states = packed.state.numel()
        if states * self._vocabulary <= LOGITS_KEPT:
            return self._log_probability(hidden, packed.source, packed.label)
        chunk = max(1, LOGITS_AT_ONCE // self._vocabulary)
        firsts = range(0, states, chunk)
        borders = torch.searchsorted(packed.source, packed.source.new_tensor([*firsts, states])).tolist()
        pieces = [
            (hidden[first : first + chunk], packed.source[start:end] - first, packed.label[start:end])
            for first, start, end in zip(firsts, borders, borders[1:], strict=False)
        ]
        if not torch.is_grad_enabled():
            return torch.cat([self._log_probability(*piece) for piece in pieces])
        return torch.cat([checkpoint(self._log_probability, *piece, use_reentrant=False) for piece in pieces])

    def hidden(self, packed: Packed) -> Float[Tensor, "U D"]:
        """Return the hidden states that predict scored tokens."""
        columns = packed.tokens.shape[1]
        flex = self.model.config._attn_implementation == FLEX
        if flex:
            packed = _in_blocks(packed)
        states = self.model.base_model(
            input_ids=packed.tokens, use_cache=False, **self._attention(packed, flex=flex)
        ).last_hidden_state
        chosen: Tensor = states[:, :columns].flatten(end_dim=1)[packed.state]
        return chosen

    def _attention(self, packed: Packed, *, flex: bool) -> dict[str, Any]:
        """Return the masks and positions that this layout needs of the model."""
        if packed.plain:  # padding is on the right, where nothing that is scored looks
            return {}
        place = (packed.positions, packed.segment, packed.branch)
        if flex:
            masks = block_masks(self._mask_form, *place)
        elif (plan := self._plan(packed)) is not None:
            carrier = as_mask(plan)
            masks = dict.fromkeys(self._mask_form.types, carrier) if self._mask_form.by_type else carrier
        else:
            masks = dense_masks(self._mask_form, *place, self._dtype)
        return {"attention_mask": masks, "position_ids": packed.positions}

    def _plan(self, packed: Packed) -> PrefixPlan | None:
        """Return how to attend without masks, if the layout allows it, it pays, and no window cuts anything off."""
        if self.model.config._attn_implementation != PREFIX or packed.tokens.shape[1] < WIDE:
            return None
        window = self._mask_form.window
        if window is not None and int(packed.positions.max()) >= window:
            return None
        return prefix_plan(packed.positions, packed.segment, packed.branch, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return found

    def _log_probability(
        self, hidden: Float[Tensor, "u D"], source: Int[Tensor, " s"], label: Int[Tensor, " s"]
    ) -> Float[Tensor, " s"]:
        # float32: bf16 keeps 8 bits of mantissa, so a log-probability near -40 would be off by a quarter of a nat.
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        picked: Tensor = logits[source, label] - logits.logsumexp(dim=1)[source]
        return picked


def _in_blocks(packed: Packed) -> Packed:
    """Return the layout with rows padded to whole blocks, so that few widths are ever compiled."""
    extra = -packed.tokens.shape[1] % BLOCK

    def wider(tensor: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(tensor, (0, extra), value=fill)

    return packed._replace(
        tokens=wider(packed.tokens, 0),
        positions=wider(packed.positions, 0),
        segment=wider(packed.segment, PADDING),
        branch=wider(packed.branch, 0),
    )


def sum_by_slot(log_probability: Float[Tensor, " S"], packed: Packed) -> Float[Tensor, " scores"]:
    """Return one score a candidate (or stream): the sum over its tokens, in nats, float64.

    float64, as ten tokens make a score near -90 nats, of which float32 keeps 8e-6, and it is differences of scores that
    are learnt from.
    """
    wide = log_probability.double()
    return wide.new_zeros(packed.num_scores).index_add(0, packed.slot, wide)


def to_device(layout: Layout, device: torch.device | str) -> Packed:
    """Return the layout as tensors on `device`."""
    arrays = {name: getattr(layout, name) for name in ARRAYS}
    order = np.argsort(layout.source, kind="stable")
    arrays["state"], arrays["source"] = np.unique(layout.source[order], return_inverse=True)
    arrays["label"], arrays["slot"] = layout.label[order], layout.slot[order]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    return Packed(**tensors, num_scores=layout.num_scores, plain=layout.plain)


def segments_of(
    catalogue: Catalogue,
    histories: list[ndarray],
    candidates: list[ndarray],
    shown: list[ndarray] | None = None,
) -> Segments:
    """Return the prompts of `histories` and the items in `candidates` as tokens.

    A template that shows candidates shows `shown` (else the candidates themselves) by rising item number, which is a
    seeded shuffle: the place in the list says nothing of which one is the positive.

    Raises:
        DataError: if a row names an item that the catalogue lacks, or has no candidates; with the row's place.
    """
    _refuse_unknown(catalogue, histories, candidates)
    listed = candidates if shown is None else shown
    prompts = [catalogue.prompt(history, np.sort(items)) for history, items in zip(histories, listed, strict=True)]
    tokens, lengths = catalogue.items(np.concatenate(candidates))
    return Segments(
        prompt_tokens=np.concatenate(prompts),
        prompt_lengths=np.array([prompt.size for prompt in prompts], dtype=np.int64),
        candidate_tokens=tokens,
        candidate_lengths=np.asarray(lengths, dtype=np.int64),
        candidates_each=np.array([items.size for items in candidates], dtype=np.int64),
    )


def _refuse_unknown(catalogue: Catalogue, histories: list[ndarray], candidates: list[ndarray]) -> None:
    for row, (history, items) in enumerate(zip(histories, candidates, strict=True)):
        if not items.size:
            raise DataError(f"row {row} of those to score has no candidates; give every row at least one")
        for what, named in (("history", history), ("candidates", items)):
            if named.size and not 0 <= named.min() <= named.max() < catalogue.num_items:
                strange = named[(named < 0) | (named >= catalogue.num_items)][0]
                raise DataError(
                    f"row {row} of those to score has item {strange} in its {what}, but the catalogue has items 0 to "
                    f"{catalogue.num_items - 1}; use the tables of the run that made this model"
                )


def lay_out(catalogue: Catalogue, segments: Segments) -> Layout:
    """Return the rows in which this catalogue's model scores candidates: behind one prompt if it can."""
    return candidate_layout(segments) if catalogue.shares_prompt else separate_layout(segments)


def lay_out_streams(catalogue: Catalogue, streams: list[ndarray]) -> Layout:
    """Return the rows in which this catalogue's model scores every token of streams but the first."""
    lengths = np.array([stream.size for stream in streams], dtype=np.int64)
    return stream_layout(np.concatenate(streams), lengths, None if catalogue.shares_prompt else one_a_row)


def segment_lengths(
    catalogue: Catalogue,
    histories: list[ndarray],
    candidates: list[ndarray],
    shown: list[ndarray] | None = None,
) -> Int[ndarray, " U"]:
    """Return the tokens that each segment reads: candidates but for their last, and the prompt, once or for each."""
    listed = candidates if shown is None else shown
    own = np.array([(catalogue.item_lengths[items] - 1).sum() for items in candidates], dtype=np.int64)
    prompts = [catalogue.prompt_length(h, items) for h, items in zip(histories, listed, strict=True)]
    copies = 1 if catalogue.shares_prompt else np.array([items.size for items in candidates], dtype=np.int64)
    return np.array(prompts, dtype=np.int64) * copies + own


def score_rows(
    scorer: ItemScorer,
    catalogue: Catalogue,
    histories: list[ndarray],
    candidates: list[ndarray],
    *,
    tokens_per_micro_batch: int,
    shown: list[ndarray] | None = None,
) -> list[Float[ndarray, " C"]]:
    """Return the summed log-probability of each row's candidates, in their order, float32, in nats.

    Rows are scored in groups of like length under a budget of tokens; no gradient. `shown`: as in `segments_of`.
    """
    listed = candidates if shown is None else shown
    lengths = segment_lengths(catalogue, histories, candidates, listed)
    found: list[ndarray] = [np.zeros(0, dtype=np.float32)] * len(histories)
    device = next(scorer.parameters()).device
    for group in groups_by_tokens(lengths, tokens_per_micro_batch):
        chosen = [candidates[row] for row in group]
        segments = segments_of(catalogue, [histories[row] for row in group], chosen, [listed[row] for row in group])
        packed = to_device(lay_out(catalogue, segments), device)
        with torch.inference_mode():
            scores = sum_by_slot(scorer(packed), packed).float().cpu().numpy()
        borders = np.cumsum([items.size for items in chosen])[:-1]
        for row, own in zip(group, np.split(scores, borders), strict=True):
            found[row] = own
    return found


def groups_by_tokens(lengths: Int[ndarray, " U"], budget: int) -> list[list[int]]:
    """Return row numbers in groups of like length, each at most `budget` tokens when padded (one row at least)."""
    groups: list[list[int]] = []
    widest = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        if not groups or widest * (len(groups[-1]) + 1) > budget:
            groups.append([])
            widest = int(lengths[row])
        groups[-1].append(row)
    return groups


class LoadedScorer:
    """A recommender's folder opened for scoring, on the GPU where there is one."""

    def __init__(self, folder: Path, *, tokens_per_micro_batch: int) -> None:
        """Open the folder.

        Raises:
            ModelError, CatalogueError: if it is not a recommender that recray wrote whole.
        """
        model, self.catalogue = open_recommender(folder, dtype=stored_dtype(folder))
        self._scorer = ItemScorer(model).eval()
        self._budget = tokens_per_micro_batch
        if torch.cuda.is_available():
            self._scorer.cuda()
        self._prior = np.full(self.catalogue.num_items, np.nan, dtype=np.float32)

    def __call__(
        self, histories: list[ndarray], candidates: list[ndarray], shown: list[ndarray] | None = None
    ) -> list[Float[ndarray, " C"]]:
        """Return the summed log-probability of each row's candidates, as `score_rows`."""
        return score_rows(
            self._scorer, self.catalogue, histories, candidates, tokens_per_micro_batch=self._budget, shown=shown
        )

    def prior(self, candidates: list[ndarray]) -> list[Float[ndarray, " C"]]:
        """Return log pi(item | prompt of an empty history) of each row's candidates, nats, summed over the tokens.

        A template that shows candidates shows the row's own. Else an item's is the same in every row, and is made once.
        """
        if self.catalogue.template.shows_candidates:
            return self([_NO_HISTORY] * len(candidates), candidates)
        wanted = np.unique(np.concatenate(candidates))
        new = wanted[np.isnan(self._prior[wanted])]
        if new.size:
            pieces = np.array_split(new, -(-new.size // PRIORS_A_ROW))
            self._prior[new] = np.concatenate(self([_NO_HISTORY] * len(pieces), pieces))
        return [self._prior[items] for items in candidates]
