"""The index of every setting, made from the models of `recray.config`: `recray settings`, docs/settings.md.

A setting tells its default, type, bounds and unit by its annotation, and its meaning by its description.
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from recray.config import Chosen, Objective, Pipeline
from recray.objectives import registry

# What JSON Schema calls the bounds of a number.
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
# Choices under which objectives have further settings: those of `registry.settings_of`.
CHOICES: dict[str, dict[str, str]] = {
    "": {},
    "with `reuse=item` ": {"reuse": "item"},
    "with `guard_near=mask` or `shrink` ": {"guard_near": "mask"},
    "with both ": {"reuse": "item", "guard_near": "mask"},
}
PREAMBLE = """# Every setting

Made by `make settings` from the models of `recray/config.py`; do not edit it by hand. A setting is given by its dotted
name, `--set align.steps=100`, or in a JSON file for `--config`. Recipes have defaults of their own:
`recray config --recipe NAME` prints all settings as they then are. Names, types and bounds are checked before anything
starts. `null` is None.
"""


class Setting(NamedTuple):
    """One setting."""

    key: str  # dotted
    default: str
    kind: str  # type and bounds
    unit: str  # empty where it is a plain number, a name or a switch
    meaning: str
    holds: str  # under which choices; empty: always


class Section(NamedTuple):
    """The settings of one part of the pipeline."""

    name: str  # empty: of the whole run
    meaning: str
    settings: list[Setting]


def sections() -> list[Section]:
    """Return every setting, by part of the pipeline; first those of the whole run."""
    own, parts = [], []
    for name, field in Pipeline.model_fields.items():
        model = _model_of(field)
        if model is None:
            own.append(_setting(Pipeline, name, name, field.default))
        else:
            parts.append(Section(name, _first_line(model), list(_settings(model, name, field.default))))
    return [Section("", "Of the whole run.", own), *parts]


def markdown(reads: Mapping[str, Sequence[str]], lays_over: Mapping[str, Sequence[str]]) -> str:
    """Return docs/settings.md.

    Args:
        reads: The stages whose output each stage reads, by name, in the order of a run.
        lays_over: The parts of the settings, beside its own, that decide the output of a stage.
    """
    text = [PREAMBLE]
    for section in sections():
        acts = [name for name in reads if name == section.name or section.name in lays_over[name]]
        title = f"`{section.name}`" if section.name else "The run"
        text.append(f"## {title}\n\n{section.meaning} {_where(acts, reads)}".rstrip() + "\n")
        text.append("| setting | default | type | unit | meaning |\n|---|---|---|---|---|")
        for each in section.settings:
            meaning = f"{each.meaning} {each.holds}".strip()
            cells = (f"`{each.key}`", each.default, each.kind, each.unit or "–", meaning)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)


def _where(acts: Sequence[str], reads: Mapping[str, Sequence[str]]) -> str:
    """Return where a part acts, and what a change of it makes run again."""
    if not acts:
        return "Acts in every stage that runs."
    again = set(acts)
    for name, sources in reads.items():  # in the order of a run
        if again & set(sources):
            again.add(name)
    later = [name for name in reads if name in again and name not in acts]
    told = f"Acts in {', '.join(f'`{name}`' for name in acts)}"
    return f"{told}; a change also runs again {', '.join(f'`{name}`' for name in later)}." if later else f"{told}."


def _settings(model: type[BaseModel], prefix: str, group: Any) -> Iterator[Setting]:
    """Yield the settings below `prefix`, whose values are those of `group` where there is one."""
    for name, field in model.model_fields.items():
        key, value = f"{prefix}.{name}", getattr(group, name, field.default)
        below = _model_of(field)
        if below is None:
            yield _setting(model, name, key, value)
            continue
        if value is None:
            yield Setting(key, "`null`", "group or null", "", _meaning(field, below), "")
        yield from _settings(below, key, value)


def _setting(model: type[BaseModel], name: str, key: str, value: Any) -> Setting:
    field = model.model_fields[name]
    schema = model.model_json_schema()
    own = schema["properties"][name]
    default = "–" if value is PydanticUndefined else _text(value)
    holds = ""
    if issubclass(model, Objective):
        holds, default = _of_objectives(name), default + _other_defaults(name)
    elif issubclass(model, Chosen):
        holds = _of_choices(model, name)
    return Setting(key, default, _kind(own, schema), _unit(own), _meaning(field, None), holds)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the group that a field is or may be."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _meaning(field: FieldInfo, group: type[BaseModel] | None) -> str:
    return " ".join((field.description or ("" if group is None else _first_line(group))).split())


def _first_line(model: type[BaseModel]) -> str:
    return (inspect.getdoc(model) or "").partition("\n")[0]


def _text(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value, default=str)}`"


def _kind(own: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Return type and bounds in words, from JSON Schema."""
    if "$ref" in own:
        return _kind(whole["$defs"][own["$ref"].rpartition("/")[2]], whole)
    for several in ("anyOf", "oneOf"):
        if several in own:
            return " or ".join(_kind(each, whole) for each in own[several])
    if "enum" in own:
        return ", ".join(f"`{each}`" for each in own["enum"])
    if "const" in own:
        return f"`{own['const']}`"
    kind = str(own.get("type", "any"))
    if kind == "array":
        return _list(own, whole)
    bounds = " and ".join(f"{sign} {own[name]:g}" for name, sign in BOUNDS.items() if name in own)
    words = {"boolean": "`true`, `false`", "string": "text"}
    return f"{words.get(kind, kind)} {bounds}".strip()


