"""What the guard by nearness does as more of what is shared are false negatives, on synthetic logs with known truth.

    python -m benchmarks.bench_guard [--quick] [--out benchmarks/results]

Negatives are drawn uniformly or, at a rising share, the dose, from what those would like who borrow them. User and
item vectors are a truncated SVD of the log, a stand-in for SASRec that is fitted in a second. Three pictures: the share
of false negatives left after the guard, its precision and recall by threshold, and the margin asked over false and over
true negatives. Then a toy policy, vectors of users and items, is taught by the log and aligned by NAPO with each guard;
it is judged on the items that users like and never met.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from benchmarks.bench_scoring import table
from recray.config import Synthetic
from recray.data.synthetic import make_world, visit
from recray.objectives.margins import confidence, per_negative_margin, shrunk_margin
from recray.objectives.napo import napo_loss
from recray.objectives.sharing import near_items, own_only, similarity, top_fraction, usable_negatives

USERS, ITEMS, INTERACTIONS_EACH = 800, 600, 30
WIDTH = 24  # of the SVD's vectors
BATCH, NEGATIVES, FRACTION = 32, 15, 0.2
BASE, SLOPE = 1.0, 0.3  # the margin's defaults
THRESHOLDS = (-0.475, -0.45, -0.4, -0.3, -0.2, -0.1, 0.0)
SHOWN = (-0.45, -0.4, -0.3)
DEFAULT = -0.4
POLICY_WIDTH, TAUGHT_STEPS, ALIGNED_STEPS, TAUGHT_RATE, ALIGNED_RATE = 16, 150, 150, 2e-2, 1e-3
WAYS = ("not aligned", "own only", "no guard", "met", "met, margin", "met, margin, mask", "met, margin, shrink")


class Size(NamedTuple):
    """How much is measured."""

    doses: tuple[float, ...]
    aligned: tuple[float, ...]  # doses at which the toy is trained
    batches: int
    seeds: int


WHOLE = Size((0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0), (0.5,), 12, 3)
QUICK = Size((0.0, 1.0), (0.5,), 4, 1)


class Log(NamedTuple):
    """A log with its truth, and vectors made from it."""

    met: Tensor  # [U, items]
    liked: Tensor  # [U, items] and never met
    users: Tensor  # [U, D]
    items: Tensor  # [items, D]


class Batch(NamedTuple):
    """What a global batch offers."""

    user: Tensor  # [G]
    negatives: Tensor  # [G, N]
    lent: Tensor  # [G, G, N] by similar users, without one's own
    met: Tensor  # [G, G, N] by the borrower
    false: Tensor  # [G, G, N] liked by the borrower
    sure: Tensor  # [G, G, N] the borrower's confidence


def make_log(seed: int) -> Log:
    """Return a log of the synthetic world, its truth and a truncated SVD of it."""
    rng = np.random.default_rng(seed)
    synthetic = Synthetic()
    world = make_world(ITEMS, synthetic, rng)
    visits = visit(world, np.clip(rng.poisson(INTERACTIONS_EACH, USERS), 6, None).astype(np.int64), synthetic, rng)
    met = np.zeros((USERS, ITEMS), dtype=bool)
    met[visits.user, visits.item] = True
    left, values, right = np.linalg.svd(met.astype(np.float32), full_matrices=False)
    users, items = left[:, :WIDTH] * values[:WIDTH], right[:WIDTH].T.copy()
    return Log(*map(torch.from_numpy, (met, visits.liked_unmet, users, items)))


def draw_negatives(log: Log, user: ndarray, lends: ndarray, dose: float, rng: np.random.Generator) -> ndarray:
    """Return negatives that their owners never met: at this share by how many borrowers would like them, else any."""
    unmet = ~log.met.numpy()[user]
    wanted = lends.T.astype(float) @ log.liked.numpy()[user]
    gumbel = rng.gumbel(size=unmet.shape)
    with np.errstate(divide="ignore"):
        tempting, uniform = np.log(wanted) + gumbel, rng.random(unmet.shape)
    ranked = [np.where(unmet, each, -np.inf).argsort(axis=1)[:, ::-1][:, :NEGATIVES] for each in (tempting, uniform)]
    enough = np.arange(NEGATIVES) < (unmet & (wanted > 0)).sum(axis=1)[:, None]
    return np.where((rng.random(enough.shape) < dose) & enough, *ranked)


def batches(log: Log, dose: float, count: int, seed: int) -> Iterator[Batch]:
    """Yield seeded global batches of different users."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        user = rng.choice(USERS, BATCH, replace=False)
        place, who = torch.arange(BATCH), torch.from_numpy(user)
        vectors = log.users[who]
        lends = top_fraction(similarity(vectors, vectors, cosine=True), place, who, fraction=FRACTION)
        lends = lends & ~own_only(place, BATCH)
        negatives = torch.from_numpy(draw_negatives(log, user, lends.numpy(), dose, rng))
        flat = negatives.flatten()
        shape = (BATCH, BATCH, NEGATIVES)
        yield Batch(
            who,
            negatives,
            lends[:, :, None].expand(shape),
            log.met[who][:, flat].view(shape),
            log.liked[who][:, flat].view(shape),
            confidence(vectors, log.items[flat], log.items).view(shape),
        )


