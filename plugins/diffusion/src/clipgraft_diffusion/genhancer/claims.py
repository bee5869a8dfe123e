"""GenHancer's statements as experiments on the toy world."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain, Kept

PAPER = (
    "Ma et al., GenHancer: Imperfect Generative Models are Secretly Strong Vision-Centric Enhancers, ICCV 2025, "
    "arXiv 2503.19480"
)
TINY = "diffusion/genhancer:tiny"
BASES = ("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2")
QUICK = "evaluate.retention=none"
"""The recipe measures zero-shot itself, before and after."""
METHOD = Arm(name="genhancer", recipe=TINY, overrides=(QUICK,))
ANCHOR = Arm(
    name="anchor-only",
    recipe=TINY,
    overrides=("clip.weight=0", QUICK),
    note="the same steps without the generator",
)
SHUFFLED = Arm(
    name="shuffled",
    recipe=TINY,
    overrides=("condition.shuffled=true", QUICK),
    note="the generator must restore another image, so its feedback says nothing about this one",
)

GENHANCER = Claim(
    name="genhancer",
    statement=(
        "Feedback of a small generator makes fine details readable from CLIP's global embedding, beyond what the same "
        "training does without the feedback or with feedback about another image, and zero-shot is kept."
    ),
    paper=PAPER,
    bases=BASES,
    method=METHOD,
    controls=(ANCHOR, SHUFFLED),
    gains=(
        Gain(metric="core/linear-probe.mean", over="before", at_least=0.03),
        Gain(metric="core/linear-probe.mean", over="anchor-only", at_least=0.03),
        Gain(metric="core/linear-probe.mean", over="shuffled", at_least=0.03),
    ),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    shares="diffusion/genhancer",
)

PAIRS = Claim(
    name="genhancer-pairs",
    statement=(
        "The paper's headline in miniature: after the feedback of a small generator, the untouched text tower tells "
        "minimal pairs apart (MMVP-VLM) that it confused before, and zero-shot is kept."
    ),
    paper=PAPER,
    bases=BASES,
    method=METHOD,
    controls=(ANCHOR, SHUFFLED),
    gains=(
        Gain(metric="core/pairs.mean", over="before", at_least=0.03),
        Gain(metric="core/pairs.mean", over="anchor-only", at_least=0.08),
    ),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    tried=(
        "a first preset (first stage of 150 steps, second of 250, no blur, weak anchor with a learnt temperature) "
        "failed this rule on the test split: -.013 over before, +.008 over anchor-only. A second look, with "
        "settings from the tuning splits of all three bases. LoRA gives a little less; orientation never gains"
    ),
    shares="diffusion/genhancer",
)

DISCRETE_TINY = "diffusion/genhancer-discrete:tiny"
DISCRETE = Claim(
    name="genhancer-discrete",
    statement=(
        "Feedback of a small predictor of masked codes lets the untouched text tower tell minimal pairs apart that it "
        "confused before, beyond what the same training does without the feedback or with feedback about another "
        "image, and zero-shot is kept."
    ),
    paper=PAPER,
    bases=BASES,
    method=Arm(name="genhancer-discrete", recipe=DISCRETE_TINY, overrides=(QUICK,)),
    controls=(
        Arm(name="anchor-only", recipe=DISCRETE_TINY, overrides=("clip.weight=0", QUICK), note=ANCHOR.note),
        Arm(name="shuffled", recipe=DISCRETE_TINY, overrides=("condition.shuffled=true", QUICK), note=SHUFFLED.note),
    ),
    gains=(
        Gain(metric="core/pairs.mean", over="before", at_least=0.03),
        Gain(metric="core/pairs.mean", over="anchor-only", at_least=0.03),
        Gain(metric="core/pairs.mean", over="shuffled", at_least=0.03),
    ),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    tried=(
        "one look. Afterwards two settings were tried on the tuning split of base 1, which gained least: a blur of .6 "
        "and of 2.0 deviations in the first stage gave +.062 and -.012, where the preset's 1.0 gives +.056. That is no "
        "ground for a second look, and none was taken"
    ),
)
