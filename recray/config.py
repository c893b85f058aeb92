"""The settings of a run: one frozen model a stage, gathered in `Pipeline`.

A recipe returns a `Pipeline`; `--config` files and `--set a.b=c` are laid over it. Unknown keys, wrong types and
settings that contradict each other are refused before anything starts. Each stage is given its own part only, and
is skipped while that part, its inputs and its version are unchanged.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from recray.errors import ConfigError
from recray.objectives import registry
from recray.space import PREFIX, Point, Range, Space, is_range, named_ranges


class Unit:
    """What a number is a number of: a type's mark, told by the index of settings (docs/settings.md)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(core) | {"unit": self.name}


Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0), Unit("share")]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0), Unit("share")]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0), Unit("share")]
Seconds = Annotated[Positive, Unit("s")]
Rows = Annotated[Count, Unit("rows")]
Items = Annotated[Count, Unit("items")]
Tokens = Annotated[Count, Unit("tokens")]
Steps = Annotated[Count, Unit("steps")]
Passes = Annotated[Count, Unit("passes")]
Interactions = Annotated[Count, Unit("interactions")]
Sampler = Literal[
    "uniform",
    "popularity",
    "inverse_popularity",
    "in_batch",
    "mixed",
    "adaptive",
    "adaptive_mixed",
    "same_category",
    "nearest",
    "self_play",
    "top_k_stochastic",
]


