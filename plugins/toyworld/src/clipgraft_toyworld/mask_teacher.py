"""The mask teacher: a small U-Net that outlines objects of any kind, as a segmentation foundation model would."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft_toyworld.crowds import crowds
from clipgraft_toyworld.pairs import as_bytes
from clipgraft_toyworld.schedule import Optimizer
from clipgraft_toyworld.towers import IMAGE_SIZE, standardise

STEPS, BATCH, POOL = 160, 64, 8192
WEIGHTS = "model.safetensors"


def _stage(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.GELU())


class MaskTeacher(nn.Module):
    """Standardised pixels (B, 3, S, S), S a multiple of 4 -> logits (B, S, S) of "an object is here"."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.middle, self.coarse = _stage(3, 24), _stage(24, 48, stride=2), _stage(48, 64, stride=2)
        self.up_middle, self.up_fine = _stage(64 + 48, 48), _stage(48 + 24, 24)
        self.out = nn.Conv2d(24, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        fine = self.fine(pixels)
        middle = self.middle(fine)
        up = F.interpolate(self.coarse(middle), scale_factor=2.0)
        up = F.interpolate(self.up_middle(torch.cat([up, middle], 1)), scale_factor=2.0)
        result: Tensor = self.out(self.up_fine(torch.cat([up, fine], 1)))[:, 0]
        return result


def train_mask_teacher(*, seed: int, steps: int = STEPS) -> MaskTeacher:
    """Trained on masks of crowds."""
    torch.manual_seed(seed)
    crowd = crowds("train", n=POOL, size=IMAGE_SIZE, seed=seed)
    pixels = as_bytes(crowd.picture.image)
    target = (crowd.picture.semantics > 0).float()
    teacher = MaskTeacher()
    optimizer = Optimizer([teacher], steps=steps, lr=4e-3, warmup=10)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (BATCH,))
        logits = teacher(standardise(pixels[rows]))
        optimizer.update(F.binary_cross_entropy_with_logits(logits, target[rows]))
    return teacher.eval()


@torch.no_grad()
def measure_mask_teacher(teacher: MaskTeacher, *, n: int = 512) -> dict[str, float]:
    """Mean intersection over union of the foreground on the test split."""
    crowd = crowds("test", n=n, size=IMAGE_SIZE)
    found = teacher(standardise(as_bytes(crowd.picture.image))) > 0
    truth = crowd.picture.semantics > 0
    both, either = (found & truth).flatten(1).sum(1), (found | truth).flatten(1).sum(1)
    return {"iou": (both / either.clamp(min=1)).double().mean().item()}


def save_mask_teacher(teacher: MaskTeacher, folder: Path) -> None:
    """Weights in fp16."""
    from clipgraft.files import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: value.half() for name, value in teacher.state_dict().items()})


def load_mask_teacher(folder: Path) -> MaskTeacher:
    """In fp32, frozen."""
    from safetensors.torch import load_file

    teacher = MaskTeacher()
    teacher.load_state_dict({k: v.float() for k, v in load_file(str(folder / WEIGHTS)).items()})
    return teacher.eval().requires_grad_(False)
