"""Objectives by name: a new one is a file beside this and a line in `OBJECTIVES`.

A line says where the loss is, which facts of a batch it is called with and which settings. Nothing is imported for it:
settings are checked, listed and searched without torch. `recray.config.Objective` is made from these lines.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, float | bool] = MappingProxyType({})


class Setting(NamedTuple):
    """A setting that an objective brings with it: `align.objective.NAME`. The type of its default is its own."""

    name: str
    default: float | bool
    description: str
    least: float = 0.0  # of a number
    most: float | None = None
    open: bool = False  # `least` itself is not allowed
    search: tuple[float, float] | None = None  # what is worth trying; None: nothing but the default


class Line(NamedTuple):
    """What there is to know of an objective without running it."""

    function: str  # module:function, below recray.objectives
    reads: tuple[str, ...]  # what it is called with: attributes of recray.objectives.family.ScoreBatch, in order
    settings: tuple[str | Setting, ...] = ("beta",)  # then these, by name
    chosen: tuple[str | Setting, ...] = ()  # settings of what stands around the function
    defaults: Mapping[str, float | bool] = NOTHING  # where they are not those of `recray.config.Objective`


FIRST = ("positive", "first", "first_usable")
OWN = ("positive", "negative", "usable")
POLICY = ("policy_positive", "policy_negative")
POOL = ("positive", "pool_score", "pool_margin", "pool_usable")
REFERENCE = ("reference",)  # with or without, by choice; who does not have it reads the policy alone
BY_TOKEN = MappingProxyType({"length_normalised": True})

# What any objective can be given. Left out of what is written down while off: results from before they existed hold.
OPTIONS: Mapping[str, float | bool] = MappingProxyType({"nll_weight": 0.0, "length_normalised": False})

BOUNDARY = Setting("boundary", False, "DynamicPO's selection: only negatives near the boundary count.")
DUAL_MARGIN = Setting("dual_margin", False, "DynamicPO's beta a negative, from two margins.")
DYNAMIC = (BOUNDARY, DUAL_MARGIN)

# What came later than results that are to stay up to date: left out of what is written down at its default.
YOUNGER = ("reuse", "guard_near")
LENDERS = ("sharing", "sharing_fraction", "sharing_threshold", "similarity", "guard")
SHARING = (*LENDERS, "detach_shared")
MARGINS = ("margin", "margin_base", "margin_slope", "subtract_log_pool")
TARGET_MARGIN = Setting(
    "target_margin", 1.0, "gamma: lead asked of the positive, in beta * nats a token.", search=(0.3, 2.0)
)
SMOOTHING = Setting(
    "smoothing",
    0.2,
    "Most that a preference is doubted; where the auxiliary model is sure, it is not.",
    most=0.5,
    search=(0.05, 0.45),
)
GAP_WEIGHT = Setting("gap_weight", 1.0, "lambda: margin of a sure pair, in beta * nats.", search=(0.0, 2.0))
PREFERENCE_WEIGHT = Setting(
    "preference_weight", 1.0, "lambda: of the preference beside the cross-entropy.", open=True, search=(0.1, 10.0)
)
POOL_SIZE = Setting("pool_size", 5, "The negative is drawn from so many of the highest scores.", least=1)

OBJECTIVES: dict[str, Line] = {
    "napo": Line("napo:napo_loss", POOL, chosen=(*REFERENCE, *MARGINS, *SHARING)),
    "sdpo": Line("sdpo:sdpo_loss", OWN, chosen=(*REFERENCE, *DYNAMIC)),
    "dpo": Line("dpo:dpo_loss", FIRST, chosen=REFERENCE),
    # On log-ratios it is sdpo to the last bit, and so no control.
    "cross_entropy": Line(
        "cross_entropy:candidate_cross_entropy", OWN, chosen=REFERENCE, defaults={"reference": False}
    ),
    "cpo": Line("cpo:cpo_loss", FIRST, ("beta", "nll_weight"), defaults={"nll_weight": 1.0}),
    "simpo": Line("simpo:simpo_loss", FIRST, ("beta", TARGET_MARGIN), defaults={"beta": 2.0, **BY_TOKEN}),
    "dmpo": Line("dmpo:dmpo_loss", OWN, chosen=(*REFERENCE, *DYNAMIC)),
    "mppo": Line("mppo:mppo_loss", OWN, chosen=DYNAMIC, defaults=BY_TOKEN),
    "rosepo": Line(
        "rosepo:rosepo_loss",
        ("positive", "first", "first_confidence", "first_usable"),
        ("beta", SMOOTHING),
        chosen=REFERENCE,
    ),
    "recpo": Line("recpo:recpo_loss", ("positive", "negative", "gap", "usable"), ("beta", GAP_WEIGHT), REFERENCE),
    "dynamicpo": Line("dynamicpo:dynamicpo_loss", ("positive", "negative", *POLICY, "usable"), chosen=REFERENCE),
    "rodpo": Line(
        "rodpo:rodpo_loss",
        ("positive", "negative", *POLICY, "draw", "usable"),
        ("beta", PREFERENCE_WEIGHT, POOL_SIZE, "nll_weight"),
        REFERENCE,
        {"nll_weight": 1.0},
    ),
    "bpr": Line("bpr:bpr_loss", OWN),
}
SUPERVISED = "sft"  # goes on with supervised fine-tuning, on streams of items instead of pairs; has no settings


def names() -> tuple[str, ...]:
    """Return all that `align.objective.name` may be."""
    return (*OBJECTIVES, SUPERVISED)


def named(setting: str | Setting) -> str:
    """Return the name of a setting."""
    return setting if isinstance(setting, str) else setting.name


def settings_of(objective: str, given: Mapping[str, Any] = NOTHING) -> tuple[str, ...]:
    """Return the names of all settings that an objective has, those of what stands around it included.

    Some hold only where others are `given`: with `reuse` of "item" every objective that compares the positive with a
    list of negatives borrows, with `guard_near` other than "none" there is a threshold.
    """
    if objective == SUPERVISED:
        return ()
    line = OBJECTIVES[objective]
    found = [*map(named, (*line.settings, *line.chosen))]
    if lengthens(objective):
        found.append("reuse")
    if given.get("reuse") == "item" and lengthens(objective):
        found += ["reuse_items", *LENDERS]
    if "sharing" in found:
        found += ["guard_near"]
        found += [] if given.get("guard_near", "none") == "none" else ["guard_threshold", "guard_own"]
    return tuple(dict.fromkeys([*found, *OPTIONS]))


def every_setting_of(objective: str) -> tuple[str, ...]:
    """Return the names of all settings that an objective has under some choice of the others."""
    return settings_of(objective, {"reuse": "item", "guard_near": "mask"})


def lengthens(objective: str) -> bool:
    """Return whether a user's own list of negatives may be longer for some users: whether it reads all, with a mask."""
    return objective in OBJECTIVES and bool({"usable", "pool_usable"} & set(OBJECTIVES[objective].reads))


def defaults_of(objective: str) -> Mapping[str, float | bool]:
    """Return the defaults of an objective that are not those of `recray.config.Objective`."""
    return OBJECTIVES[objective].defaults if objective in OBJECTIVES else NOTHING


def own_settings() -> dict[str, Setting]:
    """Return every setting that a line brings with it, by name.

    Raises:
        ValueError: if two lines mean different settings by one name.
    """
    found: dict[str, Setting] = {}
    for line in OBJECTIVES.values():
        for setting in (*line.settings, *line.chosen):
            if isinstance(setting, Setting) and found.setdefault(setting.name, setting) != setting:
                raise ValueError(f"two objectives mean different settings by {setting.name!r}")
    return found


def search_ranges(objective: str) -> dict[str, tuple[float, float]]:
    """Return the range worth searching of each setting that the objective brings with it."""
    line = OBJECTIVES[objective]
    brought = (setting for setting in (*line.settings, *line.chosen) if isinstance(setting, Setting))
    return {setting.name: setting.search for setting in brought if setting.search is not None}
