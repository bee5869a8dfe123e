"""The engine of ``clipgraft claims``: run every arm of a claim, then apply its rule to the numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clipgraft import files
from clipgraft.claims import Arm, Claim
from clipgraft.errors import ClipgraftError


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``arms``: {arm: {metric: [one value per seed]}}, the method as "after". Holds when nothing is ``unmet``."""

    claim: Claim
    arms: Mapping[str, Mapping[str, Sequence[float]]]
    met: tuple[str, ...]
    unmet: tuple[str, ...]
    p_value: float | None
    seconds: float

    def as_json(self) -> dict[str, object]:
        """An entry of ``clipgraft claims --json``; ``kept`` is after / before (1 where before is 0)."""
        after, before, kept = self.arms["after"], self.arms["before"], {}
        for m in (k.metric for k in self.claim.kept):
            kept[m] = [a / b if b else 1.0 for a, b in zip(after[m], before[m], strict=True)]
        about = {"name": self.claim.name, "statement": self.claim.statement, "holds": not self.unmet}
        numbers = {"seeds": len(after[self.claim.metrics[0]]), "arms": self.arms, "kept": kept}
        return about | numbers | {"p_value": self.p_value, "seconds": round(self.seconds, 1)}


def paired_p_value(differences: Sequence[float]) -> float:
    """P(T >= t) of the paired t-test that the mean is above zero, for n >= 2 differences.

    With T = sqrt(v) cot(phi) and v = n - 1, the tail is the integral of sin^(v-1) from 0 to phi (Simpson's rule).
    """
    n, mean, spread = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 0.0 if mean > 0 else 1.0
    step = math.atan2(math.sqrt(n - 1), mean / spread * math.sqrt(n)) / 1000
    heights = [math.sin(k * step) ** (n - 2) for k in range(1001)]
    area = step / 3 * (heights[0] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
    return min(1.0, area * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / math.sqrt(math.pi))


def judge(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]], *, seconds: float = 0.0) -> Verdict:
    """Apply the claim's rule to the numbers; nothing else decides."""
    after, before, seeds = arms["after"], arms["before"], len(arms["after"][claim.metrics[0]])
    lone = "undecided: one seed can't tell a gain from chance; use --seeds 2 or more"
    seen, tails = [(lone, False)] if seeds < 2 else [], []
    for g in claim.gains:
        differences = [a - b for a, b in zip(after[g.metric], arms[g.over][g.metric], strict=True)]
        mean = statistics.fmean(differences)
        text, fine = f"{g.metric}: {mean:+.4f} over {g.over} (needs {g.at_least:+g})", mean >= g.at_least
        if seeds > 1:  # every gain must pass, so the largest p speaks for all and no correction is due
            allowed = min(g.at_least, 0.0)  # a loss that is allowed: the test asks whether the mean is above it
            tails.append(p := paired_p_value([d - allowed for d in differences]))
            text, fine = f"{text}, p = {p:.2g} (needs below {claim.alpha:g})", fine and p < claim.alpha
        seen.append((text, fine))
    for k in claim.kept:
        now, then = statistics.fmean(after[k.metric]), statistics.fmean(before[k.metric])
        text = f"{k.metric}: {now:.4f} after {then:.4f} (needs {k.share:.1%} of it, {k.share * then:.4f})"
        seen.append((text, now >= k.share * then))
    met, unmet = (tuple(text for text, fine in seen if fine == wanted) for wanted in (True, False))
    return Verdict(claim=claim, arms=arms, met=met, unmet=unmet, p_value=max(tails, default=None), seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm with one seed: a run of its own in ``folder``; ``overrides`` are the arm's and the base."""

    arm: Arm
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    def value(self, when: str, metric: str) -> float:
        """A metric "before" or "after" the finished run."""
        measured = json.loads((self.folder / "evaluations.json").read_text("utf-8")).get(when, {})
        flat = {f"{name}.{key}": value for name, metrics in measured.items() for key, value in metrics.items()}
        if not math.isfinite(flat.get(metric, math.nan)):
            raise ClipgraftError(f"{self.folder}: no finite {metric!r} {when}; it has {', '.join(flat) or 'nothing'}")
        return float(flat[metric])

    def finish(self, run_arm: Callable[[Job], None], *, identity: str) -> float:
        """Run it unless it was done with this ``identity``; returns the seconds that it took."""
        record = self.folder.with_name(f"{self.folder.name}.json")
        done = json.loads(record.read_text("utf-8")) if record.exists() else {}
        if done.get("identity") != identity or not (self.folder / "evaluations.json").exists():
            record.unlink(missing_ok=True)  # first: what it vouches for goes now
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            run_arm(self)
            files.write_json(record, done := {"identity": identity, "seconds": time.monotonic() - start})
        return float(done["seconds"])


def check(
    claim: Claim, *, seeds: int, out: Path, run_arm: Callable[[Job], None], identity: Callable[[Job], str]
) -> Verdict:
    """Run every arm with every seed (seed k on base k, cyclically) below ``out``, one per core at a time, and judge.

    A finished arm is reused while ``identity(job)`` is unchanged. ``seconds``: what the arms took, over the cores.
    """
    jobs, folder = {}, out / (claim.shares or claim.name)
    for k, arm in ((k, arm) for k in range(seeds) for arm in claim.arms):
        overrides = (*arm.overrides, f"model.from={claim.bases[k % len(claim.bases)]}")
        told = hashlib.sha256(repr((arm.recipe, overrides)).encode()).hexdigest()[:6]
        name = f"{arm.name}-{told}" if claim.shares else arm.name  # another claim's arm of this name may differ
        jobs[arm.name, k] = Job(arm=arm, seed=k, overrides=overrides, folder=folder / f"seed-{k}" / name)
    work = [(job, identity(job)) for job in jobs.values()]  # a mistake in a config shows before anything runs
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    with ThreadPoolExecutor(cores := min(len(usable), len(work))) as pool:
        try:
            seconds = sum(pool.map(lambda pair: pair[0].finish(run_arm, identity=pair[1]), work)) / cores
        except BaseException:  # Ctrl-C too: what hasn't begun never begins
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    def values(arm: Arm, when: str) -> dict[str, list[float]]:
        return {m: [jobs[arm.name, k].value(when, m) for k in range(seeds)] for m in claim.metrics}

    arms = {"before": values(claim.method, "before"), "after": values(claim.method, "after")}
    return judge(claim, arms | {arm.name: values(arm, "after") for arm in claim.controls}, seconds=seconds)
