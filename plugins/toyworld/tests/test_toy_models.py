"""The shipped models: in stock formats, as the manifest says, small."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from clipgraft.errors import InputError
from clipgraft_toyworld.measure import album, measure, pair_outcomes, ridge_probe, statements
from clipgraft_toyworld.models import MODELS, folder, manifest, models_folder
from clipgraft_toyworld.pairs import minimal_pairs
from clipgraft_toyworld.tokenizer import encode
from clipgraft_toyworld.towers import load_clip, read_all, see_all, standardise
from clipgraft_toyworld.world import WORLD_VERSION

CLIPS = ("clip-0", "clip-1", "clip-2", "teacher")
SAMPLE = {"per_pattern": 48, "blocks": 3, "probes": False}


def test_hashes_and_sizes_match_the_manifest() -> None:
    document = manifest()
    assert document["world"] == WORLD_VERSION and set(document["models"]) == set(MODELS)
    total = 0
    for name, entry in document["models"].items():
        assert {file.name for file in folder(name).iterdir()} == set(entry["files"])
        for file, told in entry["files"].items():
            data = (folder(name) / file).read_bytes()
            assert hashlib.sha256(data).hexdigest() == told["sha256"] and len(data) == told["bytes"]
            total += len(data)
    assert total < 12_000_000
    assert not list(models_folder().rglob("*.bin")) + list(models_folder().rglob("*.pt"))


@pytest.mark.parametrize("name", CLIPS)
def test_stock_open_clip_opens_a_clip_and_agrees(name: str) -> None:
    import open_clip

    where = f"local-dir:{folder(name)}"
    clip, _, transform = open_clip.create_model_and_transforms(where)
    tokenizer = open_clip.get_tokenizer(where)
    clip.eval()
    texts = ["a photo of a red arrow", "blue moon upside down"]
    ids = tokenizer(texts)
    assert torch.equal(ids, encode(texts)) and ids.max() == clip.vocab_size - 1
    pixels = album("tune", blocks=1).pixels[:8]
    ours = load_clip(folder(name))
    with torch.no_grad():
        image = clip.encode_image(standardise(pixels), normalize=True)
        text = clip.encode_text(ids, normalize=True)
    assert torch.allclose(image, see_all(ours, pixels).pooled, atol=1e-5)
    assert torch.allclose(text, read_all(ours, texts), atol=1e-5)
    from PIL import Image

    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.allclose(transform(picture), standardise(pixels[:1])[0], atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_a_small_sample_reproduces_the_manifest(name: str) -> None:
    told = manifest()["models"][name]["metrics"]
    found = measure(load_clip(folder(name)), "test", **SAMPLE)
    for key, slack in {"zero_shot": 0.05, "pair": 0.07, "detail": 0.04, "blind": 0.08}.items():
        assert abs(found[key] - told[key]) < slack, key


def test_the_bases_are_blind_and_the_ceiling_is_high() -> None:
    told = {name: manifest()["models"][name]["metrics"] for name in CLIPS}
    for base in CLIPS[:3]:
        assert told[base]["zero_shot"] > 0.7 and told[base]["pair"] < 0.3 and told[base]["blind"] > 0.5
        assert told[base]["tokens"] > told[base]["probe"] + 0.1 and told[base]["oracle_pair"] > 0.9
    assert told["teacher"]["pair"] > 0.65 and told["teacher"]["zero_shot"] > 0.7


def test_the_bases_differ_in_both_towers() -> None:
    one, two = (load_clip(folder(name)).state_dict() for name in ("clip-0", "clip-1"))
    for key in ("visual.conv1.weight", "token_embedding.weight"):
        assert not torch.allclose(one[key], two[key], atol=0.01)
    teacher = load_clip(folder("teacher")).state_dict()
    base = load_clip(folder("clip-0")).state_dict()
    assert torch.equal(base["token_embedding.weight"], teacher["token_embedding.weight"])


def test_statistics_of_the_measures() -> None:
    features = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 2] > 0).long()
    noise = torch.randint(2, (600,), generator=torch.Generator().manual_seed(1))
    labels, truth = ({"sign": labels[rows], "noise": noise[rows]} for rows in (slice(0, 400), slice(400, 600)))
    found = ridge_probe(features[:400], features[400:], labels=labels, truth=truth)
    assert found["sign"] > 0.9 and 0.35 < found["noise"] < 0.65
    pairs = minimal_pairs("tune", per_pattern=8, size=32)
    table = statements(load_clip(folder("clip-0")))
    first = torch.stack(
        [
            table.details[name][pairs.first_scene.coarse()[i], pairs.first_scene.value(name)[i]]
            for i, name in told(pairs)
        ]
    )
    second = torch.stack(
        [
            table.details[name][pairs.second_scene.coarse()[i], pairs.second_scene.value(name)[i]]
            for i, name in told(pairs)
        ]
    )
    assert pair_outcomes(first, second, pairs, table).all()
    assert not pair_outcomes(second, first, pairs, table).any()
    assert not pair_outcomes(first, first, pairs, table).any()  # alike embeddings can't be right twice


def told(pairs):
    from clipgraft_toyworld.world import DETAILS

    return [(index, DETAILS[detail].name) for index, detail in enumerate(pairs.detail.tolist())]


def test_registered_encoders_open_in_the_framework() -> None:
    from clipgraft.types import FeatureRequest
    from clipgraft_toyworld.models import clip

    encoder = clip()
    pixels = album("tune", blocks=1).pixels[:4].float() / 255
    seen = encoder.image(encoder.preprocess.normalize(pixels), FeatureRequest(tokens=True))
    ours = see_all(load_clip(folder("clip-0")), album("tune", blocks=1).pixels[:4])
    assert torch.allclose(seen.unit(), ours.pooled, atol=1e-5)
    assert seen.tokens is not None and torch.allclose(seen.tokens, ours.tokens, atol=1e-4)
    assert encoder.data.origin.uri == "toyworld/clip"


def test_diffusers_opens_the_generators_and_the_condition_matters() -> None:
    diffusers = pytest.importorskip("diffusers")
    from clipgraft_toyworld.train_generator import bench, load_generator, sensitivity

    text = load_clip(folder("clip-0"))
    for name in ("generator", "generator-own"):
        flux = diffusers.FluxTransformer2DModel.from_pretrained(folder(name))
        assert flux.config.out_channels == 128
        tower = load_clip(folder(manifest()["models"][name]["recipe"]["tokens"]))
        found = sensitivity(load_generator(folder(name)), text, bench(tower, album("tune", blocks=1), n=256), n=256)
        assert found["all"] > 0.3 and found["loss"] < 1


def test_transformers_opens_the_text_teacher() -> None:
    transformers = pytest.importorskip("transformers")
    from clipgraft_toyworld.text_teacher import load_text_teacher, measure_text_teacher, understand

    place = str(folder("text-teacher"))
    model = transformers.AutoModel.from_pretrained(place, add_pooling_layer=False, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(place)(["a crimson ladle"], return_tensors="pt").input_ids
    ours = load_text_teacher(folder("text-teacher"))
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state.mean(1)
        assert torch.allclose(
            torch.nn.functional.normalize(mean, dim=-1), understand(ours, ["a crimson ladle"]), atol=1e-5
        )
    assert measure_text_teacher(ours, n=200)["reworded_to_plain"] > 0.5


def test_the_mask_teacher_outlines_objects() -> None:
    from clipgraft_toyworld.mask_teacher import measure_mask_teacher
    from clipgraft_toyworld.models import mask_teacher

    teacher = mask_teacher()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert measure_mask_teacher(teacher, n=64)["iou"] > 0.8


def test_the_sam_teacher_opens_in_transformers_and_follows_its_prompts() -> None:
    import transformers

    from clipgraft_toyworld.models import sam_teacher
    from clipgraft_toyworld.sam_teacher import measure_sam_teacher

    place = folder("sam-teacher")
    stock = transformers.SamModel.from_pretrained(place, dtype=torch.float32)
    teacher = sam_teacher()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), teacher.parameters(), strict=True))
    found = measure_sam_teacher(teacher, n=48)
    assert found["iou_point"] > 0.75 and found["iou_box"] > 0.75
    assert found["iou_box"] > found["iou_box_untrained"] + 0.4
    # one picture, two prompts: each object gets its own mask
    processor = transformers.SamImageProcessor.from_pretrained(place)
    from clipgraft_toyworld.crowds import crowds
    from clipgraft_toyworld.pairs import as_bytes
    from clipgraft_toyworld.prompts import inner_point, intersection_over_union

    picture = crowds("tune", n=1, size=64).picture
    pixels = processor(as_bytes(picture.image)[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    truth = picture.instances[0, :2] > 0.5
    out = stock(pixel_values=pixels, input_points=inner_point(truth)[None, :, None], multimask_output=False)
    found_masks = torch.nn.functional.interpolate(out.pred_masks[0], size=(64, 64), mode="bilinear")[:, 0] > 0
    overlaps = intersection_over_union(found_masks[:, None], truth[None])
    assert overlaps.diagonal().min() > 0.6 and overlaps[0, 1] < 0.2 and overlaps[1, 0] < 0.2


def test_an_unknown_model_is_refused_with_close_names() -> None:
    with pytest.raises(InputError, match="clip-0"):
        folder("clip0")


def test_the_manifest_is_plain_json() -> None:
    text = (models_folder() / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == manifest() and "NaN" not in text