def audited(log: Log, dose: float, count: int, seed: int) -> dict[str, Any]:
    """Return how many false negatives are lent, what the guard leaves at each threshold, and the margins asked."""
    every = list(batches(log, dose, count, seed))
    lent = torch.cat([(each.lent & ~each.met).flatten() for each in every])
    false, sure = (torch.cat([getattr(each, name).flatten() for each in every])[lent] for name in ("false", "sure"))
    met = sum(int((each.lent & each.met).sum()) for each in every) / sum(int(each.lent.sum()) for each in every)
    margin = per_negative_margin(sure.view(1, 1, -1), base=BASE, slope=SLOPE).flatten()
    shrunk = shrunk_margin(margin, sure, threshold=DEFAULT)
    by_threshold = []
    for threshold in THRESHOLDS:
        near = near_items(sure, threshold=threshold)
        right = near & false
        by_threshold.append(
            {
                "threshold": threshold,
                "guarded": _share(near),
                "precision": int(right.sum()) / max(1, int(near.sum())),
                "recall": int(right.sum()) / max(1, int(false.sum())),
                "left": _share(false[~near]),
            }
        )
    return {
        "dose": dose,
        "seed": seed,
        "met": met,
        "false": _share(false),
        "margin_false": float(margin[false].mean()),
        "margin_true": float(margin[~false].mean()),
        "shrunk_false": float(shrunk[false].mean()),
        "shrunk_true": float(shrunk[~false].mean()),
        "by_threshold": by_threshold,
    }


def _share(kinds: Tensor) -> float:
    return float(kinds.double().mean()) if kinds.numel() else 0.0


