"""Deliberate faults in the maths, done one by one to a copy of the tree; the fast tests that cover it have to see each.

python tests/mutants.py [NAME ...]

Ends with `N of N mutants killed`, and with 1 if one was not. A name, or part of one, runs those faults only.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("recray", "pipelines", "tests", "pyproject.toml")
AT_ONCE = 2
HEAVY = ("torch", "numpy", "pyarrow", "pydantic")
OBJECTIVES = (
    "tests/objectives/test_values.py",
    "tests/objectives/test_dynamicpo.py",
    "tests/objectives/test_napo.py",
    "tests/objectives/test_family.py",
)
MARGINS = ("tests/objectives/test_margins.py", "tests/objectives/test_sharing.py")
STEP = ("tests/train/test_step.py", "-k", "autograd or global_batch or borrowers_in_the or sums_over")
REUSE = ("tests/train/test_reuse.py", "-k", "by_itself or neither or padding")
CHUNKS = ("tests/train/test_step.py", "-k", "borrowers_taken_in_chunks")
OWN_LISTS = ("tests/users/test_own_lists.py",)
FAILED = 1  # pytest's status where tests ran and some failed; others mean that they did not run


class Fault(NamedTuple):
    """One place in one file, as it is and as it must not be."""

    name: str
    file: str  # below recray/
    right: str
    wrong: str
    tests: tuple[str, ...] = OBJECTIVES  # arguments of pytest; what is quick to fail comes first

    def source(self, root: Path) -> str:
        """Return the file with the fault in it.

        Raises:
            ValueError: if what is to be changed is not there exactly once.
        """
        text = (root / "recray" / self.file).read_text(encoding="utf-8")
        if text.count(self.right) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.right!r} {text.count(self.right)} times, not once")
        return text.replace(self.right, self.wrong)


def sign(name: str, right: str, wrong: str) -> Fault:
    """Return the fault of a flipped sign in the file of that objective."""
    return Fault(f"flipped sign: {name}", f"objectives/{name}.py", right, wrong)


MEAN = "usable_mean(each, usable)"
FAULTS = (
    sign("dpo", "beta) * lead(", "beta) * -lead("),
    sign("cpo", "beta) * lead(", "beta) * -lead("),
    sign("simpo", "beta) * lead(", "beta) * -lead("),
    sign("dmpo", "beta) * lead(", "beta) * -lead("),
    sign("mppo", "beta) * lead(", "beta) * -lead("),
    sign("bpr", "beta) * lead(", "beta) * -lead("),
    sign("rodpo", "beta) * lead(", "beta) * -lead("),
    sign("rosepo", "beta) * lead(", "beta) * -lead("),
    sign("sdpo", "= -checked_beta", "= checked_beta"),
    sign("recpo", "- checked_beta", "+ checked_beta"),
    sign("napo", "(negative - positive)", "(positive - negative)"),
    sign("cross_entropy", "= checked_beta", "= -checked_beta"),
    sign("dynamicpo", "(ahead - above_easy - OFFSET)", "(above_easy - ahead - OFFSET)"),
    Fault("flipped sign: anchor", "objectives/terms.py", "-wide(policy_positive)", "wide(policy_positive)"),
    Fault(
        "flipped sign: rank watched",
        "objectives/watching.py",
        "descending=True",
        "descending=False",
        ("tests/objectives/test_watching.py",),
    ),
    Fault("wrong margin sign: napo", "objectives/napo.py", "+ margin\n", "- margin\n"),
    Fault("wrong margin sign: simpo", "objectives/simpo.py", "usable) - target_margin", "usable) + target_margin"),
    Fault("wrong margin sign: recpo", "objectives/recpo.py", "= gap_weight * gap", "= -gap_weight * gap"),
    Fault(
        "wrong margin sign: confidence",
        "objectives/margins.py",
        "return (base * (1 + slope *",
        "return (base * (1 - slope *",
        MARGINS,
    ),
    Fault(
        "wrong margin sign: batch",
        "objectives/margins.py",
        "base * (1 - slope * (mean",
        "base * (1 + slope * (mean",
        MARGINS,
    ),
    Fault("wrong margin sign: percentile", "objectives/margins.py", "return 0.5 - (", "return -0.5 + (", MARGINS),
    Fault("beta on the margin: napo", "objectives/napo.py", "positive) + margin", "positive + margin)"),
    Fault(
        "beta on the margin: simpo",
        "objectives/simpo.py",
        "checked_beta(beta) * lead(positive_score, negative_score, usable) - target_margin",
        "checked_beta(beta) * (lead(positive_score, negative_score, usable) - target_margin)",
    ),
    Fault("beta on the margin: recpo", "objectives/recpo.py", "= gap_weight * gap", "= beta * gap_weight * gap"),
    Fault("inverted mask: napo", "objectives/napo.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault("inverted mask: sdpo", "objectives/sdpo.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault("inverted mask: recpo", "objectives/recpo.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault("inverted mask: cross-entropy", "objectives/cross_entropy.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault("inverted mask: mean", "objectives/terms.py", "where(usable, value, 0.0)", "where(usable, 0.0, value)"),
    Fault(
        "inverted mask: lead", "objectives/terms.py", "where(usable, difference, 0.0)", "where(usable, 0.0, difference)"
    ),
    Fault("inverted mask: clusters", "objectives/dynamicpo.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault("inverted mask: guard", "objectives/sharing.py", "(own | ~forbidden)", "(own | forbidden)", MARGINS),
    Fault("inverted mask: pool", "objectives/rodpo.py", "masked_fill(~usable", "masked_fill(usable"),
    Fault(
        "no mask before exp: mppo",
        "objectives/mppo.py",
        "where(usable, wide(negative_score), 0.0)",
        "clone(wide(negative_score))",
    ),
    Fault("mean for sum: mppo", "objectives/mppo.py", "usable)).sum(dim=1)", "usable)).mean(dim=1)"),
    Fault("mean for sum: step", "train/step.py", "loss.sum() / len(every)", "loss.mean()", CHUNKS),
    Fault("sum for mean: dmpo", "objectives/dmpo.py", MEAN, "each.sum(dim=1)"),
    Fault("sum for mean: bpr", "objectives/bpr.py", MEAN, "each.sum(dim=1)"),
    Fault(
        "mean over all for mean over usable", "objectives/terms.py", "usable.sum(dim=1).clamp_min(1)", "usable.shape[1]"
    ),
    Fault(
        "mean inside for mean outside: bpr",
        "objectives/bpr.py",
        "return usable_mean(each, usable)",
        "return -logsigmoid(usable_mean(-(each.exp() - 1).log(), usable))",
    ),
    Fault(
        "detached negatives: lead", "objectives/terms.py", "- wide(negative_score)", "- wide(negative_score).detach()"
    ),
    Fault(
        "detached negatives: napo",
        "objectives/napo.py",
        "negative_score.to(dtype)",
        "negative_score.detach().to(dtype)",
    ),
    Fault(
        "detached negatives: pool",
        "train/step.py",
        "if settings.detach_shared else",
        "if not settings.detach_shared else",
        STEP,
    ),
    Fault("attached beta", "objectives/dynamicpo.py", "@torch.no_grad()\ndef dual_margin_beta", "def dual_margin_beta"),
    Fault("missing positive term: sdpo", "objectives/sdpo.py", "(1, 0), value=0.0", "(1, 0), value=-torch.inf"),
    Fault("missing positive term: napo", "objectives/napo.py", "(1, 0), value=0.0", "(1, 0), value=-torch.inf"),
    Fault("missing positive term: recpo", "objectives/recpo.py", "(1, 0), value=0.0", "(1, 0), value=-torch.inf"),
    Fault("missing positive term: cpo", "objectives/cpo.py", " + nll_weight * nll_anchor(positive_score, usable)", ""),
    Fault(
        "missing positive term: rodpo", "objectives/rodpo.py", " + nll_weight * nll_anchor(policy_positive, some)", ""
    ),
    Fault(
        "missing positive term: anchor", "objectives/family.py", "loss = loss + settings", "loss = loss + 0 * settings"
    ),
    Fault(
        "local for global row: positive",
        "objectives/family.py",
        "self.score[self.place, 0]",
        "self.score[: len(self.place), 0]",
    ),
    Fault(
        "local for global row: negatives",
        "objectives/family.py",
        "self.score[self.place, 1:]",
        "self.score[: len(self.place), 1:]",
    ),
    Fault(
        "local for global row: policy",
        "objectives/family.py",
        "self.policy[self.place, 0]",
        "self.policy[: len(self.place), 0]",
    ),
    Fault(
        "local for global row: scores",
        "train/step.py",
        "own[cell] = each.detach()",
        "own[: cell.numel()] = each.detach()",
        STEP,
    ),
    Fault(
        "local for global row: gradient",
        "train/step.py",
        "grad.flatten()[cell]",
        "grad.flatten()[: cell.numel()]",
        STEP,
    ),
    Fault(
        "owner's for borrower's confidence",
        "train/feeding.py",
        "self._sure(examples, mine[rows], flat).reshape(shape)",
        "self._sure(examples, np.arange(len(items)), flat).reshape(-1, *shape[1:]).diagonal(0, 0, 1).T",
        STEP,
    ),
    Fault(
        "owner's for borrower's margin",
        "train/step.py",
        "per_negative_margin(confidence, base",
        "per_negative_margin(confidence.transpose(0, 1), base",
        STEP,
    ),
    Fault(
        "another's for one's own prompt: reused items",
        "train/step.py",
        "score[place, 1:][:, None]",
        "score[place - 1, 1:][:, None]",
        REUSE,
    ),
    Fault(
        "another's items: reused items",
        "train/feeding.py",
        "zip(items, borrowed, strict=True)",
        "zip(items, borrowed[1:] + borrowed[:1], strict=True)",
        REUSE,
    ),
    Fault(
        "inverted mask: padding of reused items",
        "train/feeding.py",
        "usable[row, 0, : negatives.size] = True",
        "usable[row, 0, negatives.size :] = True",
        REUSE,
    ),
    Fault(
        "inverted mask: guard of reused items",
        "train/feeding.py",
        "lent.offered & ~lent.met if",
        "lent.offered & lent.met if",
        REUSE,
    ),
    Fault(
        "above for below: guard by nearness",
        "objectives/sharing.py",
        "return confidence < threshold",
        "return confidence > threshold",
        MARGINS,
    ),
    Fault(
        "inverted shrinking: guard by nearness",
        "objectives/margins.py",
        "return margin * ((",
        "return margin * (1 - (",
        MARGINS,
    ),
    Fault(
        "own for borrowed: guard by nearness",
        "train/step.py",
        "return ~own_only(place, usable",
        "return own_only(place, usable",
        ("tests/train/test_step.py", "-k", "guard_shrinks"),
    ),
    Fault(
        "strictly above: boundary",
        "objectives/dynamicpo.py",
        "(negative >= positive[:, None])",
        "(negative > positive[:, None])",
    ),
    Fault("ties parted: clusters", "objectives/dynamicpo.py", "(score >= lowest[", "(score > lowest["),
    Fault(
        "nobody easy: beta",
        "objectives/dynamicpo.py",
        "easy = torch.where(easy.any(dim=1, keepdim=True), easy, boundary)\n",
        "\n",
    ),
    Fault("upper for lower cluster", "objectives/dynamicpo.py", "(gain > best)", "(gain < best)"),
    Fault("doubt the wrong way round: rosepo", "objectives/rosepo.py", "(0.5 - confidence", "(0.5 + confidence"),
    Fault(
        "score for policy: rodpo",
        "objectives/rodpo.py",
        "drawn_from_top(policy_negative,",
        "drawn_from_top(negative_score,",
    ),
    Fault("times for over tokens", "train/step.py", "else every / lengths", "else every * lengths", STEP),
    Fault(
        "reference left in",
        "train/step.py",
        "if not self._settings.uses_reference:",
        "if self._settings.uses_reference:",
        STEP,
    ),
    Fault("inverted mask: window", "users/own_lists.py", "return negatives, ~(", "return negatives, (", OWN_LISTS),
    Fault("inverted mask: listed", "users/losses.py", "masked_fill(~usable", "masked_fill(usable", OWN_LISTS),
    Fault("barred first", "users/own_lists.py", "+ chunk], -torch.inf)", "+ chunk], torch.inf)", OWN_LISTS),
    Fault(
        "detached negatives: listed", "users/losses.py", "items[negatives])", "items[negatives].detach())", OWN_LISTS
    ),
)


class Outcome(NamedTuple):
    """How tests ended: pytest's status, and what it said."""

    status: int
    said: str


