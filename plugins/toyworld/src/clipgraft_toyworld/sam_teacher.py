"""The promptable teacher: a tiny SAM that outlines whatever a point or a box points at.

A stock transformers `SamModel` at 64 pixels: patches of 8, a grid of 8 x 8 tokens, one windowed block and two global
ones with relative positions, masks of 32 x 32 as logits. It is trained as SAM is: a first prompt is a point or a box of
one object, a second adds the mask so far and a point where it is wrong; focal, dice and a prediction of the overlap.

Shapes: B pictures, S = 64 pixels, g = 8 tokens per side, 4g = 32 mask cells per side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.crowds import crowds
from clipgraft_toyworld.pairs import as_bytes
from clipgraft_toyworld.prompts import (
    Masks,
    answer,
    bounding_box,
    inner_point,
    intersection_over_union,
    random_point,
)
from clipgraft_toyworld.render import render
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.world import BLOCK, Split, generator, sample_jitter, sample_scene

STEPS, BATCH, POOL = 1000, 32, 6144
SIZE, PATCH, WIDTH, PROMPT = 64, 8, 96, 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""SAM's own standardisation: its image processor's defaults."""
FOCAL, DICE, OVERLAP = 20.0, 1.0, 1.0
"""Weights of the loss terms."""
SMALLEST = 40
"""Objects of fewer visible pixels are no targets: a prompt on a sliver says nothing."""


@dataclass(frozen=True)
class Targets:
    """B single objects: `pixels` (B, 3, S, S) uint8 and `mask` (B, S, S) bool of the object that is meant."""

    pixels: Tensor
    mask: Tensor

    def __getitem__(self, rows: Tensor) -> Targets:
        return Targets(self.pixels[rows], self.mask[rows])

    def __len__(self) -> int:
        return len(self.mask)


def build_sam_teacher(seed: int) -> Any:
    """An untrained `SamModel`, initialised from `seed`."""
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    vision = SamVisionConfig(
        hidden_size=WIDTH,
        output_channels=PROMPT,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        mlp_ratio=2.0,
        window_size=4,
        global_attn_indexes=[1, 2],
        num_pos_feats=PROMPT // 2,
        initializer_range=0.02,
    )
    prompt = SamPromptEncoderConfig(hidden_size=PROMPT, image_size=SIZE, patch_size=PATCH, mask_input_channels=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=PROMPT, mlp_dim=2 * PROMPT, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=PROMPT
    )
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = SamModel(config)
        # transformers draws these frequencies at 48 times this scale, where neighbouring points share nothing.
        model.shared_image_embedding.positional_embedding.data.normal_()
        model.tie_weights()
    return model