def _list(own: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if "prefixItems" in own:
        return f"list: {', '.join(_kind(each, whole) for each in own['prefixItems'])}"
    least = f", at least {own['minItems']}" if "minItems" in own else ""
    return f"list of {_kind(own.get('items', {}), whole)}{least}"


def _unit(own: Mapping[str, Any]) -> str:
    """Return the first unit that a setting's schema, or a part of it, is marked with."""
    if "unit" in own:
        return str(own["unit"])
    inner = [*own.get("anyOf", []), *own.get("prefixItems", [])]
    if isinstance(own.get("items"), Mapping):
        inner.append(own["items"])
    return next((found for each in inner if (found := _unit(each))), "")


def _of_choices(model: type[Chosen], name: str) -> str:
    """Return the choices under which a setting is not idle: every combination of what may be chosen is asked."""
    choices = {each: get_args(field.annotation) for each, field in model.model_fields.items() if _is_choice(field)}
    asked = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    live = [each for each in asked if name not in model.model_construct(**each).idle]
    if len(live) == len(asked):
        return ""
    told = []
    for choice, values in choices.items():
        under = [value for value in values if any(each[choice] == value for each in live)]
        if len(under) < len(values):
            told.append(f"{choice} {', '.join(map(str, under))}")
    # Nothing is told of what depends on two choices at once: its meaning says it.
    return f"Holds for {'; '.join(told)}." if told else ""


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal and NoneType not in map(type, get_args(field.annotation))


def _of_objectives(name: str) -> str:
    """Return the objectives that have a setting, at once or under a choice of other settings."""
    if name == "name":
        return ""
    told, known = [], set()
    for choice, given in CHOICES.items():
        having = [each for each in registry.names() if name in registry.settings_of(each, given) and each not in known]
        known |= set(having)
        if having:
            all_but = len(having) == len(registry.names()) - 1 and registry.SUPERVISED not in having
            told.append(f"{choice}for {f'all but {registry.SUPERVISED}' if all_but else ', '.join(having)}")
    return f"Holds {'; '.join(told)}."


def _other_defaults(name: str) -> str:
    """Return the defaults of a setting that objectives have of their own."""
    other: dict[str, list[str]] = {}
    for objective in registry.names():
        own = registry.defaults_of(objective)
        if name in own:
            other.setdefault(_text(own[name]), []).append(objective)
    return "".join(f"; {', '.join(objectives)} {value}" for value, objectives in other.items())