def killed(fault: Fault) -> bool:
    """Return whether the fault's tests fail on a copy of the tree that has it.

    Raises:
        RuntimeError: if they did not come to run.
    """
    with TemporaryDirectory(prefix="recray-mutant-") as folder:
        root = copied(Path(folder) / "tree")
        (root / "recray" / fault.file).write_text(fault.source(root), encoding="utf-8")
        found = tested(root, fault.tests)
    if found.status not in (0, FAILED):
        raise RuntimeError(f"{fault.name}: the tests did not run\n{found.said}")
    return found.status == FAILED


def without_fault(tests: tuple[str, ...]) -> Outcome:
    """Return how these tests end on the tree as it is."""
    with TemporaryDirectory(prefix="recray-mutant-") as folder:
        return tested(copied(Path(folder) / "tree"), tests)


def copied(root: Path) -> Path:
    """Return `root`, now a copy of what tests need."""
    root.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    return root


def tested(root: Path, tests: tuple[str, ...]) -> Outcome:
    """Run these tests on the tree at `root`; only once in a process, whose modules are that tree's from then on."""
    os.chdir(root)
    sys.path.insert(0, str(root))  # before any that is installed
    sys.dont_write_bytecode = True
    said = root.parent / "said.txt"
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={root.parent / 'temp'}", *tests]
    status = int(pytest.main(arguments))
    sys.stdout.flush()
    if not all(str(root) in str(module.__file__) for name, module in sys.modules.items() if name == "recray"):
        raise RuntimeError(f"another recray than the one at {root} was tested")
    return Outcome(status, said.read_text(encoding="utf-8", errors="replace"))


def main(names: list[str]) -> int:
    """Do the faults of these names, or all; print a line each and the count; return the status to exit with.

    Each in a process of its own that is forked from this one, which has what takes long to import.
    """
    for library in HEAVY:
        importlib.import_module(library)
    chosen = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    started, count = time.monotonic(), 0
    with multiprocessing.get_context("fork").Pool(AT_ONCE, maxtasksperchild=1) as pool:
        for sound in pool.imap(without_fault, {fault.tests: None for fault in chosen}):
            if sound.status:
                print(sound.said, "they fail without any fault: nothing can be told", sep="\n")
                return 2
        for fault, dead in zip(chosen, pool.imap(killed, chosen, chunksize=1), strict=True):
            count += dead
            print(f"{'killed' if dead else 'SURVIVED'}  {fault.name}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    print(f"{count} of {len(chosen)} mutants killed")
    return 0 if count == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
