"""ARO: attribution, relation and order of words (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936)."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_evaluation.layouts import Box, CaptionRow, CaptionTests, entries_of, folder_of, read_json, text_of

Part = Literal["relation", "attribution", "coco-order", "flickr-order"]
Split = Literal["test", "val"]
ANNOTATIONS = {"coco-order": "coco_karpathy_{}.json", "flickr-order": "flickr30k_{}.json"}
MAX_WORDS = 30
SMALLEST_ATTRIBUTION = 25
"""Pairs of attributes with fewer tests have no accuracy of their own in the official code."""
SYMMETRIC = frozenset(
    """
    adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing, cleaning,
    climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking from,
    driving, driving down, driving on, eating from, eating in, enclosing, exiting, facing, filled with, floating in,
    floating on, flying, flying above, flying in, flying over, flying through, full of, going down, going into, going
    through, grazing in, growing in, growing on, guiding, hanging from, hanging in, hanging off, hanging over, higher
    than, holding onto, hugging, in between, jumping off, jumping on, jumping over, kept in, larger than, leading,
    leaning over, leaving, licking, longer than, looking in, looking into, looking out, looking over, looking through,
    lying next to, lying on top of, making, mixed with, mounted on, moving, near, next to, of, on the back of, on the
    edge of, on the front of, on the other side of, on the side of, opening, painted on, parked at, parked beside,
    parked by, parked in, parked in front of, parked near, parked next to, perched on, petting, piled on, playing,
    playing in, playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running in, running
    on, running through, seen through, sitting behind, sitting beside, sitting by, sitting in front of, sitting near,
    sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing, splashing,
    sprinkled on, stacked on, standing against, standing around, standing behind, standing beside, standing in front
    of, standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, talking to, topped
    with, touching, traveling down, traveling on, tying, typing on, underneath, wading in, waiting for, walking
    across, walking by, walking down, walking next to, walking through, with, working in, working on, worn on, wrapped
    around, wrapped in
    """.replace("\n    ", " ")
    .strip()
    .split(", ")
)
"""Relations that the official notebook leaves out of the mean, because the other order is often right too."""


class AroConfig(Config):
    """``aro:DIR?part=relation``."""

    path: str = Field(description="folder with the part's JSON file, and images/ or the images that the file names")
    part: Part = Field("relation", description="which of the four benchmarks")
    split: Split = Field("test", description="of coco-order and flickr-order")
    perturbed: str | None = Field(
        None,
        description="JSON file of test cases for coco-order and flickr-order, each with image and caption_options, "
        "the right caption first; null: trigrams only",
    )
    order: Literal["all", "trigrams"] = Field(
        "all", description="which perturbations: all four from the file perturbed, or the two that need no tagger"
    )
    seed: int = Field(0, ge=0, description="of the two perturbations by trigrams")


def open_aro(
    *,
    path: str,
    part: Part = "relation",
    split: Split = "test",
    perturbed: str | None = None,
    order: Literal["all", "trigrams"] = "all",
    seed: int = 0,
) -> CaptionTests:
    """Groups are relations, pairs of attributes, or the part itself."""
    name = f"aro:{path}?part={part}"
    if part in ANNOTATIONS:
        return _ordered(name, path, part=part, split=split, perturbed=perturbed, order=order, seed=seed)
    if perturbed is not None:
        raise InputError(f"{name}: perturbed belongs to coco-order and flickr-order, not to {part}; leave it out")
    file = f"visual_genome_{part}.json"
    root = folder_of(path, source=name, holds=file)
    if not (root / "images").is_dir():
        raise InputError(f"{name}: there is no folder images beside {file}; unpack vgr_vga_images.zip there")
    rows = []
    for k, entry in enumerate(entries_of(read_json(root / file, source=name), where=f"{name}: {file}")):
        where = f"{name}: {file} entry {k}"
        image, right, wrong = (
            text_of(entry, key, where=where) for key in ("image_path", "true_caption", "false_caption")
        )
        group = text_of(entry, "relation_name", where=where) if part == "relation" else _attributes(entry, where=where)
        rows.append(CaptionRow(f"{part}/{k}", image, right, (wrong,), group, _box(entry, where=where)))
    if part == "relation":
        return CaptionTests(name, root / "images", rows, unfit=SYMMETRIC)
    return CaptionTests(name, root / "images", rows, smallest=SMALLEST_ATTRIBUTION)


def _attributes(entry: dict[str, Any], *, where: str) -> str:
    names = entry.get("attributes")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} has no pair of attributes but {names!r}; take the published file")
    return f"{names[0]}_{names[1]}"


def _box(entry: dict[str, Any], *, where: str) -> Box:
    values = [entry.get(f"bbox_{key}") for key in "xywh"]
    numbers = [round(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9]
    if len(numbers) != 4:
        raise InputError(f"{where} has no box bbox_x, bbox_y, bbox_w, bbox_h but {values}; take the published file")
    x, y, width, height = numbers
    return x, y, x + width, y + height


def _ordered(
    name: str, path: str, *, part: Part, split: Split, perturbed: str | None, order: str, seed: int
) -> CaptionTests:
    """COCO-Order and Flickr30k-Order: the right caption and the same words in other orders.

    Deviation: an order that happens to equal the caption is left out, and with it a caption that has no other; the
    official score counts the first of equals as right.
    """
    root = Path(path).expanduser().resolve()
    if order == "trigrams":
        if perturbed is not None:
            raise InputError(f"{name}: order=trigrams makes its captions itself; leave out perturbed, or order")
        file = ANNOTATIONS[part].format(split)
        root = folder_of(path, source=name, holds=file)
        cases = _trigram_cases(root / file, name=name, seed=seed)
    elif perturbed is None:
        raise InputError(
            f"{name}: two of the four perturbations move nouns and adjectives, which takes spaCy's tagger; give the "
            "official test cases with perturbed=FILE.json, or the other two with order=trigrams"
        )
    else:
        root = folder_of(path, source=name, holds="")
        cases = _official_cases(Path(perturbed).expanduser().resolve(), name=name)
    rows = []
    for k, (image, caption, others) in enumerate(cases):
        if different := tuple(dict.fromkeys(text for text in others if _letters(text) != _letters(caption))):
            rows.append(CaptionRow(f"{part}/{k}", image, caption, different, part))
    return CaptionTests(name, root, rows)


def _letters(text: str) -> str:
    """Without white space, which no tokenizer of CLIP's sees beside punctuation."""
    return "".join(text.split())


