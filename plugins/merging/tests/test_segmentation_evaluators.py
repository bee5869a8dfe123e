"""The evaluators and the command as users call them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipgraft.data.base import BadSample, Sample
from clipgraft.encoders.base import Encoder, Preprocess
from clipgraft.errors import InputError
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip
from clipgraft_merging.sam.opening import sam_parts
from clipgraft_merging.sam.segmenter import Segmenter
from clipgraft_merging.sam.settings import Decoder, Prompt, SamSettings, Vision
from clipgraft_merging.segmentation.labelling import ReadingConfig
from clipgraft_merging.segmentation.overlap import IGNORE
from clipgraft_merging.segmentation.patches import patch_embeddings
from clipgraft_merging.segmentation.pipeline import MaskedZeroShotSegmentation
from clipgraft_merging.segmentation.prompted import PromptedMasks, prompted
from clipgraft_merging.segmentation.proposals import ProposalConfig, proposals
from clipgraft_merging.segmentation.zero_shot import ZeroShotSegmentation


class Made:
    """n pictures of noise; truth is what ``encoder`` says of them at its native size, so that it must be right."""

    templates: Sequence[str] = ("a photo of a {}",)
    attributes: Mapping[str, Sequence[str]] = {}
    name, fingerprint = "made", "made"
    segments: Sequence[str] = ("cat", "dog", "car")
    classes: Sequence[str] = ()

    def __init__(self, encoder: Encoder, n: int, *, bad: int = -1) -> None:
        self.n, self.bad = n, bad
        words = EncoderFeatures(encoder).classifier(self.segments, self.templates)
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            maps = patch_embeddings(encoder.image, encoder.preprocess.normalize(self.pixels / 255)).map()
        scores = torch.einsum("bdhw,kd->bkhw", torch.nn.functional.normalize(maps, dim=1), words)
        scores = torch.nn.functional.interpolate(scores, size=(32, 32), mode="bilinear", align_corners=False)
        self.truth = 1 + scores.argmax(1)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        if index == self.bad:
            raise BadSample(str(index), "made so")
        semantics = self.truth[index].to(torch.uint8).clone()
        semantics[0, :8] = IGNORE
        return Sample(str(index), self.pixels[index], extra={"semantics": semantics})


def small_sam() -> Segmenter:
    """A random SAM of 32 pixels."""
    vision = Vision(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                    patch_size=8, window_size=2, global_attn_indexes=(1,), num_pos_feats=8)  # fmt: skip
    prompt = Prompt(hidden_size=16, image_size=32, patch_size=8, mask_input_channels=4)
    decoder = Decoder(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    torch.manual_seed(0)
    parts = sam_parts(SamSettings(vision=vision, prompt=prompt, decoder=decoder).model())
    return Segmenter(parts.tower, parts.promptable, preprocess=parts.preprocess).eval()


def test_a_model_that_made_the_truth_is_right_everywhere_and_another_is_not() -> None:
    encoder = tiny_clip(0)
    source = Made(encoder, 6, bad=2)
    encoder.train()
    found = ZeroShotSegmentation(per_class=True, batch_size=2)(EncoderFeatures(encoder), source)
    assert encoder.training and encoder.image.training
    assert found.metrics["miou"] == found.metrics["pixel_accuracy"] == 1 and found.metrics["skipped"] == 1
    assert [row["id"] for row in found.samples] == ["0", "1", "3", "4", "5"]
    assert all(row["pixels"] == 32 * 32 - 8 for row in found.samples)
    other = ZeroShotSegmentation()(EncoderFeatures(tiny_clip(3)), source)
    assert other.metrics["miou"] < 0.8


def test_batches_do_not_matter() -> None:
    encoder, other = tiny_clip(0), tiny_clip(3)
    source = Made(encoder, 5)
    one, many = (
        ZeroShotSegmentation(batch_size=size, size=48, dense="value")(EncoderFeatures(other), source) for size in (1, 4)
    )
    assert one.samples == many.samples


def test_what_is_missing_is_named() -> None:
    encoder = tiny_clip(0)
    source = Made(encoder, 2)
    features = EncoderFeatures(encoder)
    source.segments = ("cat",)
    with pytest.raises(InputError, match="holds label"):
        ZeroShotSegmentation()(features, source)
    source.segments = ()
    with pytest.raises(InputError, match="give classes"):
        ZeroShotSegmentation()(features, source)
    with pytest.raises(InputError, match="no promptable masks"):
        PromptedMasks()(features, source)
    with pytest.raises(InputError, match="name a SAM"):
        MaskedZeroShotSegmentation(classes=("a", "b", "c"))(features, source)
    source.truth = torch.zeros(2, 16, 16).long()
    with pytest.raises(InputError, match="must have one size"):
        ZeroShotSegmentation(classes=("a", "b", "c"))(features, source)


def test_a_box_prompt_is_moved_to_the_towers_pixels() -> None:
    model, truth = small_sam(), torch.zeros(1, 64, 128, dtype=torch.bool)
    truth[0, 16:48, 32:64] = True
    seen: dict[str, torch.Tensor] = {}

    def masks(features, *, multimask, **given):  # type: ignore[no-untyped-def]
        seen.update(given)
        return Segmenter.masks(model, features, **given, multimask=multimask)

    model.masks = masks  # type: ignore[method-assign]
    found = prompted(model, torch.randn(1, 16, 4, 4), truth, side=32, prompt="box", multimask=False)
    assert found.shape == truth.shape
    # edges at pixel 32 of 128 and 64 of 128 lie at 8 and 16 of 32; the last pixel's centre half a (large) pixel inside
    assert torch.allclose(seen["boxes"][0, 0], torch.tensor([7.625, 7.75, 15.375, 23.25]))


def test_proposals_are_distinct_masks_within_the_limits() -> None:
    settings = ProposalConfig(grid=4, quality=0, stability=0, smallest=0.01, largest=0.9, overlap=0.5)
    model = small_sam()
    found = proposals(model, torch.rand(1, 3, 32, 32), (48, 40), settings)
    share = found.masks.flatten(1).float().mean(1)
    assert found.masks.shape[1:] == (48, 40) and ((share >= 0.01) & (share <= 0.9)).all()
    assert found.quality.tolist() == sorted(found.quality.tolist(), reverse=True)
    assert not len(proposals(model, torch.rand(1, 3, 32, 32), (8, 8), ProposalConfig(quality=1)).masks)


def test_a_crop_shows_the_box_with_its_margin_and_grey_outside() -> None:
    from clipgraft_merging.segmentation.pictures import Frame

    encoder = tiny_clip(0)
    picture = torch.zeros(3, 20, 20, dtype=torch.uint8)
    picture[:, :10, :10] = 255
    frame = Frame(Sample("a", torch.empty(0)), picture, (20, 20))
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, :10, :10] = True
    crop = MaskedZeroShotSegmentation(margin=0)._crops(frame, mask, encoder)
    assert crop.shape == (1, 3, 32, 32) and crop.min() > 0.99
    masked = MaskedZeroShotSegmentation(margin=0.5, naming="masked-crop")._crops(frame, mask, encoder)
    assert masked[0, :, 14:18, 14:18].min() > 0.99  # the object is in the middle
    assert torch.allclose(masked[0, :, -2, -2], torch.tensor(encoder.preprocess.mean), atol=0.02)


TOY = "toyworld/crowds?split=tune&n=6&size=64"


@pytest.fixture(scope="module")
def toy() -> Registry:
    pytest.importorskip("clipgraft_toyworld")
    return Registry.discover()


def test_a_sam_follows_prompts_and_its_masks_name_objects_better_than_patches(toy: Registry) -> None:
    from clipgraft import evaluation
    from clipgraft.encoders import load

    sam = "sam=toyworld/sam-teacher"
    nodes = [
        f"merging/prompted-masks?{sam}&against=toyworld/sam-teacher@{TOY}",
        f"merging/masked-zero-shot-seg?{sam}@{TOY}",
        f"merging/zero-shot-seg?dense=value&refine={{{sam.replace('=', ': ')}}}@{TOY}",
    ]
    found = evaluation.evaluate(load("toyworld/clip", registry=toy), nodes, registry=toy)
    masks, pipeline, patches = found.values()
    assert masks.metrics["iou"] > 0.8 and masks.metrics["agreement"] == pytest.approx(1)
    assert masks.metrics["reference"] == masks.metrics["iou"] and masks.metrics["objects"] == 12
    assert pipeline.metrics["miou"] > patches.metrics["miou"] + 0.1
    assert "miou" in pipeline.intervals and "iou" in masks.intervals


def test_the_command_writes_labels_overlays_a_sheet_and_a_page(toy: Registry, tmp_path: Path) -> None:
    from clipgraft_merging.commands import app

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(pictures / "a <b>.png")
    out = tmp_path / "out"
    given = ["segment", "toyworld/clip", "--images", str(pictures), "--classes", "red moon,blue tee", "--out", str(out)]
    result = CliRunner().invoke(app, [*given, "--json", "--background", "threshold", "--threshold", "0.6"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["classes"] == ["red moon", "blue tee"] and document["pictures"][0]["id"] == "a <b>.png"
    label = Image.open(next((out / "labels/toyworld-clip").glob("*.png")))
    assert label.mode == "P" and label.size == (60, 40) and np.asarray(label).max() <= 2
    assert len(list((out / "overlays").rglob("*.png"))) == 2 and (out / "sheet.png").is_file()
    page = (out / "index.html").read_text()
    assert "a &lt;b&gt;.png" in page and "red moon" in page and 'src="overlays/' in page
    for more, said in ((["--data", TOY], "either"), (["toyworld/clip"], "list each once")):
        again = CliRunner().invoke(app, [*given, *more])
        assert isinstance(again.exception, InputError) and said in str(again.exception)
    bare = CliRunner().invoke(app, [*given[:4], "--out", str(out)])
    assert isinstance(bare.exception, InputError) and "classes" in str(bare.exception)


def test_the_reader_names_what_it_cannot_read() -> None:
    with pytest.raises(InputError, match="set dense to last"):
        ReadingConfig(dense="value").reader(_with_odd_attention())


def _with_odd_attention() -> Encoder:
    encoder = tiny_clip(0)
    encoder.image.tower.transformer.resblocks[-1].attn = torch.nn.Identity()
    return encoder


def _shared(n: int) -> list[dict[str, object]]:
    encoder = tiny_clip(0)
    source = Made(encoder, n, bad=4)
    found = ZeroShotSegmentation(batch_size=2)(EncoderFeatures(tiny_clip(3)), source)
    return [*map(dict, found.samples), dict(found.metrics)]


@pytest.mark.slow
def test_two_processes_have_the_rows_of_one() -> None:
    from clipgraft.testing.ranks import run_ranks

    one, both = _shared(7), run_ranks(_shared, 2, 7)
    assert both[0] == both[1] and [row["id"] for row in one[:-1]] == [row["id"] for row in both[0][:-1]]
    assert both[0][-1] == pytest.approx(one[-1]) and one[-1]["skipped"] == 1


def test_preprocess_of_frames_never_crops() -> None:
    from clipgraft_merging.segmentation.pictures import Frame

    picture = torch.zeros(3, 10, 30, dtype=torch.uint8)
    picture[:, :, -3:] = 255
    frame = Frame(Sample("a", torch.empty(0)), picture, (10, 30))
    pixels = frame.pixels(Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", "shortest"), (16, 16))
    assert pixels.shape == (3, 16, 16) and pixels[:, :, -1].min() > 0.9 and pixels[:, :, 0].max() < 0.1
