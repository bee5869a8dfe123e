"""The statements of model soups, WiSE-FT and OPCM as experiments on the toy world."""

from __future__ import annotations

from clipgraft.claims import Arm, Claim, Gain
from clipgraft_merging.plugin import OPCM as OPCM_PAPER
from clipgraft_merging.plugin import SOUPS, WISE_FT

BASES = ("toyworld/clip", "toyworld/clip-1", "toyworld/clip-2")
TOP1 = "core/zero-shot.top1"
INGREDIENTS = "merging/ingredients"
CONTINUAL = "merging/continual"
ON_ONE_BASE = "settings were looked at on the tuning split of the first base only"

SOUP = Claim(
    name="soup",
    statement=(
        "The mean of four fine-tunes of one base, which differ in the order of the data, crops and one setting each, "
        "classifies better than they do on average, and than the one of them that held-out data choose."
    ),
    paper=SOUPS,
    bases=BASES,
    method=Arm(
        name="soup",
        recipe="merging/soup:tiny",
        note="distances to the ingredients are measured in the run itself; before it they are 0",
    ),
    controls=(
        Arm(
            name="long",
            recipe="merging/soup:tiny",
            overrides=("ingredients=[{order: 0, steps: 240}]", "judge.data=null"),
            note="the steps of all four in one fine-tune; in the table, no part of the rule",
        ),
    ),
    gains=(
        Gain(metric=f"{INGREDIENTS}.over_mean", over="before", at_least=0.005),
        Gain(metric=f"{INGREDIENTS}.over_chosen", over="before", at_least=0.0),
    ),
    kept=(),
    budget=300,
    tried=(
        f"{ON_ONE_BASE}, once: the soup .850, its ingredients .837 on average, .832 the chosen one and .849 the best; "
        "before .785. One look at the test split: holds; in the means before .810, ingredients .858, the chosen one "
        ".860, the soup .874, over each base's best ingredient by .013. One fine-tune with the steps of all four is "
        "better still (.888), so here the soup is no way to spend training, only a way to use fine-tunes that exist"
    ),
)

FINE_TUNED = Arm(
    name="fine-tuned",
    recipe="merging/wise-ft:tiny",
    overrides=("alpha=1", "judge.data=null", "same=null"),
    note="the end of the path, alpha 1",
)
GENTLE = Arm(
    name="gentle",
    recipe="merging/wise-ft:tiny",
    overrides=("alpha=1", "judge.data=null", "same=null", "train.lr=1.5e-4"),
    note="a quarter of the learning rate and no interpolation: it stays near the base too",
)
INTERPOLATED = Arm(name="wise-ft", recipe="merging/wise-ft:tiny", note="before is the path's other end, alpha 0")
WISE_TRIED = (
    f"{ON_ONE_BASE}: at a rate of 1e-3 top1 on other backgrounds was .822, .852, .734 (alpha 0, .4, 1), at 6e-4 .822, "
    ".857, .799, at 3e-4 .813, .847, .837 (other pictures), at 1.5e-4 .849 without interpolation. One "
    "look at the test split: before .811, fine-tuned .830, interpolated .850, and as much (.851) by "
    "the gentler fine-tune alone"
)

WISE = Claim(
    name="wise-ft",
    statement=(
        "A point between a CLIP and its fine-tune on pictures of one background, chosen on the tuning split of other "
        "backgrounds, classifies pictures on those better than either end does."
    ),
    paper=WISE_FT,
    bases=BASES,
    method=INTERPOLATED,
    controls=(FINE_TUNED,),
    gains=(
        Gain(metric=TOP1, over="before", at_least=0.015),
        Gain(metric=TOP1, over="fine-tuned", at_least=0.015),
    ),
    kept=(),
    budget=300,
    shares="merging/wise-ft",
    tried=WISE_TRIED,
)

OVER_GENTLE = Claim(
    name="wise-ft-over-gentle",
    statement=(
        "The interpolated model is better on other backgrounds than a fine-tune at a quarter of the learning rate, "
        "which stays near the base without interpolation."
    ),
    paper=WISE_FT,
    bases=BASES,
    method=INTERPOLATED,
    controls=(GENTLE,),
    gains=(Gain(metric=TOP1, over="gentle", at_least=0.0),),
    kept=(),
    budget=100,
    shares="merging/wise-ft",
    tried=WISE_TRIED,
)

OPCM_TRIED = (
    f"{ON_ONE_BASE}, with fine-tunes of 80 and 100 steps: opcm .605, without its projection .586, task arithmetic "
    ".533, .564, .588, .509 at scales .2, .3, .5, 1, average .533 (six tasks and longer fine-tunes: .599, .587, "
    ".520, .582, .563, .425). alpha .3, .5, .7: .596, .605, .599; mode paper .572. Backward transfer: opcm -.115, "
    "without its projection -.132, task arithmetic -.004, -.024, -.097, -.163, so it was not expected to be above "
    "task arithmetic's, which learns less to begin with. One look at the test split: accuracy at the end .589, without "
    "the projection .559, task arithmetic .550, average .540, and every margin is met; but what the projection adds in "
    "backward transfer (-.115 against -.141) is mostly one base's (p = .10), so the rule as a whole is not. Against "
    "task arithmetic (-.110) it is -.005"
)
METHOD = Arm(
    name="opcm",
    recipe="merging/opcm:tiny",
    note="all methods merge the same five fine-tunes in the same two orders per seed; before the run distances are 0",
)

OPCM = Claim(
    name="opcm",
    statement=(
        "Merging five fine-tunes one after another by OPCM leaves a higher accuracy over their tasks than continual "
        "task arithmetic, than averaging, and than the same sum without OPCM's projection, which also forgets more."
    ),
    paper=OPCM_PAPER,
    bases=BASES,
    method=METHOD,
    controls=(),
    gains=(
        Gain(metric=f"{CONTINUAL}.over/rescaled", over="before", at_least=0.005),
        Gain(metric=f"{CONTINUAL}.over/task-arithmetic", over="before", at_least=0.005),
        Gain(metric=f"{CONTINUAL}.over/average", over="before", at_least=0.03),
        Gain(metric=f"{CONTINUAL}.backward_over/rescaled", over="before", at_least=0.0),
    ),
    kept=(),
    budget=400,
    shares="merging/opcm",
    tried=OPCM_TRIED,
)

BACKWARD = Claim(
    name="opcm-backward",
    statement=(
        "What OPCM has merged loses less accuracy by the end (backward transfer) than under continual task arithmetic."
    ),
    paper=OPCM_PAPER,
    bases=BASES,
    method=METHOD,
    controls=(),
    gains=(Gain(metric=f"{CONTINUAL}.backward_over/task-arithmetic", over="before", at_least=0.0),),
    kept=(),
    budget=10,
    shares="merging/opcm",
    tried=OPCM_TRIED,
)