class Part(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # Not written down at their default: what was made before there were such settings stays up to date.
    younger: ClassVar[tuple[str, ...]] = ()

    @property
    def left_out(self) -> set[str]:
        """Settings that are not written down."""
        fields = type(self).model_fields
        return {name for name in self.younger if getattr(self, name) == fields[name].default}

    @model_serializer(mode="wrap")
    def _written_down(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key not in self.left_out}


class Chosen(Part):
    """A group with settings that hold under one choice only: elsewhere they are refused, and not written down."""

    # Idle ones that are written down all the same: what was made before they could be idle stays up to date.
    written: ClassVar[tuple[str, ...]] = ()

    @property
    def choice(self) -> str:
        """What was chosen."""
        raise NotImplementedError

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that do not hold under this choice."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _idle_ones_are_not_set(self) -> Self:
        fields = type(self).model_fields
        own = [name for name in fields if name not in self.idle]
        wrong = [
            f"{name}: not a setting of {self.choice}; the nearest is {difflib.get_close_matches(name, own, 1, 0.0)[0]}"
            for name in self.idle
            if getattr(self, name) != fields[name].default
        ]
        if wrong:
            raise _refused("\n".join(wrong))
        return self

    @property
    def left_out(self) -> set[str]:
        """Settings that are not written down: young ones at their default, and idle ones."""
        return super().left_out | (set(self.idle) - set(self.written))


def _refused(wrong: str) -> PydanticCustomError:
    """Return the error of a group whose lines begin with a setting's name."""
    return PydanticCustomError("objective_setting", "{wrong}", {"wrong": wrong})


class Columns(Part):
    """Which columns of a user's log mean what."""

    user: str = Field("user_id", description="Who met the item.")
    item: str = Field("item_id", description="Which item was met; the same name in the catalogue.")
    time: str | None = Field(None, description="None: `timestamp` where the log has it, else `position`.")
    time_unit: Literal["auto", "seconds", "milliseconds", "microseconds", "nanoseconds"] = Field(
        "auto", description="Of times given as numbers. auto: the one in which a number lies in 1995 to 2100."
    )
    rating: str | None = Field(None, description="None: `rating` where the log has it.")
    title: str = Field("title", description="In a RecBole file without it: `name`, `movie_title`, ...")
    genres: str | None = Field(
        None, description="None: `genres`, else `tags` (RecBole: `class`, ...), if there is one."
    )


class Synthetic(Part):
    """Logs with known truth, made when no data is given."""

    interactions: Interactions = Field(40_000, description="How many are made.")
    users: Annotated[Count, Unit("users")] | None = Field(None, description="None: follows from interactions.")
    items: Items | None = Field(None, description="None: follows from interactions.")
    genres: Annotated[Count, Unit("genres")] = Field(12, description="What tastes and items are made of.")
    taste_drift: NonNegative = Field(
        0.15, description="Chance that a session begins with a part of the taste replaced."
    )
    popularity_exponent: NonNegative = Field(
        0.8, description="Of an item's rank, in how often it is offered: 0 all alike, 1 Zipf."
    )


class Ingest(Part):
    """Logs and catalogue in, one schema out."""

    data: str | None = Field(
        None, description="File, folder or glob, local or URI; forms: docs/formats.md. None: synthetic logs."
    )
    items: str | None = Field(
        None, description="Catalogue, where it does not lie beside the log as `items.*` or `NAME.item`."
    )
    columns: Columns = Columns()
    min_rating: float | None = Field(None, description="Ratings below are not implicit feedback and are left out.")
    min_user_interactions: Interactions = Field(1, description="k-core: fewer, and the user goes.")
    min_item_interactions: Interactions = Field(1, description="k-core: fewer, and the item's interactions go.")
    max_users: Annotated[Count, Unit("users")] | None = Field(None, description="A seeded sample of users.")
    synthetic: Synthetic = Synthetic()


class Sequences(Part):
    """Histories and splits."""

    split: Literal["leave_one_out", "leave_last_n", "time_cut", "published"] = Field(
        "time_cut", description="What is held out: the latest of each user, all after two moments, or as the data says."
    )
    leave_last: Interactions = Field(1, description="Held-out interactions a user and split, for leave_last_n.")
    validation_fraction: Fraction = Field(0.1, description="Of all interactions, by time; for time_cut.")
    test_fraction: Fraction = Field(0.1, description="Of all interactions, by time; for time_cut.")
    targets_per_user: Rows = Field(10, description="Most evaluation rows a user and split, for time_cut; seeded.")
    examples_per_user: Rows = Field(10, description="Most alignment examples a user; the latest.")
    max_history: Items = Field(20, description="The latest items of a history that a row keeps.")
    num_candidates: Annotated[int, Field(ge=2), Unit("items")] = Field(100, description="Target included.")
    fresh_candidates: bool = Field(False, description="Draw candidates afresh even where the data publishes some.")
    max_validation_rows: Rows = Field(2_000, description="A seeded sample of more.")
    max_test_rows: Rows = Field(10_000, description="A seeded sample of more.")


class Audit(Part):
    """Rules that need no model, on the rows and candidates of the evaluation."""

    rows: Rows = Field(20_000, description="Most test rows that are scored; a seeded sample of more.")
    bootstrap_samples: Annotated[Count, Unit("samples")] = Field(1000, description="Of users, for an interval.")
    confidence: Fraction = Field(0.95, description="Of intervals.")


class Users(Chosen):
    """SASRec, the light auxiliary recommender; see docs/confidence.md."""

    younger: ClassVar[tuple[str, ...]] = ("folds", "shuffled")

    dim: Count = Field(64, description="Of vectors.")
    layers: Count = Field(2, description="Of self-attention.")
    heads: Count = Field(2, description="Of attention.")
    max_history: Items = Field(50, description="The latest items of a history that are read.")
    dropout: ShareBelowOne = Field(0.2, description="Of embeddings, attention and feed-forward parts.")
    loss: Literal["full_softmax", "sampled_softmax"] = Field(
        "full_softmax", description="What the next item is told from: all items, or sampled negatives."
    )
    sampled_negatives: Items = Field(256, description="For sampled_softmax and the samplers that a batch shares.")
    sampler: Sampler = Field("popularity", description="Of sampled negatives; for sampled_softmax.")
    exponent: NonNegative = Field(1.0, description="Of training frequency, for popularity and inverse_popularity.")
    uniform_share: Fraction = Field(0.5, description="Of sampled negatives, for mixed and adaptive_mixed.")
    hardest: Items = Field(
        64,
        description="Items of highest score that a target is compared with: of the sampled negatives for adaptive and "
        "adaptive_mixed, of the catalogue for self_play.",
    )
    listed: Items = Field(
        15,
        description="Negatives of a target's own, others in every step; for same_category, nearest, top_k_stochastic.",
    )
    nearest_from: Annotated[Count, Unit("rank")] = Field(
        11, description="Rank of nearness to the target, 1 the nearest item; for nearest."
    )
    nearest_to: Annotated[Count, Unit("rank")] = Field(
        100, description="The last rank that is drawn from; for nearest."
    )
    top_k: Items = Field(30, description="Items of highest score that are drawn from, for top_k_stochastic.")
    passes: Passes = Field(30, description="Most, over all histories.")
    patience: Passes = Field(3, description="Without a better validation NDCG@10, after which it stops.")
    global_batch: Annotated[Count, Unit("windows")] = Field(128, description="Windows of histories a step.")
    learning_rate: Positive = Field(1e-3, description="Of AdamW, the same in every step.")
    weight_decay: NonNegative = Field(0.0, description="AdamW's.")
    shuffled: Share = Field(
        0.0, description="Share of histories cut into windows in a random order, others in every pass."
    )
    folds: Literal[1, 2] = Field(
        1, description="2: a user's negatives are judged by a model that was fitted on the other half of the users."
    )

    @property
    def choice(self) -> str:
        """The loss, and the sampler where it has one."""
        return self.loss if self.loss == "full_softmax" else f"{self.loss} with {self.sampler} negatives"

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings of other losses or samplers."""
        listing = ("same_category", "nearest", "self_play", "top_k_stochastic")  # a list for each target
        of_samplers = {
            "exponent": ("popularity", "inverse_popularity"),
            "uniform_share": ("mixed", "adaptive_mixed"),
            "hardest": ("adaptive", "adaptive_mixed", "self_play"),
            "listed": ("same_category", "nearest", "top_k_stochastic"),
            "nearest_from": ("nearest",),
            "nearest_to": ("nearest",),
            "top_k": ("top_k_stochastic",),
        }
        if self.loss == "full_softmax":
            return ("sampler", *of_samplers)
        idle = tuple(name for name, samplers in of_samplers.items() if self.sampler not in samplers)
        return (*idle, "sampled_negatives") if self.sampler in listing else idle

    @model_validator(mode="after")
    def _there_are_enough(self) -> Self:
        sampled = ("hardest", self.sampled_negatives, "users.sampled_negatives")
        among = {
            "adaptive": sampled,
            "adaptive_mixed": sampled,
            "nearest": ("listed", self.nearest_to - self.nearest_from + 1, "the ranks from nearest_from to nearest_to"),
            "top_k_stochastic": ("listed", self.top_k, "users.top_k"),
        }.get(self.sampler)
        if self.loss == "full_softmax" or among is None:
            return self
        name, most, of_what = among
        if getattr(self, name) > most:
            raise _refused(f"{name}: {getattr(self, name)}, more than {of_what}, {max(0, most)}")
        return self


class LanguageModel(Part):
    """A Hugging Face folder or id, or the shape of a small Llama made here."""

    path: str | None = Field(None, description="Local folder or hub id. None: from scratch, by the shape below.")
    trust_remote_code: bool = Field(False, description="Run the code that a model's folder or hub page brings along.")
    hidden_size: Count = Field(128, description="Width of a model made here.")
    layers: Count = Field(4, description="Of a model made here.")
    heads: Count = Field(4, description="Attention heads of a model made here.")
    intermediate_size: Count = Field(384, description="Width inside the feed-forward part of a model made here.")
    max_positions: Tokens = Field(1024, description="Longest text of a model made here.")
    vocabulary: Tokens = Field(2048, description="Tokens of the tokenizer trained on the catalogue.")
    tokens: Literal["words", "titles"] = Field(
        "words",
        description="words: words and pieces of them; titles: those met most in training are a token each, too, up to "
        "three quarters of the vocabulary.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of weights and activations.")
    quantization: Literal["none", "nf4"] = Field("none", description="Of the frozen base while sft trains an adapter.")


class Prompt(Part):
    """How a history becomes text."""

    template: Literal["titles", "instruction", "instruction_candidates", "chat", "chat_candidates"] = Field(
        "titles", description="One of recray.data.prompts."
    )
    max_tokens: Tokens = Field(512, description="Of the prompt; the oldest items go first.")


class Lora(Part):
    """A low-rank adapter: it is trained, the model under it is frozen."""

    rank: Count = Field(16, description="Of each adapter matrix.")
    alpha: Positive = Field(32.0, description="The adapter's output is scaled by alpha / rank.")
    dropout: ShareBelowOne = Field(0.0, description="Of the adapter's input.")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear", description="All linear layers but the head, or a list of their names."
    )


class Optimiser(Part):
    """AdamW with warm-up, cosine decay and clipping, under a ZeRO stage."""

    learning_rate: Positive = Field(description="At the peak, after warm-up.")
    weight_decay: NonNegative = Field(0.01, description="AdamW's, on matrices.")
    warmup_fraction: ShareBelowOne = Field(0.05, description="Of all steps: the rate rises to its peak.")
    final_fraction: Share = Field(0.1, description="Of the peak, at the last step.")
    clip_norm: Positive = Field(1.0, description="Longest gradient, over all weights; a longer one is shortened.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO.")
    engine: Literal["deepspeed", "plain"] = Field(
        "deepspeed", description="plain: PyTorch alone; the weights are whole on every rank."
    )
    gradient_checkpointing: bool = Field(
        False, description="Layers are run again in backward, so that only their inputs are kept."
    )
    most_skipped: Annotated[int, Field(ge=0), Unit("steps")] = Field(
        10, description="Steps skipped as loss or gradient were not finite; one more ends the run."
    )


class Sft(Part):
    """The language model learns the catalogue and the histories."""

    younger: ClassVar[tuple[str, ...]] = ("replaced",)

    model: LanguageModel = LanguageModel()
    lora: Lora | None = Field(None, description="None: all weights are trained.")
    prompt: Prompt = Prompt()
    optimiser: Optimiser = Optimiser(learning_rate=3e-3)
    global_batch: Annotated[Count, Unit("histories")] = Field(16, description="Histories a step.")
    window_items: Items = Field(20, description="Items a row teaches: longer histories are cut into windows.")
    shuffled: Share = Field(
        0.0, description="Share of histories cut into windows in a random order, others in every pass; for `titles`."
    )
    replaced: Share = Field(
        0.0,
        description="Share of a window's items that give way to random ones of the catalogue, others in every pass; "
        "for `titles`.",
    )
    passes: Passes = Field(8, description="Most, over all histories.")
    patience: Annotated[Count, Unit("validations")] = Field(
        2, description="Validations without a better NDCG@10 before it stops."
    )
    validate_every: Annotated[Positive, Unit("passes")] = Field(1.0, description="Passes between validations.")
    validation_rows: Rows = Field(512, description="On which a fit is judged; a seeded sample.")
    tokens_per_micro_batch: Tokens = Field(8192, description="Most that a process passes through the model at once.")


class Negatives(Chosen):
    """Which items a positive is compared with; see docs/negatives.md."""

    written: ClassVar[tuple[str, ...]] = ("exponent",)

    sampler: Sampler = Field("uniform", description="How they are drawn.")
    num: Items = Field(15, description="Drawn a row; the first N of them are the same for every larger number.")
    exponent: NonNegative = Field(1.0, description="Of training frequency, for popularity and inverse_popularity.")
    batch_rows: Annotated[int, Field(ge=2), Unit("rows")] = Field(
        32, description="Rows whose targets stand for choice, for in_batch, mixed, adaptive and adaptive_mixed."
    )
    uniform_share: Fraction = Field(0.5, description="Of a row's negatives; the others are in-batch; for mixed.")
    candidates: Items = Field(
        100,
        description="Uniform items that are scored, for adaptive_mixed (beside the batch's), self_play and "
        "top_k_stochastic.",
    )
    nearest_from: Annotated[Count, Unit("rank")] = Field(
        11, description="Rank of nearness to the target, 1 the nearest item; for nearest."
    )
    nearest_to: Annotated[Count, Unit("rank")] = Field(
        100, description="The last rank that is drawn from; for nearest."
    )
    top_k: Items = Field(30, description="Best-scored candidates that are drawn from, for top_k_stochastic.")

    @classmethod
    def samplers(cls) -> dict[str, tuple[str, ...]]:
        """Return the settings of each sampler, beside `num`."""
        return {
            "uniform": (),
            "popularity": ("exponent",),
            "inverse_popularity": ("exponent",),
            "in_batch": ("batch_rows",),
            "mixed": ("batch_rows", "uniform_share"),
            "adaptive": ("batch_rows",),
            "adaptive_mixed": ("batch_rows", "candidates"),
            "same_category": (),
            "nearest": ("nearest_from", "nearest_to"),
            "self_play": ("candidates",),
            "top_k_stochastic": ("candidates", "top_k"),
        }

    @property
    def choice(self) -> str:
        """The sampler."""
        return self.sampler

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings of other samplers."""
        own = {"sampler", "num", *self.samplers()[self.sampler]}
        return tuple(name for name in type(self).model_fields if name not in own)

    @property
    def more_inputs(self) -> tuple[str, ...]:
        """Stages that this sampler reads beside those that all do."""
        if self.sampler in ("adaptive", "adaptive_mixed", "nearest"):
            return ("users",)
        return ("sft",) if self.sampler in ("self_play", "top_k_stochastic") else ()

    @model_validator(mode="after")
    def _there_are_enough(self) -> Self:
        others = self.batch_rows - 1
        to_choose_from = {
            "in_batch": others,
            "adaptive": others,
            "adaptive_mixed": others + self.candidates,
            "nearest": self.nearest_to - self.nearest_from + 1,
            "self_play": self.candidates,
            "top_k_stochastic": min(self.top_k, self.candidates),
        }.get(self.sampler, self.num)
        if to_choose_from < self.num:
            own = ", ".join(f"negatives.{name}" for name in self.samplers()[self.sampler])
            raise _refused(
                f"num: {self.num} are wanted, but {self.sampler} has {max(0, to_choose_from)} items a row to choose "
                f"from; lower it or change {own}"
            )
        if self.sampler == "top_k_stochastic" and self.top_k > self.candidates:
            raise _refused(f"top_k: {self.top_k}, more than negatives.candidates, {self.candidates}")
        return self


class Reference(Part):
    """Scores under the frozen SFT model."""

    source: Literal["table", "adapter_off", "frozen_copy"] = Field(
        "table",
        description="Scored once, before; or in every step of align, by its model without the adapter, or by a copy.",
    )
    tokens_per_micro_batch: Tokens = Field(16384, description="Most that a process passes through the model at once.")


class _Objective(Part):
    name: str = Field("napo", description="`sft` goes on with supervised fine-tuning: the control at equal time.")
    beta: Positive = Field(1.0, description="What scores or log-ratios, in nats, are multiplied by.")
    reference: bool = Field(True, description="Log-ratios against the SFT model; False: policy only.")
    margin: Literal["per_negative", "batch", "none"] = Field(
        "per_negative",
        description="Lead asked of the positive: one a negative, by its confidence; one a batch, as released; or none.",
    )
    margin_base: NonNegative = Field(1.0, description="gamma_0, in units of beta * nats.")
    margin_slope: NonNegative = Field(0.3, description="alpha.")
    sharing: Literal["none", "top_fraction", "threshold"] = Field(
        "top_fraction",
        description="Whose negatives a user borrows: the most similar users', or those above a threshold.",
    )
    sharing_fraction: Share = Field(0.7, description="rho, of the other users, for top_fraction.")
    sharing_threshold: float = Field(0.5, description="Least similarity, for threshold.")
    similarity: Literal["cosine", "dot"] = Field("cosine", description="Of two users' vectors.")
    guard: bool = Field(True, description="A borrower never uses an item it met in training, nor its own target.")
    guard_near: Literal["none", "mask", "shrink"] = Field(
        "none", description="Borrowed items that the user likely likes are left out, or their margin shrinks to 0."
    )
    guard_threshold: Annotated[float, Field(ge=-0.5, le=0.5)] = Field(
        -0.4, description="Confidence below which guard_near acts: at -0.4, in what is liked more than 90 % of items."
    )
    guard_own: bool = Field(False, description="guard_near acts on the user's own negatives, too.")
    reuse: Literal["score", "item"] = Field(
        "score",
        description="Of borrowed negatives: scores under the owner's prompt (napo), or items, scored under one's own.",
    )
    reuse_items: Items = Field(8, description="Most that a user borrows in a step, for reuse=item.")
    detach_shared: bool = Field(False, description="As released: no negative that NAPO reads gets a gradient.")
    subtract_log_pool: bool = Field(False, description="Subtract ln |N_i|, so that pool size does not act as margin.")
    nll_weight: NonNegative = Field(0.0, description="Of the positive's negative log-probability, added as an anchor.")
    length_normalised: bool = Field(False, description="Scores are means over an item's tokens, not sums.")

    @property
    def has_margins(self) -> bool:
        """Whether it reads a pool of negatives with a margin each: its own, and what it borrows."""
        return self.name in registry.OBJECTIVES and "pool_score" in registry.OBJECTIVES[self.name].reads

    @property
    def shares_scores(self) -> bool:
        """Whether it looks at scores of other users' negatives."""
        return self.has_margins and self.reuse == "score" and self.sharing != "none"

    @property
    def reuses_items(self) -> bool:
        """Whether users score others' negatives under their own prompt."""
        return self.reuse == "item" and registry.lengthens(self.name)

    @property
    def most_borrowed(self) -> int:
        """Most items that stand behind a user's own candidates."""
        return self.reuse_items if self.reuses_items else 0

    @property
    def uses_reference(self) -> bool:
        """Whether its scores are log-ratios: by choice where there is one, else not."""
        return self.reference and "reference" in self._own_settings

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of this objective, by name."""
        return {name: getattr(self, name) for name in self._own_settings}

    @property
    def _own_settings(self) -> tuple[str, ...]:
        return registry.settings_of(self.name, {"reuse": self.reuse, "guard_near": self.guard_near})

    @model_validator(mode="before")
    @classmethod
    def _has_these_settings(cls, given: Any) -> Any:
        name = given.get("name", "napo") if isinstance(given, Mapping) else None
        if name not in registry.names():
            return given  # for others to say
        wrong = [
            _not_a_setting(key, name, given, set(cls.model_fields)) for key in given if not _speaks_of(key, given, name)
        ]
        if wrong:
            raise PydanticCustomError("objective_setting", "{wrong}", {"wrong": "\n".join(wrong)})
        kept = {key: value for key, value in given.items() if key == "name" or key in registry.settings_of(name, given)}
        return {**registry.defaults_of(name), **kept}

    @field_validator("name")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name in registry.names():
            return name
        near = difflib.get_close_matches(name, registry.names(), n=1, cutoff=0.0)[0]
        names = ", ".join(registry.names())
        raise PydanticCustomError(
            "objective",
            "no such objective; the nearest is '{near}' (there are: {names})",
            {"near": near, "names": names},
        )

    @model_validator(mode="after")
    def _borrows_from_somebody(self) -> Self:
        if self.reuses_items and self.sharing == "none":
            raise _refused("reuse: item needs users who lend, and sharing is none; set align.objective.sharing")
        if self.guard_near == "shrink" and not (self.has_margins and self.margin != "none"):
            raise _refused(
                f"guard_near: shrink needs a margin to make smaller, and {self.name} has none here; set "
                "align.objective.guard_near=mask"
            )
        return self

    @model_serializer(mode="wrap")
    def _own_part(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write down what this objective reads: the settings of others say nothing of it."""
        own = self._own_settings
        off = {key: value for key, value in registry.OPTIONS.items() if _default(self.name, key) == value}
        off |= {key: _default(self.name, key) for key in registry.YOUNGER}
        return {
            key: value
            for key, value in dump(self).items()
            if key == "name" or (key in own and not (key in off and value == off[key]))
        }


def _default(name: str, key: str) -> Any:
    return registry.defaults_of(name).get(key, Objective.model_fields[key].default)


def _speaks_of(key: str, given: Mapping[str, Any], name: str) -> bool:
    """Return whether this objective has the setting, or is told that it has not: `margin=none` is true of all."""
    own = registry.settings_of(name, given)
    return key == "name" or key in own or (key in ("margin", "sharing") and given[key] == "none")


def _not_a_setting(key: str, name: str, given: Mapping[str, Any], known: set[str]) -> str:
    own = [*registry.settings_of(name, given), "name"]
    near = difflib.get_close_matches(key, own, n=1, cutoff=0.0)[0]
    what = f"not a setting of {name}" if key in known else "unknown setting"
    if key in registry.every_setting_of(name):
        what += " as it is set here"
    return f"{key}: {what}; the nearest is align.objective.{near}"


def _own_fields() -> dict[str, Any]:
    """Return a field for each setting that an objective of the registry brings with it."""
    fields: dict[str, Any] = {}
    for name, own in registry.own_settings().items():
        bounds: dict[str, Any] = {}
        if not isinstance(own.default, bool):
            bounds = {"gt" if own.open else "ge": own.least} | ({} if own.most is None else {"le": own.most})
        fields[name] = (type(own.default), Field(own.default, description=own.description, **bounds))
    return fields


if TYPE_CHECKING:

    class Objective(_Objective):
        """What is minimised. Defaults are NAPO as recray means it; see docs/papers.md.

        Beside the settings that are named here it has those that the lines of `recray.objectives.registry` bring.
        """

        def __init__(self, **settings: Any) -> None: ...
else:
    Objective = create_model(
        "Objective",
        __base__=_Objective,
        __module__=__name__,
        __doc__="What is minimised. Defaults are NAPO as recray means it; see docs/papers.md.",
        **_own_fields(),
    )


class Align(Part):
    """Preference optimisation from the SFT model."""

    younger: ClassVar[tuple[str, ...]] = ("refresh_every",)

    objective: Objective = Objective()
    lora: Lora | None = Field(None, description="A fresh adapter on sft/model. None: all weights are trained.")
    optimiser: Optimiser = Optimiser(learning_rate=2e-4)
    num_negatives: Items | None = Field(None, description="The first N of those drawn. None: all.")
    global_batch: Annotated[int, Field(ge=2), Unit("rows")] = Field(
        32, description="Users a step; also the sharing pool."
    )
    steps: Steps = Field(200, description="Most.")
    validate_every: Steps = Field(50, description="Steps between validations; each also checkpoints.")
    seconds: Seconds | None = Field(None, description="Of steps; stop at the first validation after so long.")
    validation_rows: Rows = Field(512, description="On which a fit is judged; a seeded sample.")
    tokens_per_micro_batch: Tokens = Field(16384, description="Most that a process passes through the model at once.")
    refresh_every: Count | None = Field(
        None,
        description="Steps after which negatives are drawn again from what the model then ranks highest, a multiple of "
        "validate_every; for the samplers self_play and top_k_stochastic. None: never.",
    )
    window_rows: Rows = Field(65536, description="Rows of the shuffle window: what one pass keeps close together.")
    micro_batches: Count = Field(1, description="Least micro-batches a rank and step; token budgets may ask for more.")


class Evaluate(Part):
    """Ranking on the test split."""

    ks: tuple[Annotated[Count, Unit("rank")], ...] = Field((1, 5, 10, 20), description="Of HR@k, NDCG@k and the rest.")
    bootstrap_samples: Annotated[Count, Unit("samples")] = Field(1000, description="Of users, for an interval.")
    confidence: Fraction = Field(0.95, description="Of intervals.")
    keep_ranked: Items = Field(20, description="Of each list, the first ones that are written down.")
    score: Literal["summed", "mean", "prior_corrected", "validation"] = Field(
        "validation", description="What language models rank by; validation: for each, the form best on validation."
    )
    prior_weights: tuple[Positive, ...] = Field(
        (0.1, 0.25, 0.5, 1.0),
        min_length=1,
        description="Shares of the log-probability without a history that prior_corrected may take off.",
    )
    validation_rows: Rows = Field(512, description="On which the form of the score is chosen.")
    generate_rows: Annotated[int, Field(ge=0), Unit("rows")] = Field(
        200, description="Test rows, a seeded sample, whose next item language models also write freely. 0: none."
    )
    tokens_per_micro_batch: Tokens = Field(16384, description="Most that a process passes through the model at once.")


class Report(Part):
    """What the report shows."""

    examples: Annotated[int, Field(ge=0), Unit("rows")] = Field(
        6, description="Test rows, drawn by the seed, with what every model showed."
    )


class Tune(Part):
    """A search over settings of `align`, judged on validation; see docs/search.md."""

    space: dict[str, Range] | None = Field(
        None,
        description="Ranges of settings of align or its objective: `margin_base: {uniform: [0, 2]}`. None: what the "
        "objective says is worth trying, its margin and the number of negatives.",
    )
    trials: Annotated[Count, Unit("points")] = Field(6, description="Points of the space that are tried.")
    seeds: Annotated[Count, Unit("runs")] = Field(
        1, description="Runs of each point: the pipeline's seed, and those after it."
    )
    search: Literal["optuna", "random"] = Field("optuna", description="optuna: Optuna's TPE, led by what came out.")
    goals: tuple[Literal["ndcg@10", "popularity@10"], ...] = Field(
        ("ndcg@10",), min_length=1, description="What TPE is led by: high ranking, low popularity of what is shown."
    )
    steps: Steps = Field(60, description="Of each run.")
    validate_every: Steps = Field(20, description="Between validations, in place of align's.")
    stop_early: bool = Field(False, description="ASHA: runs that fall behind others at a rung end there.")
    first_rung: Steps = Field(20, description="For stop_early; a multiple of validate_every.")
    reduction: Annotated[int, Field(ge=2)] = Field(
        3, description="For stop_early: one run in so many goes on, and each rung is so many times the one before."
    )
    retries: Annotated[int, Field(ge=0), Unit("starts")] = Field(
        1, description="Of a run that crashed, before it is marked as failed."
    )
    at_once: Annotated[Count, Unit("runs")] | None = Field(
        None, description="Most that run side by side. None: as many as the cluster holds."
    )
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="Where results are sent besides; each has to be installed."
    )

    @field_validator("space", mode="before")
    @classmethod
    def _by_whole_names(cls, given: Any) -> Any:
        return named_ranges(given, _whole_names()) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _rungs_are_validated(self) -> Self:
        if self.stop_early and self.first_rung % self.validate_every:
            raise ValueError(
                f"tune.first_rung is {self.first_rung}, but must be a multiple of tune.validate_every, "
                f"{self.validate_every}: runs are compared where they are validated"
            )
        return self