def standardise(pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 to what the model takes."""
    return (pixels.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def targets(split: Split, *, n: int, seed: int = 0) -> Targets:
    """About n objects: half of the pictures are crowds, half show one to three objects of one kind with details."""
    crowd = crowds(split, n=n // 4, size=SIZE, seed=seed)
    pixels, instances = [as_bytes(crowd.picture.image)], [crowd.picture.instances]
    for block in range(max(1, n // 4 // BLOCK)):
        rng = generator(split, stream="images", seed=seed, block=block)
        picture = render(sample_scene(BLOCK, rng), sample_jitter(BLOCK, rng), size=SIZE)
        pixels.append(as_bytes(picture.image))
        instances.append(picture.instances)
    masks = torch.cat(instances) > 0.5  # (pictures, K, S, S)
    row, slot = (masks.flatten(2).sum(2) >= SMALLEST).nonzero(as_tuple=True)
    return Targets(pixels=torch.cat(pixels)[row], mask=masks[row, slot])


def mask_loss(masks: Masks, truth: Tensor) -> Tensor:
    """Focal, dice and overlap against (B, S, S) bool, of the best of the candidates."""
    logits = masks.full(SIZE)
    target = truth[:, None].float().expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    miss = (probability - target).abs()  # 1 - p of the right answer
    balance = 0.25 * target + 0.75 * (1 - target)
    focal = (balance * miss.square() * entropy).flatten(2).mean(2)
    both = (probability * target).flatten(2).sum(2)
    dice = 1 - (2 * both + 1) / (probability.flatten(2).sum(2) + target.flatten(2).sum(2) + 1)
    truly = intersection_over_union(logits.detach() > 0, truth[:, None])
    overlap = (masks.overlap - truly).square()
    each = FOCAL * focal + DICE * dice
    best = each.argmin(1, keepdim=True)
    return each.gather(1, best).mean() + OVERLAP * overlap.mean()


def _first_prompt(truth: Tensor, *, boxed: bool) -> dict[str, Tensor]:
    if not boxed:
        return {"points": random_point(truth)[:, None], "labels": torch.ones(len(truth), 1, dtype=torch.long)}
    box = bounding_box(truth)
    side = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    return {"boxes": (box + torch.randn_like(box) * 0.06 * side).clamp(0, SIZE - 1)}


def _correct(masks: Masks, truth: Tensor, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second prompt: the best mask so far as logits, and one more point where it is wrong."""
    rows, best = torch.arange(len(truth)), masks.overlap.argmax(1)
    found = masks.full(SIZE)[rows, best] > 0
    point = random_point(found ^ truth)
    inside = truth[rows, point[:, 1].long(), point[:, 0].long()].long()
    prompt = {"masks": masks.logits[rows, best].detach()[:, None]} | first
    if "points" in first:
        prompt["points"] = torch.cat([first["points"], point[:, None]], 1)
        prompt["labels"] = torch.cat([first["labels"], inside[:, None]], 1)
    else:
        prompt["points"], prompt["labels"] = point[:, None], inside[:, None]
    return prompt


def train_sam_teacher(*, seed: int, steps: int = STEPS, batch: int = BATCH, pool: int = POOL) -> nn.Module:
    """Trained on the masks of crowds and of single scenes."""
    torch.manual_seed(seed)
    data = targets("train", n=pool, seed=seed)
    model = build_sam_teacher(seed).train()
    model.shared_image_embedding.requires_grad_(False)  # frequencies of positions, fixed as in SAM
    blocks = [*model.vision_encoder.layers, model.mask_decoder.transformer]
    matrices = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    inner = {id(parameter) for module in matrices for parameter in module.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    optimizer = Optimizer([*matrices, *rest], steps=steps, inner="weight", lr=2e-3)
    for step in range(steps):
        now = data[torch.randint(len(data), (batch,))]
        embedding = model.vision_encoder(standardise(now.pixels)).last_hidden_state
        half = batch // 2
        loss = embedding.new_zeros(())
        for boxed, rows in ((False, slice(0, half)), (True, slice(half, batch))):
            truth = now.mask[rows]
            prompt = _first_prompt(truth, boxed=boxed)
            first = answer(model, embedding[rows], several=step % 2 == 0, **prompt)
            second = answer(model, embedding[rows], **_correct(first, truth, prompt))
            loss = loss + (mask_loss(first, truth) + mask_loss(second, truth)) / 4
        optimizer.update(loss)
    result: nn.Module = model.eval()
    return result


@torch.no_grad()
def measure_sam_teacher(model: Any, *, split: Split = "test", n: int = 512) -> dict[str, float]:
    """Mean IoU on crowds of the split: from one inner point, from the exact box, from the box and then a correction;

    of the best of three candidates by the predicted overlap; and of an untrained network from the box.
    """
    crowd = crowds(split, n=n, size=SIZE)
    masks = crowd.picture.instances > 0.5
    row, slot = (masks.flatten(2).sum(2) >= SMALLEST).nonzero(as_tuple=True)
    pixels, truth = standardise(as_bytes(crowd.picture.image)), masks[row, slot]
    boxes, points = bounding_box(truth), inner_point(truth)[:, None]
    labels = torch.ones(len(truth), 1, dtype=torch.long)
    embedding = torch.cat([model.vision_encoder(part).last_hidden_state for part in pixels.split(64)])[row]

    def score(found: Masks) -> float:
        rows = torch.arange(len(truth))
        best = found.full(SIZE)[rows, found.overlap.argmax(1)] > 0
        return intersection_over_union(best, truth).double().mean().item()

    once = answer(model, embedding, boxes=boxes)
    again = answer(model, embedding, boxes=boxes, points=points, labels=labels, masks=once.logits)
    fresh = build_sam_teacher(0).eval()
    unseen = torch.cat([fresh.vision_encoder(part).last_hidden_state for part in pixels.split(64)])[row]
    return {
        "iou_point": score(answer(model, embedding, points=points, labels=labels)),
        "iou_point_best_of_three": score(answer(model, embedding, points=points, labels=labels, several=True)),
        "iou_box": score(once),
        "iou_box_point_mask": score(again),
        "iou_box_untrained": score(answer(fresh, unseen, boxes=boxes)),
    }


def save_sam_teacher(model: Any, folder: Path) -> None:
    """transformers' files: `config.json`, fp16 weights, and the image processor's settings."""
    from transformers import SamImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    side, low = {"longest_edge": SIZE}, {"longest_edge": SIZE // PATCH * 4}
    square, small = {"height": SIZE, "width": SIZE}, {"height": SIZE // PATCH * 4, "width": SIZE // PATCH * 4}
    SamImageProcessor(size=side, mask_size=low, pad_size=square, mask_pad_size=small).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def load_sam_teacher(folder: Path) -> nn.Module:
    """In fp32, frozen."""
    from transformers import SamModel

    model: nn.Module = SamModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)
