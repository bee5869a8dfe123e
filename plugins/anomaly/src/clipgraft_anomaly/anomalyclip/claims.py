"""AnomalyCLIP's statement as an experiment on the toy world."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain

TINY = "anomaly/anomalyclip:tiny"
IMAGE, PIXEL = "anomaly/inspection.image_auroc", "anomaly/inspection.pixel_auroc"

ANOMALYCLIP = Claim(
    name="anomalyclip",
    statement=(
        "Two prompts that name no object, learnt on damaged and flawless parts of some shapes, find damage on shapes "
        "never seen, beyond hand-written prompts (before) and beyond the same prompts untrained, for whole pictures "
        "and for pixels. The CLIP itself is not touched, so nothing of it can be lost."
    ),
    paper=(
        "Zhou et al., AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection, ICLR 2024, "
        "arXiv 2310.18961"
    ),
    bases=("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2"),
    method=Arm(name="anomalyclip", recipe=TINY),
    controls=(
        Arm(
            name="untrained",
            recipe=TINY,
            overrides=("train.steps=1", "train.lr=1e-12"),
            note="the same prompts as they are drawn",
        ),
    ),
    gains=(
        Gain(metric=PIXEL, over="before", at_least=0.1),
        Gain(metric=PIXEL, over="untrained", at_least=0.1),
        Gain(metric=IMAGE, over="before", at_least=0.05),
        Gain(metric=IMAGE, over="untrained", at_least=0.05),
    ),
    kept=(),
    budget=240,
    tried=(
        "settings were chosen on the tuning split of the three bases: a picture's score with half of the map's maximum "
        "(on the global embedding alone one base got worse), 500 steps. One look at the test split: every margin is "
        "met, three of four p-values are below .05; whole pictures against hand-written prompts are not (.070), since "
        "those score .50, .40 and .56 on the three bases, all close to guessing"
    ),
)