def _whole_names() -> dict[str, str]:
    """Return the whole name below `align` of each setting of an objective that may be called by its own."""
    return {name: f"{PREFIX}{name}" for name in Objective.model_fields if name != "name"} | {
        PREFIX.rstrip("."): f"{PREFIX}name"
    }


class Compare(Part):
    """Methods of alignment side by side, from one SFT model, judged on the same test rows."""

    objectives: tuple[str, ...] = Field(
        ("sft", "cross_entropy", "dpo", "sdpo", "napo"),
        min_length=1,
        description="Each a name and, if wanted, settings of it or of align: `napo margin=none global_batch=64`.",
    )
    seeds: Annotated[Count, Unit("runs")] = Field(
        3, description="Runs of each: the pipeline's seed, and those after it."
    )
    steps: Steps | None = Field(None, description="Of each run. None: as align.")
    seconds: Seconds | None = Field(None, description="Of steps of each run, for equal time. None: as align.")
    rows: Rows = Field(10_000, description="Most test rows that are ranked; a seeded sample of more.")


class Resources(Part):
    """Where the work runs. Never part of a fingerprint: it changes the time, not the result."""

    num_workers: Annotated[Count, Unit("processes")] = Field(1, description="Training processes: ranks.")
    cpus_per_worker: Annotated[Positive, Unit("CPUs")] = Field(
        0.5, description="Logical CPUs set aside a trainer; the rest feeds it."
    )
    gpus_per_worker: Annotated[NonNegative, Unit("GPUs")] = Field(
        0.0, description="Set aside a trainer. 0: all on CPUs."
    )
    threads_per_worker: Annotated[Count, Unit("threads")] = Field(2, description="Torch threads, without a GPU.")
    min_workers: Annotated[Count, Unit("workers")] | None = Field(
        None, description="Go on with as few when machines are lost, and with num_workers when they are back."
    )
    max_restarts: Annotated[int, Field(ge=-1), Unit("starts")] = Field(
        8, description="Starts of a fit's workers after a crash or a lost machine; then it gives up. -1: never."
    )
    checkpoint_every_s: Annotated[NonNegative, Unit("s")] = Field(
        600.0, description="Seconds; validations write one as well."
    )
    keep_checkpoints: Annotated[Count, Unit("checkpoints")] = Field(
        2, description="The newest; the best weights are kept besides."
    )
    hang_after_s: Seconds = Field(
        1800.0, description="A worker that gets nothing done for so long is ended, and the fit goes on."
    )
    data_actors: Annotated[Count, Unit("processes")] = Field(1, description="Model replicas for scoring and embedding.")


