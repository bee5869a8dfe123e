"""Long-CLIP's statements as experiments on the toy world: towers read 32 tokens, stories have twice as many."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain, Kept

PAPER = "Zhang et al., Long-CLIP: Unlocking the Long-Text Capability of CLIP, ECCV 2024, arXiv 2403.15378"
TINY = "llm/long-clip:tiny"
TO_IMAGE = "llm/long-retrieval.text_to_image_r1"
TO_TEXT = "llm/long-retrieval.image_to_text_r1"
SHORT = "core/retrieval.text_to_image_r10"
ZERO_SHOT = "core/zero-shot.top1"
BASES = ("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2")
FOLDER = "llm/long-clip"
UNTRAINED = ("train.steps=1", "train.lr=1e-12", "train.warmup=0")
RESAMPLED = "grafts=[{use: llm/stretch-positions, context: 92, method: interpolate}]"

METHOD = Arm(name="long-clip", recipe=TINY)
INTERPOLATED = Arm(
    name="interpolated",
    recipe=TINY,
    overrides=(RESAMPLED,),
    note="all positions resampled alike and trained, as open_clip would on loading",
)
TUNED = (
    "settings on the tuning split: 40, 60, 100 and 200 steps at 3e-4, 5e-4 and 1e-3, 8 and 16 components, mostly on "
    "base 0; then these on all three bases: long recall at 1 (text to image) .65, .54 and .60 from .08, .05 and .11; "
    "short recall at 10 .60, .62 and .63 from .63, .60 and .63; zero-shot .85, .83 and .86 from .80, .81 and .86"
)

LONG_CLIP = Claim(
    name="long-clip",
    statement=(
        "A CLIP whose positions are stretched, keeping the first ones, and that is trained on long captions with "
        "primary component matching on short ones, retrieves by long captions better than before (stretched, "
        "untrained), better than after the same training without stretching, on captions cut at the old context, and "
        "keeps short-caption retrieval and zero-shot, which the same training on long captions alone loses."
    ),
    paper=PAPER,
    bases=BASES,
    method=METHOD,
    controls=(
        Arm(
            name="cut",
            recipe=TINY,
            overrides=("grafts=[]",),
            note="the old context of 32 tokens: training and test captions are cut, which the evaluation counts",
        ),
        Arm(name="long-only", recipe=TINY, overrides=("pcm.weight=0",), note="no loss on short captions"),
    ),
    gains=(
        Gain(metric=TO_IMAGE, over="before", at_least=0.3),
        Gain(metric=TO_TEXT, over="before", at_least=0.3),
        Gain(metric=TO_IMAGE, over="cut", at_least=0.2),
        Gain(metric=TO_TEXT, over="cut", at_least=0.2),
        Gain(metric=ZERO_SHOT, over="long-only", at_least=0.03),
    ),
    kept=(
        Kept(metric=ZERO_SHOT, share=0.98),
        Kept(metric=SHORT, share=0.95),
        Kept(metric="core/retrieval.image_to_text_r10", share=0.95),
    ),
    budget=300,
    shares=FOLDER,
    tried=(
        f"{TUNED}. One look at the test split: holds, with p .020 the largest. Whole images for short captions do as "
        "well (claim long-clip-components), so what is shown is the longer context and the loss on short captions"
    ),
)

COMPONENTS = Claim(
    name="long-clip-components",
    statement=(
        "Short captions compared with images that are reduced to their primary components, instead of whole images, "
        "leave more room for the long ones: retrieval by long captions is better than after the same training with the "
        "plain loss on short captions."
    ),
    paper=PAPER,
    bases=BASES,
    method=METHOD,
    controls=(
        Arm(
            name="whole-images",
            recipe=TINY,
            overrides=("pcm.components=null",),
            note="both captions, no reduction: the gain of short captions without the paper's idea",
        ),
    ),
    gains=(Gain(metric=TO_IMAGE, over="whole-images", at_least=0.02),),
    kept=(Kept(metric=ZERO_SHOT, share=0.98),),
    budget=240,
    shares=FOLDER,
    tried=(
        f"{TUNED}. There whole images gave .66 and zero-shot .87 on base 2, .71 and .80 on base 0 (with another rate), "
        "so it was not expected to hold. One look at the test split: .586 against .629 with whole images, whose "
        "zero-shot was .862 against .857"
    ),
)

POSITIONS = Claim(
    name="long-clip-positions",
    statement=(
        "Before any training, positions that are stretched behind the first ones keep retrieval by short captions and "
        "zero-shot better than positions that are all resampled."
    ),
    paper=PAPER,
    bases=BASES,
    method=Arm(name="stretched", recipe=TINY, overrides=UNTRAINED, note="one step at a rate of 1e-12"),
    controls=(Arm(name="resampled", recipe=TINY, overrides=(*UNTRAINED, RESAMPLED), note="untrained too"),),
    gains=(
        Gain(metric=SHORT, over="resampled", at_least=0.02),
        Gain(metric=ZERO_SHOT, over="resampled", at_least=0.005),
    ),
    kept=(),
    budget=60,
    shares=FOLDER,
    tried=(
        f"{TUNED}. One look at the test split: short recall .624 against .587, as it was before stretching, but zero-"
        "shot .820 against .816: its margin of .005 is missed, p .30"
    ),
)

INTERPOLATION = Claim(
    name="long-clip-over-interpolation",
    statement=(
        "After the same training, positions that were stretched behind the first ones retrieve by long captions better "
        "than positions that were all resampled."
    ),
    paper=PAPER,
    bases=BASES,
    method=METHOD,
    controls=(INTERPOLATED,),
    gains=(Gain(metric=TO_IMAGE, over="interpolated", at_least=0.01),),
    kept=(Kept(metric=ZERO_SHOT, share=0.98),),
    budget=240,
    shares=FOLDER,
    tried=(
        f"{TUNED}. There the resampled positions ended .03 higher, so it was not expected to hold. One look at the "
        "test split: .586 against .605"
    ),
)