def _official_cases(file: Path, *, name: str) -> list[tuple[str, str, list[str]]]:
    """(image, caption, perturbed captions) of what the official dataset keeps as ``test_cases``, saved as JSON."""
    cases = []
    for k, entry in enumerate(entries_of(read_json(file, source=name), where=f"{name}: {file.name}")):
        where = f"{name}: {file.name} entry {k}"
        options = entry.get("caption_options")
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise InputError(f"{where} has no caption_options, the right one first; save the official test cases")
        cases.append((text_of(entry, "image", where=where), options[0], options[1:]))
    return cases


def _trigram_cases(file: Path, *, name: str, seed: int) -> list[tuple[str, str, list[str]]]:
    """(image, caption, [words shuffled within trigrams, trigrams shuffled]) of every caption of a Karpathy file."""
    cases = []
    for k, entry in enumerate(entries_of(read_json(file, source=name), where=f"{name}: {file.name}")):
        where = f"{name}: {file.name} entry {k}"
        image, captions = text_of(entry, "image", where=where), entry.get("caption")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise InputError(f"{where} has no list of captions but {captions!r}; take the published file")
        for j, caption in enumerate(captions):
            rng = random.Random(f"{seed}/{image}/{j}")
            cases.append((image, clean(caption), [clean(text) for text in shuffled_trigrams(caption, rng)]))
    return cases


def clean(caption: str) -> str:
    """Lower case, without . ! " ( ) * # : ; ~ and repeated white space, thirty words at most."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:MAX_WORDS])


def shuffled_trigrams(caption: str, rng: random.Random) -> tuple[str, str]:
    """The words of a caption, shuffled within every three of them, and the threes shuffled.

    Deviation: words and punctuation are told apart by a pattern instead of NLTK's tokenizer.
    """
    words = re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", caption)
    threes = [words[k : k + 3] for k in range(0, len(words), 3)]
    within = [word for three in threes for word in rng.sample(three, len(three))]
    moved = [word for three in rng.sample(threes, len(threes)) for word in three]
    return " ".join(within), " ".join(moved)