class Pipeline(Part):
    """A whole run."""

    name: str = Field(description="The recipe's; a workspace belongs to one.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of everything that is drawn.")
    ingest: Ingest = Ingest()
    sequences: Sequences = Sequences()
    audit: Audit = Audit()
    users: Users = Users()
    sft: Sft = Sft()
    negatives: Negatives = Negatives()
    reference: Reference = Reference()
    align: Align = Align()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    tune: Tune = Tune()
    compare: Compare = Compare()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _negatives_suffice(self) -> Self:
        asked = (self.tune.space or {}).get("num_negatives")
        wanted = max([self.align.num_negatives or 1, *(int(end) for end in (asked.ends if asked else ()))])
        if wanted > self.negatives.num:
            raise ValueError(
                f"align.num_negatives or tune.space asks for {wanted} negatives a row, but negatives.num "
                f"draws {self.negatives.num}; raise negatives.num or lower the others"
            )
        return self

    @model_validator(mode="after")
    def _searches_what_there_is(self) -> Self:
        try:
            search_space(self)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _negatives_can_be_refreshed(self) -> Self:
        every = self.align.refresh_every
        if every is None:
            return self
        if self.negatives.sampler not in ("self_play", "top_k_stochastic"):
            raise ValueError(
                f"align.refresh_every is {every}, but negatives.sampler={self.negatives.sampler} does not look at the "
                "model that is trained; set negatives.sampler=top_k_stochastic or self_play"
            )
        if every % self.align.validate_every:
            raise ValueError(
                f"align.refresh_every is {every}, but must be a multiple of align.validate_every, "
                f"{self.align.validate_every}: negatives are drawn again where a checkpoint is written"
            )
        return self

    @model_validator(mode="after")
    def _compares_what_there_is(self) -> Self:
        try:
            found = variants(self)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for text, part in {self.align.objective.name: self.align, **found}.items():
            if problem := unscored_reuse(part.objective, self.reference.source):
                raise ValueError(f"{text}: {problem}")
        return self

    @model_validator(mode="after")
    def _whole_titles_stand_alone(self) -> Self:
        if self.sft.model.tokens == "titles" and (self.sft.prompt.template != "titles" or self.sft.model.path):
            raise ValueError(
                "sft.model.tokens is titles, which needs a model made here (sft.model.path=null) and "
                "sft.prompt.template=titles: where more text stands around a title, it is read in pieces; "
                "set sft.model.tokens=words"
            )
        return self

    @model_validator(mode="after")
    def _workers_can_shrink(self) -> Self:
        if self.resources.min_workers is not None and self.resources.min_workers > self.resources.num_workers:
            raise ValueError(
                f"resources.min_workers is {self.resources.min_workers}, more than resources.num_workers, "
                f"{self.resources.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_what_they_need(self) -> Self:
        if self.reference.source == "adapter_off" and self.align.lora is None:
            raise ValueError(
                "reference.source is adapter_off, but align.lora is not set, so there is no adapter to switch off; "
                "set align.lora.rank=16, or reference.source=table or frozen_copy"
            )
        if self.sft.model.quantization == "none":
            return self
        for missing, what in (
            (self.sft.lora is None, "sft.lora: quantised weights can't be trained, an adapter on them can"),
            (self.sft.model.path is None, "sft.model.path: a model made here has nothing to freeze"),
            (self.resources.gpus_per_worker == 0, "resources.gpus_per_worker: it runs on CUDA only"),
            (self.sft.optimiser.zero_stage == 3, "sft.optimiser.zero_stage of 2 or less"),
        ):
            if missing:
                raise ValueError(f"sft.model.quantization is {self.sft.model.quantization}, which needs {what}")
        return self


def unscored_reuse(objective: Objective, source: str) -> str | None:
    """Return what is wrong where items would be borrowed that have no reference score; None where nothing is."""
    if not (objective.reuses_items and objective.uses_reference and source == "table"):
        return None
    return (
        "reuse=item scores borrowed items under the borrower's prompt, for which the table has no reference scores; "
        "set reference.source=adapter_off (with align.lora) or frozen_copy, or align.objective.reference=false"
    )


def variants(pipeline: Pipeline) -> dict[str, Align]:
    """Return what `compare.objectives` asks for, by its text: `align` with these settings laid over it.

    The pipeline's own objective keeps its settings there, another begins with its defaults.

    Raises:
        ConfigError: naming the text and what is wrong with it.
    """
    found = {}
    for text in pipeline.compare.objectives:
        name, *settings = text.split() or [""]
        tree: dict[str, Any] = pipeline.align.model_dump(mode="json")
        tree |= {key: value for key in ("steps", "seconds") if (value := getattr(pipeline.compare, key)) is not None}
        if name != pipeline.align.objective.name:
            tree["objective"] = {"name": name}
        for setting in settings:
            key, separator, value = setting.partition("=")
            if not separator:
                raise ConfigError(f"compare.objectives: {text!r}: {setting!r} has no '='; write napo margin=none")
            path = key.split(".")
            _lay_over(tree, _nested(path if path[0] in Align.model_fields else ["objective", *path], _value(value)))
        try:
            found[text] = Align.model_validate(tree)
        except ValidationError as error:
            known = [key.removeprefix("align.") for key in setting_names() if key.startswith("align.")]
            lines = [_explain(problem, known) for problem in error.errors()]
            raise ConfigError(f"compare.objectives: {text!r} refused:\n  " + "\n  ".join(lines)) from None
    return found


def search_space(pipeline: Pipeline) -> Space:
    """Return the range of each setting that `tune` searches, by its name below `align`.

    Without `tune.space`: what the registry says is worth trying of the pipeline's objective, the margin and the number
    of negatives where the objective reads them.

    Raises:
        ConfigError: naming the setting and the nearest valid one, or the value that it can't have.
    """
    space = pipeline.tune.space
    if space is None:
        return _default_space(pipeline)
    if not space:
        raise ConfigError("tune.space is empty, so there is nothing to search; leave it out for the default")
    base = pipeline.align
    ranged = space.get(f"{PREFIX}name")
    objectives = [base.objective.name] if ranged is None else [str(name) for name in ranged.ends]
    own = {name: _settings_below_align(name) for name in objectives if name in registry.names()}
    known = list(dict.fromkeys(name for names in own.values() for name in names))
    for name, found in space.items():
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"tune.space: {name}: not a setting that can be searched here; the nearest is {near}")
        for objective in objectives:
            for end in found.ends:
                if name in own.get(objective, (name,)):
                    point_of_space(base, {f"{PREFIX}name": objective, name: end})
    return space


