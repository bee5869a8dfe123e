"""CLIP-MoE's statement as an experiment on the toy world."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain, Kept

TINY = "merging/clip-moe:tiny"
TO_TEXT, TO_IMAGE = "core/retrieval.image_to_text_r1", "core/retrieval.text_to_image_r1"
MEASURE = (
    'evaluate.on=["core/zero-shot@toyworld/images?split=test&n=2048",'
    '"core/retrieval?ks=[1]@toyworld/images?split=test&n=1024&captions=detailed"]',
    "evaluate.retention=none",
)
DENSE = (
    "losses=[core/clip]",
    "data.from=toyworld/images?split=train&n=2048&captions=detailed",
    "train.steps=120",
    "train.batch_size=64",
    "train.lr=2e-4",
    "train.weight_decay=0.0",
    "train.betas=[0.9,0.999]",
    "train.eps=1e-8",
    "train.warmup=10",
)
"""The same pictures, as many of them seen as by the three expert stages and the router together."""

CLIP_MOE = Claim(
    name="clip-moe",
    statement=(
        "Experts that are extracted inside clusters of the data and put under trained gates retrieve detailed captions "
        "better than the same model fine-tuned densely on as many samples, better than plain sparse upcycling and than "
        "experts from random clusters, and zero-shot is kept."
    ),
    paper=(
        "Zhang et al., CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling, "
        "EMNLP 2025, arXiv 2409.19291"
    ),
    bases=("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2"),
    method=Arm(name="clip-moe", recipe=TINY, overrides=MEASURE),
    controls=(
        Arm(
            name="dense",
            recipe="core/finetune",
            overrides=(*DENSE, *MEASURE),
            note="all weights fine-tuned, as many samples seen",
        ),
        Arm(
            name="upcycled",
            recipe=TINY,
            overrides=(
                "init=copies",
                "router.tune=experts",
                "router.train.steps=120",
                "router.train.lr=5e-4",
                *MEASURE,
            ),
            note="four copies of each network; experts and gates trained on as many samples",
        ),
        Arm(
            name="random-clusters",
            recipe=TINY,
            overrides=("experts.by=random", *MEASURE),
            note="clusters of the same sizes without meaning",
        ),
    ),
    gains=(
        Gain(metric=TO_TEXT, over="before", at_least=0.05),
        Gain(metric=TO_TEXT, over="dense", at_least=0.02),
        Gain(metric=TO_IMAGE, over="dense", at_least=0.02),
        Gain(metric=TO_TEXT, over="upcycled", at_least=0.02),
        Gain(metric=TO_TEXT, over="random-clusters", at_least=0.02),
    ),
    kept=(Kept(metric="core/zero-shot.top1", share=0.95),),
    budget=480,
    tried=(
        "on the tuning split of base 0 only, one seed, mostly larger budgets: stages that begin from the base (as"
        " the official code does) end at .06 to .09 image-to-text R@1 and about .73 zero-shot, stages that "
        "continue at .20 and .73; a dense fine-tune was at .31 and .84, so this was not expected to hold when the"
        " rule was written. The dense rate and the upcycled one were not tuned. A first smoke run of another "
        "setting of the preset (from the base, batches of 128) was seen on the test split. One look with this "
        "rule: of six conditions only the gain over before is met; clusters beat random ones by .015 and cost .03"
        " of zero-shot"
    ),
)
