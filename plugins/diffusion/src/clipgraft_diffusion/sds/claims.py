"""SDS-CLIP's statement as an experiment on the toy world."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain, Kept

PAPER = (
    "Basu et al., Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic Reasoning in "
    "CLIP, EMNLP 2024, arXiv 2307.09233"
)
TINY = "diffusion/sds-clip:tiny"
ZERO_SHOT = "core/zero-shot@toyworld/images?split=test&n=2048"
PAIRS = "toyworld/pairs?split=test&per_pattern=128"
MEASURE = (
    f'evaluate.on=["{ZERO_SHOT}","core/pairs@{PAIRS}","evaluation/winoground@{PAIRS}"]',
    "evaluate.retention=none",
)
"""Minimal pairs are scored as Winoground, too: two images, two captions, both directions."""

SDS = Claim(
    name="sds-clip",
    statement=(
        "Score distillation of a frozen text-to-image model, beside contrastive training on the same captions, lets "
        "CLIP match images and captions that differ in one detail, beyond what contrastive training does alone, with "
        "the generator told other captions, or with a generator that has learnt nothing, and zero-shot is kept."
    ),
    paper=PAPER,
    bases=("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2"),
    method=Arm(name="sds-clip", recipe=TINY, overrides=MEASURE),
    controls=(
        Arm(
            name="contrastive",
            recipe=TINY,
            overrides=("weight=0", *MEASURE),
            note="the same steps, captions and weights without the generator",
        ),
        Arm(
            name="shuffled",
            recipe=TINY,
            overrides=("denoiser.shuffled=true", *MEASURE),
            note="the generator is told another image's caption",
        ),
        Arm(
            name="random-generator",
            recipe=TINY,
            overrides=("denoiser.random=true", *MEASURE),
            note="a generator with random weights: the same gradient path, no knowledge",
        ),
    ),
    gains=(
        Gain(metric="core/pairs.mean", over="before", at_least=0.05),
        Gain(metric="core/pairs.mean", over="contrastive", at_least=0.03),
        Gain(metric="core/pairs.mean", over="shuffled", at_least=0.03),
        Gain(metric="core/pairs.mean", over="random-generator", at_least=0.03),
        Gain(metric="evaluation/winoground.group", over="contrastive", at_least=0.03),
    ),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    tried=(
        "on the tuning splits, first of base 1: layer norms alone (the method's choice) end at .21 to .26 in a "
        "dozen settings with the distillation and .20 to .27 without, below the .28 of before; 2,688 weights are "
        "too few here, so tiny trains whole towers. A map learnt on images and trained along gave .47, less than "
        "contrastive training (.51); one fitted to captions and kept .58, .60 and .55 at lambda 10, 30 and 100. "
        "Then run on bases 0 and 2. One look at the test split: all margins are met, one p-value, .060 over "
        "contrastive training, is not (+.076, +.100, +.017). Nearly all of that gain is one detail, the glyph (.21 "
        "to .87, .22 to .90, .86 to 1.00); the mean of the other eight moves by +.003, +.027 and +.002. Orientation "
        "falls in every arm; zero-shot ends .030 below contrastive training"
    ),
)