def point_of_space(base: Align, point: Point) -> Align:
    """Return `base` with the values of a point laid over it; what the point's objective does not have is left out.

    The pipeline's own objective keeps its settings there, another begins with its defaults.

    Raises:
        ConfigError: naming a value that a setting can't have.
    """
    tree: dict[str, Any] = base.model_dump(mode="json")
    objective = str(point.get(f"{PREFIX}name", base.objective.name))
    if objective != base.objective.name:
        tree["objective"] = {"name": objective}
    own = _settings_below_align(objective) if objective in registry.names() else None
    for name, value in point.items():
        if own is None or name in own:
            _lay_over(tree, _nested(name.split("."), value))
    try:
        return Align.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem, []) for problem in error.errors()]
        raise ConfigError("tune.space: " + "\n  ".join(lines)) from None


def _settings_below_align(objective: str) -> list[str]:
    """Return the settings of `align` that a search under this objective may set; how long it trains is its own."""
    groups = {name.rpartition(".")[0] for name in setting_names(Align)}
    mine = [f"{PREFIX}{name}" for name in ("name", *registry.every_setting_of(objective))]
    others = [
        name
        for name in setting_names(Align)
        if not name.startswith(PREFIX) and name not in groups and name not in ("steps", "seconds", "validate_every")
    ]
    return mine + others


