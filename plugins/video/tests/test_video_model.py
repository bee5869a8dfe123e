"""Video models on tiny CLIPs: what they compute, train, export and measure, and the commands on real video files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from clipgraft.checkpoint import write_export
from clipgraft.config.schema import TrainConfig
from clipgraft.data import open_source
from clipgraft.errors import InputError
from clipgraft.registry import current
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_video.commands import app
from clipgraft_video.evaluate import Views, classify, retrieve
from clipgraft_video.heads import Mean
from clipgraft_video.mixing import Mixing
from clipgraft_video.model import VideoModel, open_video_model
from clipgraft_video.stage import Seen, VideoStage
from clipgraft_video.vifi.recipe import choose

SIZE = 32
TRAIN = TrainConfig(steps=2, batch_size=2, lr=1e-3)


def clips(n: int = 2, frames: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, frames, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for k in range(4):
            write_video(root / name / f"{name} {k}.mp4", 12 + k)
    return root


def test_frames_pass_the_tower_as_a_batch() -> None:
    model, x = VideoModel(tiny_clip()).eval(), clips()
    found = model(x)
    each = torch.stack([model(x[:, t : t + 1]).frames[:, 0] for t in range(3)], 1)
    assert torch.allclose(found.frames, each, atol=1e-6) and torch.allclose(found.pooled, each.mean(1), atol=1e-6)
    assert torch.allclose(model(x.float() / 255).pooled, found.pooled, atol=1e-6)
    still = model(x[:, :1].expand(-1, 3, -1, -1, -1))
    assert torch.allclose(still.unit(), model(x[:, :1]).unit(), atol=1e-6)


def test_other_sizes_and_shapes_are_refused() -> None:
    model = VideoModel(tiny_clip())
    with pytest.raises(InputError, match="write size=32 into the data reference"):
        model(torch.zeros(1, 2, 3, 16, 16))
    with pytest.raises(InputError, match=r"expected clips \(B, T, 3, S, S\)"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("trained", ["both", "image", "text"])
def test_what_vifi_clip_trains(trained: Any) -> None:
    encoder = choose(tiny_clip(), trained)
    learns = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert "text.tower.token_embedding.weight" not in learns
    assert ("logit_scale" in learns) == (trained == "both")
    assert any(name.startswith("image.") for name in learns) == (trained != "text")
    assert any(name.startswith("text.") for name in learns) == (trained != "image")


def test_vifi_clips_counts_for_vit_b_16() -> None:
    import open_clip

    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    image = sum(p.numel() for p in model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    both = total - model.token_embedding.weight.numel()
    assert (image, both, total) == (86_192_640, 124_323_841, 149_620_737)
    assert both - image - 1 == 38_131_200  # text, without the scale


def stage(model: VideoModel, **settings: Any) -> VideoStage:
    return VideoStage("videos", train=TRAIN, source=_Source(), model=model, **settings)


class _Source:
    """Two classes, nothing to read."""

    name, fingerprint = "two", "two"
    classes, templates, attributes = ("cat", "dog"), (), {}

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def batch(model: VideoModel, n: int = 4) -> Batch:
    frames = clips(n)
    text = model.encoder.tokenizer([f"a {w}" for w in ("cat", "dog", "car", "star")][:n])
    return Batch(
        frames[:, 1].float() / 255, [str(k) for k in range(n)], text, torch.arange(n) % 2, extra={"frames": frames}
    )


@pytest.mark.parametrize("objective", ["classes", "labels", "captions"])
def test_a_step_gives_gradients_where_they_belong(objective: Any) -> None:
    model = VideoModel(choose(tiny_clip(), "both"))
    one = stage(model, objective=objective, prompts=[["a cat"], ["a dog"]], mixing=Mixing(mixup=0.8, cutmix=1.0))
    out = one(batch(model))
    out.loss.backward()
    assert torch.isfinite(out.loss) and one.batch_coupled == (objective != "classes")
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and model.encoder.text.tower.token_embedding.weight.grad is None


def test_the_loss_of_classes_is_cross_entropy_over_all_of_them() -> None:
    model = VideoModel(tiny_clip().requires_grad_(False)).eval()
    one, given = stage(model, prompts=[["a cat"], ["a dog"]]), batch(model)
    out, texts = one(given), model.texts(["a cat", "a dog"])
    scores = model.encoder.logit_scale.exp() * model(given.extra["frames"]).unit() @ texts.T
    assert torch.allclose(out.loss, F.cross_entropy(scores, given.labels), atol=1e-5)
    chosen = ("a cat", "a dog")
    assert one.texts(chosen) is one.texts(chosen)  # nothing in the text tower is trained: read once


class Three(torch.nn.Module):
    """A term of the loss that is always three."""

    def forward(self, seen: Seen) -> dict[str, torch.Tensor]:
        assert seen.chosen == ("cat", "dog") and seen.clips.shape == (4, 3, 3, SIZE, SIZE)
        return {"loss": seen.video.pooled.sum() * 0 + 3}


def test_more_terms_add_to_the_loss_with_their_weights() -> None:
    model = VideoModel(tiny_clip())
    plain, given = stage(model, prompts=[["cat"], ["dog"]]).eval(), batch(model)
    more = stage(model, prompts=[["cat"], ["dog"]], terms={"x": (2.0, Three())}).eval()
    assert torch.allclose(more(given).loss, plain(given).loss + 6, atol=1e-5)


def test_an_export_brings_its_head_back(tmp_path: Path) -> None:
    model = VideoModel(tiny_clip(), Mean("mean_norm"))
    write_export(model.encoder, tmp_path / "export", components={"video-head": model.head})
    again = open_video_model(str(tmp_path / "export"), registry=current())
    assert isinstance(again.pooling, Mean) and again.pooling.pool == "mean_norm"
    assert torch.allclose(again(clips()).pooled, model.eval()(clips()).pooled, atol=1e-6)


def test_classification_with_views_counts_every_video(folder: Path) -> None:
    model = VideoModel(tiny_clip()).eval()
    source = open_source(f"video:{folder}?frames=2&size=32")
    once, many = classify(model, source, workers=0), classify(model, source, views=Views(2, 3), workers=0)
    assert once.counts["top1"][1] == many.counts["top1"][1] == 8 and len(once.samples) == 8
    assert once.metrics["top1"] == sum(bool(row["top1"]) for row in once.samples) / 8


def test_retrieval_ranks_count_ties_once(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    rows = ["video,caption"]
    for k in range(4):
        write_video(tmp_path / f"{k}.mp4", 8, codec="libx264")
        rows.append(f"{k}.mp4,a {('cat', 'dog', 'car', 'star')[k]}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    source = open_source(f"video:{tmp_path}/list.csv?frames=2&size=32")
    found = retrieve(VideoModel(tiny_clip()).eval(), source, workers=0)
    assert found.counts["text_to_video_r1"][1] == 4  # queries with ties are not counted twice
    assert found.metrics["text_to_video_median_rank"] == 4.0  # four equal videos: every tie counts against the model
    assert {"video_to_text_r1", "recall_sum", "video_to_text_mean_rank"} <= found.metrics.keys()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_export(tiny_clip(), tmp_path_factory.mktemp("model") / "export"))


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), catch_exceptions=True)


def test_classify_and_search_a_folder(folder: Path, model_folder: str) -> None:
    common = [model_folder, "--videos", str(folder), "--frames", "2", "--json"]
    done = run("classify", *common, "--labels", "cat,dog", "--top", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["videos"]) == 8 and [len(v["labels"]) for v in found["videos"]] == [2] * 8
    assert all(abs(sum(f["probability"] for f in v["labels"]) - 1) < 1e-5 for v in found["videos"])
    done = run("search", *common, "--query", "a cat", "--query", "a dog", "--top", "3")
    assert done.exit_code == 0 and [len(v) for v in json.loads(done.stdout)["queries"].values()] == [3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels", "cat"), "is no file; give one, or names with commas"),
        (("--labels", "cat,cat"), "two different names or more"),
        (("--labels", "cat,dog", "--rule", "tns"), "did you mean tsn"),
        (("--labels", "cat,dog", "--videos", "absent"), "no such file or folder"),
    ],
)
def test_classify_refuses_what_it_can_not_use(
    folder: Path, model_folder: str, words: tuple[str, ...], message: str
) -> None:
    given = words if "--videos" in words else ("--videos", str(folder), *words)
    done = run("classify", model_folder, *given)
    assert isinstance(done.exception, InputError) and message in str(done.exception)


def test_eval_of_splits_and_halves_and_the_rule_against_leaks(folder: Path, model_folder: str) -> None:
    ref = f"video:{folder}?frames=2&size=32"
    done = run("eval", model_folder, "--data", ref, "--data", f"{ref}&rule=uniform", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["results"]) == 2 and {"mean top1", "std top1"} <= found["summary"].keys()
    done = run("eval", model_folder, "--data", ref, "--train", ref)
    assert isinstance(done.exception, InputError) and "8 of 8 test videos were trained on" in str(done.exception)
    done = run("eval", model_folder, "--data", ref, "--crops", "2")
    assert "crops is 1 or 3" in str(done.exception)


def test_base_to_novel_reports_the_harmonic_mean(
    tmp_path: Path, write_video: Callable[..., Path], model_folder: str
) -> None:
    for name in ("car", "cat", "dog", "star"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", 8)
    done = run(
        "eval", model_folder, "--data", f"video:{tmp_path}?size=32&frames=2", "--protocol", "base-to-novel", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["summary"].keys() == {"base", "novel", "harmonic_mean"}
