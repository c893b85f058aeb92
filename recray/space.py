"""What a search may try: a range for each setting, and the values that lie in it. Stands under the configuration."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

KINDS = ("choice", "uniform", "loguniform", "int")
Whole = int  # a kind of range has its name
Scalar = bool | Whole | float | str
PREFIX = "objective."


class Range(BaseModel):
    """Where the values of one setting lie: exactly one of four kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choice: tuple[Scalar, ...] | None = Field(None, description="One of these.")
    uniform: tuple[float, float] | None = Field(None, description="Any number from the first to the second.")
    loguniform: tuple[float, float] | None = Field(None, description="The same, by its logarithm.")
    int: tuple[Whole, Whole] | None = Field(None, description="A whole number, both ends included.")

    @model_validator(mode="before")
    @classmethod
    def _of_a_known_kind(cls, given: Any) -> Any:
        for key in given if isinstance(given, Mapping) else ():
            if key not in KINDS:
                near = difflib.get_close_matches(str(key), KINDS, n=1, cutoff=0.0)[0]
                raise ValueError(f"{key}: no kind of range; the nearest is {near} (there are: {', '.join(KINDS)})")
        return given

    @model_validator(mode="after")
    def _is_one_range(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}, got {' and '.join(given) or 'none of them'}")
        values = getattr(self, given[0])
        if given == ["choice"]:
            if not values or len(set(map(repr, values))) < len(values):
                raise ValueError(f"choice needs values that differ, got {list(values)}")
            return self
        if not (math.isfinite(values[0]) and math.isfinite(values[1]) and values[0] < values[1]):
            raise ValueError(f"{given[0]} needs a first number below the second, got {list(values)}")
        if given == ["loguniform"] and values[0] <= 0:
            raise ValueError(f"loguniform needs numbers above 0, got {list(values)}")
        return self

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {kind: value for kind, value in dump(self).items() if value is not None}

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """All choices, or the least and the greatest value."""
        values: tuple[Scalar, ...] = getattr(self, self.kind)
        return values

    def at(self, share: float) -> Scalar:
        """Return the value at a share of the way through the range, 0 <= share < 1: uniform shares, uniform values."""
        if self.choice is not None:
            return self.choice[math.floor(share * len(self.choice))]
        if self.uniform is not None:
            return self.uniform[0] + share * (self.uniform[1] - self.uniform[0])
        if self.loguniform is not None:
            low, high = map(math.log, self.loguniform)
            return min(max(math.exp(low + share * (high - low)), self.loguniform[0]), self.loguniform[1])
        assert self.int is not None
        return self.int[0] + math.floor(share * (self.int[1] - self.int[0] + 1))


Space = Mapping[str, Range]  # by the name of a setting, dotted, below `align`
Point = Mapping[str, Scalar]  # a value of each


def is_range(value: Any) -> bool:
    """Return whether this is a range as it is written down, rather than a group of settings."""
    return isinstance(value, Mapping) and bool(value) and all(key in KINDS for key in value)


def named_ranges(given: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Return ranges by the whole names of their settings; one that is None is left out, the last of two counts.

    Args:
        given: As written down: names dotted or in groups, whole or short.
        settings: The whole name of each short one.
    """
    found: dict[str, Any] = {}
    for name, value in _flat(given, ""):
        found[settings.get(name, name)] = value
    return {name: value for name, value in found.items() if value is not None}


def _flat(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        if isinstance(value, Mapping) and value and not is_range(value) and not _looks_like_one(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _looks_like_one(value: Mapping[str, Any]) -> bool:
    """Return whether a mapping leads to no range: it is one with a fault, for others to name."""
    return not any(each is None or isinstance(each, Mapping | BaseModel) for each in value.values())