def _default_space(pipeline: Pipeline) -> dict[str, Range]:
    objective, rate = pipeline.align.objective, pipeline.align.optimiser.learning_rate
    if objective.name == registry.SUPERVISED:
        return {"optimiser.learning_rate": Range(loguniform=(rate / 4, rate * 4))}
    own, reads = registry.settings_of(objective.name), registry.OBJECTIVES[objective.name].reads
    found: dict[str, Range] = {}
    if "margin_base" in own and objective.margin != "none":
        found[f"{PREFIX}margin_base"] = Range(uniform=(0.0, 2.0))
    shown = "candidates" in pipeline.sft.prompt.template  # prompts that show all negatives hold for that many alone
    if "first" not in reads and not shown and pipeline.negatives.num > 1:
        numbers = {2**power - 1 for power in range(1, 12) if 2**power - 1 < pipeline.negatives.num}
        found["num_negatives"] = Range(choice=tuple(sorted(numbers | {pipeline.negatives.num})))
    for name, (low, high) in registry.search_ranges(objective.name).items():
        found[f"{PREFIX}{name}"] = Range(uniform=(low, high))
    return found or {f"{PREFIX}beta": Range(loguniform=(objective.beta / 5, objective.beta * 5))}


def override(pipeline: Pipeline, *, file: str | None = None, settings: list[str] | None = None) -> Pipeline:
    """Return `pipeline` with a JSON config file and then `a.b=c` settings laid over it.

    Values of settings are read as JSON where they are JSON (`0.5`, `true`, `null`, `[1, 2]`), else as text.

    Raises:
        ConfigError: naming the key and the nearest valid one, or the file.
    """
    tree: dict[str, Any] = pipeline.model_dump(mode="json")
    if file is not None:
        _lay_all_over(tree, [_read_config(file)])
    changes = []
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting!r} has no '='; write --set align.steps=100")
        changes.append(_nested(key.strip().split("."), _value(text.strip())))
    _lay_all_over(tree, changes)
    return validated(tree)