def taught(log: Log, seed: int) -> list[Tensor]:
    """Return a policy fitted to the log by its softmax over all items: user vectors, item vectors, item weights."""
    rng = torch.Generator().manual_seed(seed)
    policy = [0.1 * torch.randn(count, POLICY_WIDTH, generator=rng) for count in (USERS, ITEMS)]
    policy.append(torch.zeros(ITEMS))
    for each in policy:
        each.requires_grad_()
    optimiser = torch.optim.Adam(policy, lr=TAUGHT_RATE, weight_decay=1e-4)
    for _ in range(TAUGHT_STEPS):
        who = torch.randint(USERS, (128,), generator=rng)
        optimiser.zero_grad()
        target = log.met[who].float()
        (-(scores(policy, who) * target).sum() / target.sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return [each.detach() for each in policy]


def scores(policy: list[Tensor], who: Tensor) -> Tensor:
    """Return [G, items] log-probabilities."""
    return (policy[0][who] @ policy[1].T + policy[2]).log_softmax(dim=1)


def usable_and_margin(batch: Batch, way: str) -> tuple[Tensor, Tensor]:
    """Return what a way to guard lets each user borrow, and at what margin."""
    place, near = torch.arange(BATCH), near_items(batch.sure, threshold=DEFAULT)
    lends = own_only(place, BATCH) if way == "own only" else batch.lent.any(dim=2) | own_only(place, BATCH)
    forbidden = None if "met" not in way else batch.met | near if "mask" in way else batch.met
    usable = usable_negatives(lends, forbidden, place, NEGATIVES)
    if "margin" not in way:
        return usable, torch.zeros_like(batch.sure)
    margin = per_negative_margin(batch.sure, base=BASE, slope=SLOPE)
    if "shrink" in way:
        borrowed = ~own_only(place, BATCH)[:, :, None]
        margin = torch.where(borrowed, shrunk_margin(margin, batch.sure, threshold=DEFAULT), margin)
    return usable, margin


def aligned(log: Log, start: list[Tensor], dose: float, way: str, seed: int) -> float:
    """Return NDCG@10 of the policy, aligned this way, on what users like and never met."""
    policy = [each.clone().requires_grad_() for each in start]
    optimiser = torch.optim.Adam(policy, lr=ALIGNED_RATE)
    rng = torch.Generator().manual_seed(seed)
    steps = 0 if way == "not aligned" else ALIGNED_STEPS
    for batch in batches(log, dose, steps, seed + 1):
        usable, margin = usable_and_margin(batch, way)
        ratio = scores(policy, batch.user) - scores(start, batch.user)
        positive = torch.multinomial(log.met[batch.user].float(), 1, generator=rng)
        optimiser.zero_grad()
        loss = napo_loss(
            ratio.gather(1, positive)[:, 0], ratio.gather(1, batch.negatives), margin, usable, beta=1.0
        ).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return ndcg(scores([each.detach() for each in policy], torch.arange(USERS)), log)


def ndcg(score: Tensor, log: Log) -> float:
    """Return the mean NDCG@10 over users who like something they never met, among all they never met."""
    some = log.liked.any(dim=1)
    top = score.masked_fill(log.met, -torch.inf)[some].topk(10, dim=1).indices
    discount = 1 / torch.log2(torch.arange(10) + 2.0)
    gain = log.liked[some].gather(1, top).float() @ discount
    best = torch.stack([discount[:count].sum() for count in log.liked[some].sum(dim=1).clamp_max(10).tolist()])
    return float((gain / best).mean())


def measured(size: Size) -> dict[str, Any]:
    """Return what was audited, a row a dose and seed, and what was aligned, a row a dose and way."""
    logs = [make_log(seed) for seed in range(size.seeds)]
    audits = [audited(log, dose, size.batches, seed) for dose in size.doses for seed, log in enumerate(logs)]
    starts = [taught(log, seed) for seed, log in enumerate(logs)]
    each = [(log, start, seed) for seed, (log, start) in enumerate(zip(logs, starts, strict=True))]
    rows = []
    for dose in size.aligned:
        found = {way: [aligned(log, start, dose, way, seed) for log, start, seed in each] for way in WAYS}
        for way, values in found.items():
            gains = np.subtract(values, found["met, margin"])
            ends = [round(float(end), 4) for end in (gains.min(), gains.max())]
            mean, gain = (round(float(np.mean(numbers)), 4) for numbers in (values, gains))
            rows.append({"dose": dose, "way": way, "ndcg": mean, "over_margin": gain, "range": ends})
    return {"audits": audits, "aligned": rows}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two doses, one seed; to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the picture, the table and the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    size = QUICK if options.quick else WHOLE
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, one thread",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **size._asdict(),
        **measured(size),
    }
    report["cpu_s"] = round(time.process_time() - started, 1)
    print(table(summary(report)))
    print(table(report["aligned"]))
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a dose: means over seeds, what is left at the thresholds that are drawn."""
    rows = []
    for dose in report["doses"]:
        audits = [each for each in report["audits"] if each["dose"] == dose]

        def mean(name: str, audits: list[dict[str, Any]] = audits) -> float:
            return round(float(np.mean([each[name] for each in audits])), 3)

        row: dict[str, Any] = {"dose": dose, "met": mean("met"), "false": mean("false")}
        for threshold in SHOWN:
            at = [part for each in audits for part in each["by_threshold"] if part["threshold"] == threshold]
            for name in ("guarded", "precision", "recall", "left"):
                row[f"{name} {threshold:g}"] = round(float(np.mean([part[name] for part in at])), 3)
        names = ("margin_false", "margin_true", "shrunk_false", "shrunk_true")
        rows.append(row | {name: mean(name) for name in names})
    return rows


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures, a table of them in Markdown, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"guard_cpu{os.cpu_count()}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, stem.with_suffix(".png"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# The guard by nearness against the rate of false negatives",
        "",
        f"Made by `python -m benchmarks.bench_guard --out benchmarks/results`, {report['cpu_s']} s of CPU time; "
        f"{report['hardware']}; {versions}; {report['date']}.",
        "",
        f"Synthetic logs of {USERS} users, {ITEMS} items, about {INTERACTIONS_EACH} interactions a user; means over "
        f"{report['seeds']} seeds. {report['batches']} batches of {BATCH} users with {NEGATIVES} negatives; the "
        f"{FRACTION:.0%} most similar users lend. `dose`: share of negatives drawn from what borrowers like. Of what "
        "is lent, `met` by the borrower (always guarded); of the rest, `false`: the borrower would like it. At a "
        "threshold of confidence: share `guarded`, `precision`, `recall`, and false negatives `left`. Margins: base "
        f"{BASE}, slope {SLOPE}; shrunk below {DEFAULT}.",
        "",
        *_markdown(summary(report)),
        "",
        f"![three pictures]({stem.with_suffix('.png').name})",
        "",
        f"A toy policy (vectors of width {POLICY_WIDTH}), taught by the log, then aligned in {ALIGNED_STEPS} steps of "
        "NAPO: NDCG@10 on the items that users like and never met, among all they never met. `over_margin`: against "
        "the guard of what was met with a margin, on the same seed; the range is over the seeds.",
        "",
        *_markdown(report["aligned"]),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return head + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw what is left, how often the guard is right, and what margins are asked."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = summary(report)
    rate = [row["false"] for row in rows]
    figure, (left, right, asked) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(rate, rate, "k:", label="no guard by nearness")
    for threshold in SHOWN:
        left.plot(rate, [row[f"left {threshold:g}"] for row in rows], "o-", label=f"confidence below {threshold:g}")
        (line,) = right.plot(
            rate, [row[f"precision {threshold:g}"] for row in rows], "o-", label=f"below {threshold:g}"
        )
        right.plot(rate, [row[f"recall {threshold:g}"] for row in rows], "s--", color=line.get_color())
    right.plot(rate, rate, "k:", label="precision of a guess")
    for name, style in (("margin", "o-"), ("shrunk", "s--")):
        for kind, colour in (("false", "tab:red"), ("true", "tab:blue")):
            asked.plot(
                rate, [row[f"{name}_{kind}"] for row in rows], style, color=colour, label=f"{name}, {kind} negatives"
            )
    for axes, title in (
        (left, "false negatives left of what is shared"),
        (right, "precision (full) and recall (dashed)"),
        (asked, "mean margin asked, in beta * nats"),
    ):
        axes.set(xlabel="false negatives among what is shared", title=title, ylim=(0, None))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