def validated(tree: Mapping[str, Any]) -> Pipeline:
    """Return the `Pipeline` that `tree` describes, or raise `ConfigError` naming every key that is wrong."""
    try:
        return Pipeline.model_validate(tree)
    except ValidationError as error:
        known = list(setting_names())
        lines = [_explain(problem, known) for problem in error.errors()]
        raise ConfigError("configuration refused:\n  " + "\n  ".join(lines)) from None


def setting_names(model: type[BaseModel] = Pipeline, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting below `model`, groups included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from setting_names(kind, f"{prefix}{name}.")


def _explain(problem: Mapping[str, Any], known: list[str]) -> str:
    key = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"{key}: unknown setting; the nearest is {near[0]}"
    if problem["type"] == "objective_setting":
        return "\n  ".join(f"{key}.{line}" for line in str(problem["msg"]).splitlines())
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{key}: {problem['msg']}, got {problem['input']!r}"


def _read_config(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--config {file}: no such file")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: expected an object of settings, got {type(tree).__name__}")
    return tree


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    for step in reversed(path):
        value = {step: value}
    return dict(value)


def _lay_all_over(tree: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Lay all over `tree`, in order. Under another objective, only what was asked for of the old one stays.

    That is what both have, where it is not the old one's default: each objective brings its own.
    """
    new = [name for change in changes if (name := _objective_in(change).get("name")) in registry.names()]
    old = _objective_in(tree)
    if new and old.get("name") in registry.names() and new[-1] != old["name"]:
        both = set(registry.settings_of(new[-1], old)) & set(registry.settings_of(old["name"], old))
        asked = {key: old[key] for key in both & set(old) if old[key] != _default(old["name"], key)}
        tree["align"]["objective"] = asked
        _search_what_it_has(tree, new[-1])
    for change in changes:
        _lay_over(tree, change)


def _search_what_it_has(tree: dict[str, Any], objective: str) -> None:
    """Take out of a recipe's search what another objective does not have; with nothing left it has its own search."""
    space = (tree.get("tune") or {}).get("space")
    if space and f"{PREFIX}name" not in space:
        own = _settings_below_align(objective)
        tree["tune"]["space"] = {name: found for name, found in space.items() if name in own} or None


def _objective_in(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    align = tree.get("align")
    objective = align.get("objective") if isinstance(align, Mapping) else None
    return objective if isinstance(objective, Mapping) else {}


def _lay_over(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        # A range is one value: another in its place, not beside it.
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and not is_range(value):
            _lay_over(tree[key], value)
        else:
            tree[key] = value
