"""Numbers equal open_clip's own functions and CLIP-benchmark's recall on the same weights; templates, names, decays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipgraft.checkpoint import write_export
from clipgraft.data.base import Sample
from clipgraft.data.folder import open_folder
from clipgraft.data.images import ImageFiles
from clipgraft.data.pairs import open_table
from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.evaluation.probe import Probe
from clipgraft.evaluation.retrieval import Retrieval
from clipgraft.evaluation.statistics import value
from clipgraft.evaluation.templates import class_names, prompt_templates
from clipgraft.evaluation.zero_shot import ZeroShot
from clipgraft.heads.linear_probe import DECAYS, LinearProbe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import tiny_clip

CLASSES = ("blue", "green", "orange", "purple", "red", "yellow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures in six classes, with captions beside them: one to four for each."""
    root, rows = tmp_path_factory.mktemp("references"), ["image,caption"]
    for index in range(48):
        path = root / "data" / CLASSES[index % 6] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=rng)  # coarse: a tiny tower sees it
        Image.fromarray(pixels.numpy()).resize((40, 36), Image.Resampling.NEAREST).save(path)
        for k in range(1 + index % 4):
            rows.append(f"data/{path.parent.name}/{path.name},a {CLASSES[(index + k) % 6]} star {index} of {k}")
    (root / "pairs.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The same weights in open_clip: model, transform, tokenizer."""
    import open_clip

    export = tmp_path_factory.mktemp("export") / "model"
    write_export(lively(), export)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{export}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{export}")


def lively() -> Encoder:
    """A tiny CLIP with large weights: its answers vary."""
    encoder = tiny_clip()
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return encoder


def pixels_of(source: ImageFiles, transform: Any) -> Tensor:
    return torch.stack([transform(Image.open(source.root / name)) for name in source.ids])


# -- open_clip and CLIP-benchmark --------------------------------------------------------------------------------------


def test_zero_shot_equals_open_clip_end_to_end(folder: Path, opened: tuple[Any, Any, Any]) -> None:
    import open_clip

    model, transform, tokenizer = opened
    source = open_folder(folder / "data")
    weights = open_clip.build_zero_shot_classifier(
        model, tokenizer, source.classes, open_clip.OPENAI_IMAGENET_TEMPLATES, num_classes_per_batch=3
    )
    features = EncoderFeatures(lively(), batch_size=50)
    own = features.classifier(source.classes, prompt_templates("openai-imagenet"))
    assert torch.allclose(own, weights.T, atol=1e-5, rtol=0)
    labels = torch.tensor([source.labels[name] for name in source.ids])
    with torch.no_grad():
        logits = 100 * model.encode_image(pixels_of(source, transform), normalize=True) @ weights
    expected = {k: float((logits.topk(k).indices == labels[:, None]).any(1).double().mean()) for k in (1, 5)}
    found = ZeroShot(templates="openai-imagenet")(features, source)
    assert found.metrics["top1"] == pytest.approx(expected[1], abs=1e-5)
    assert found.metrics["top5"] == pytest.approx(expected[5], abs=1e-5)
    assert [row["prediction"] for row in found.samples] == logits.argmax(1).tolist()
    assert len({row["prediction"] for row in found.samples}) > 2


def recall(scores: Tensor, right: Tensor, k: int) -> float:
    """CLIP-benchmark's recall as CLIP's papers report it: rows (q, g) with any right one among their k best."""
    best = scores.topk(k, dim=1).indices
    return float(right.gather(1, best).any(1).double().mean())


def test_recall_equals_clip_benchmark_end_to_end(folder: Path, opened: tuple[Any, Any, Any]) -> None:
    model, transform, tokenizer = opened
    source = open_table(folder / "pairs.csv")
    captions = [caption for name in source.ids for caption in source.captions[name]]
    owner = torch.tensor([k for k, name in enumerate(source.ids) for _ in source.captions[name]])
    with torch.no_grad():
        images = F.normalize(model.encode_image(pixels_of(source, transform)), dim=-1)
        texts = F.normalize(model.encode_text(tokenizer(captions)), dim=-1)
    scores, right = texts @ images.T, owner[:, None] == torch.arange(len(source))
    found = Retrieval()(EncoderFeatures(lively(), batch_size=16), source)
    assert len(captions) == found.counts["text_to_image_r1"][1] == 120
    for k in (1, 5, 10):
        assert found.metrics[f"text_to_image_r{k}"] == pytest.approx(recall(scores, right, k), abs=1e-5)
        assert found.metrics[f"image_to_text_r{k}"] == pytest.approx(recall(scores.T, right.T, k), abs=1e-5)
    assert found.metrics["text_to_image_r1"] < found.metrics["text_to_image_r10"] < 1


# -- templates and names -----------------------------------------------------------------------------------------------


def test_template_sets_are_open_clips() -> None:
    import open_clip

    for name, functions in (
        ("openai-imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        templates = prompt_templates(name)
        assert [t.replace("{}", "great auk") for t in templates] == [f("great auk") for f in functions]
    assert len(prompt_templates("openai-imagenet")) == 80 and prompt_templates(()) == ()
    assert prompt_templates(("one {}", "two {}")) == ("one {}", "two {}")


def test_template_files(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# ours\n\n  a photo of a {}.\nthe {} in art\n", "utf-8")
    assert prompt_templates(f"file:{file}") == ("a photo of a {}.", "the {} in art")
    source = open_folder(folder / "data")
    given, listed = (
        ZeroShot(templates=t)(EncoderFeatures(tiny_clip()), source)
        for t in (f"file:{file}", ("a photo of a {}.", "the {} in art"))
    )
    assert given == listed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("good {}\n\nno name here\n", "line 3: 'no name here' must hold {} once"),
        ("two {} {}\n", "line 1: 'two {} {}' must hold {} once"),
        ("# nothing\n", "holds no entry; write one per line"),
        (b"\xff\xfe\x00", "can't be read (not UTF-8 text)"),
        (None, "can't be read (No such file or directory)"),
    ],
)
def test_template_files_that_do_not_fit_are_one_line(text: Any, line: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=re.escape(line)) as caught:
        prompt_templates(f"file:{file}")
    assert "\n" not in str(caught.value)


def test_unknown_sets_name_those_there_are(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean openai-imagenet"):
        prompt_templates("openai-imagnet")
    source = open_folder(folder / "data")
    encoder = tiny_clip()
    encoder.image.register_forward_pre_hook(lambda module, args: pytest.fail("images were encoded before the check"))
    with pytest.raises(InputError, match="known: openai-imagenet, simple"):
        ZeroShot(templates="xyz")(EncoderFeatures(encoder), source)
    with pytest.raises(InputError, match=r"write file:names\.txt"):
        ZeroShot(classnames="names.txt")(EncoderFeatures(encoder), source)


def test_class_names(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"

    def names(text: str, classes: tuple[str, ...]) -> tuple[str, ...]:
        file.write_text(text, "utf-8")
        return class_names(f"file:{file}", classes, source="folder:x")

    coded = ("n01440764", "n01443537")
    assert names("tench\ngoldfish, Carassius auratus\n", coded) == ("tench", "goldfish, Carassius auratus")
    mapping = "n01443537 goldfish\n# fish\nn01440764 tench, Tinca tinca\nn99999999 not here\n"
    assert names(mapping, coded) == ("tench, Tinca tinca", "goldfish")
    assert names("b\tbee\na\tant\n", ("a", "b")) == ("ant", "bee")
    assert names("crane bird\njay bird\n", ("crane", "jay")) == ("crane bird", "jay bird")  # words, not codes
    assert class_names((), coded, source="x") == coded
    assert class_names(("tench", "goldfish"), coded, source="x") == ("tench", "goldfish")
    with pytest.raises(InputError, match="has 3 names for the 2 classes of folder:x; give one for each"):
        names("a\nb\nc\n", coded)
    with pytest.raises(InputError, match="has no name for n01443537, one of the classes of folder:x"):
        names("n01440764 tench\n", coded)
    with pytest.raises(InputError, match="classnames has 1 names for the 2 classes"):
        class_names(("tench",), coded, source="x")


def test_named_classes_are_what_they_are_called(folder: Path, tmp_path: Path) -> None:
    """Folders that aren't words, called by what they hold, measure what folders with these names measure."""
    coded = tmp_path / "data"
    for k, name in enumerate(CLASSES):
        (coded / f"n{k}").mkdir(parents=True)
        for file in (folder / "data" / name).iterdir():
            (coded / f"n{k}" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "names.txt").write_text("".join(f"n{k} {name}\n" for k, name in reversed(list(enumerate(CLASSES)))))
    plain = ZeroShot()(EncoderFeatures(tiny_clip()), open_folder(folder / "data"))
    called = ZeroShot(classnames=f"file:{tmp_path / 'names.txt'}")(EncoderFeatures(tiny_clip()), open_folder(coded))
    codes = ZeroShot()(EncoderFeatures(tiny_clip()), open_folder(coded))
    assert plain.metrics == called.metrics
    answers = [[row["prediction"] for row in found.samples] for found in (plain, called, codes)]
    assert answers[0] == answers[1] != answers[2]


def test_each_class_on_request(folder: Path) -> None:
    source, features = open_folder(folder / "data"), EncoderFeatures(tiny_clip())
    plain, found = ZeroShot()(features, source), ZeroShot(per_class=True)(features, source)
    each = {
        f"class/{name}": [row["top1"] for row in found.samples if row["label"] == k] for k, name in enumerate(CLASSES)
    }
    assert found.metrics == plain.metrics | {name: sum(hits) / 8 for name, hits in each.items()}
    assert {name: found.counts[name] for name in each} == {name: (sum(hits), 8) for name, hits in each.items()}
    assert found.statistics.keys() == found.metrics.keys() and found.samples == plain.samples
    assert len(set(found.metrics[name] for name in each)) > 1
    for name, statistic in found.statistics.items():
        assert value(statistic, found.samples) == pytest.approx(found.metrics[name], abs=1e-12)
    spread = evaluate(
        tiny_clip(), [f"zero-shot?per_class=true@folder:{folder / 'data'}"], registry=Registry.discover(allow=())
    )["core/zero-shot"]
    assert spread.intervals.keys() == found.metrics.keys()
    doubled = ZeroShot(per_class=True, classnames=("jay", "jay", "crane", "hen", "ox", "ox"))(features, source)
    assert {n for n in doubled.metrics if "/" in n} == {
        f"class/{n}" for n in ("jay 0", "jay 1", "crane", "hen", "ox 4", "ox 5")
    }
    assert doubled.metrics["class/jay 0"] == doubled.metrics["class/ox 5"] == 0  # called the same: always a tie


def test_equal_names_have_equal_embeddings_wherever_they_stand() -> None:
    names = ("cat", "a large blue square and a star", "dog", "cat", "small circle", "cat")
    found = EncoderFeatures(tiny_clip(), batch_size=2).classifier(
        names, ("{}", "a photo of a {}", "the {} on the right")
    )
    assert torch.equal(found[0], found[3]) and torch.equal(found[0], found[5])


@pytest.mark.parametrize("prompts", [3, 7, 2**16])
def test_classifiers_are_built_in_blocks(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipgraft.evaluation.features.PROMPTS", prompts)
    encoder, templates = tiny_clip(), ("{}", "a photo of a {}", "the small {} in the image on the left")
    with torch.no_grad():
        each = [encoder.text(encoder.tokenizer([t.replace("{}", name) for t in templates])).unit() for name in CLASSES]
    expected = F.normalize(torch.stack([rows.mean(0) for rows in each]), dim=-1)
    assert torch.allclose(EncoderFeatures(encoder, batch_size=4).classifier(CLASSES, templates), expected, atol=1e-6)


# -- retrieval: what can't be measured ---------------------------------------------------------------------------------


def test_missing_captions_and_images_are_one_line(folder: Path) -> None:
    features = EncoderFeatures(tiny_clip())
    with pytest.raises(InputError, match="has no caption; retrieval needs a csv: with a caption column"):
        Retrieval()(features, open_folder(folder / "data"))
    gone = folder / "gone.csv"
    gone.write_text("image,caption\nno/such.png,a cat\nnor/this.png,a dog\n")
    with pytest.raises(InputError, match=r"nothing that can be read: 2 of 2 .*no/such.png: missing file"):
        Retrieval()(features, open_table(gone))


# -- linear probe ------------------------------------------------------------------------------------------------------


class Numbers:
    """Features as numbers for a probe."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.y = x, labels
        self.rows = [Sample(f"s{i}", torch.empty(0), label=int(k)) for i, k in enumerate(labels)]

    def images(self, source: Any) -> Tensor:
        return self.x

    def samples(self, source: Any) -> list[Sample]:
        return self.rows

    def labels(self, source: Any) -> Tensor:
        return self.y


class Named:
    """All that a probe asks of a source."""

    name, attributes, classes = "numbers", dict[str, Any](), ("a", "b", "c")


def noisy(n: int = 150) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=rng)
    return torch.randn(n, 24, generator=rng) + 1.2 * F.one_hot(labels, 24), labels


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_the_sweep_takes_the_best_on_a_fifth_and_fits_to_all(solver: Any) -> None:
    x, labels = noisy()
    held = torch.arange(len(x)) % 5 == 0
    swept = LinearProbe(dim=24, classes=3, solver=solver).fit(x, labels)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    scores = []
    for decay in DECAYS:  # on features that are standardised already, by all rows
        probe = LinearProbe(dim=24, classes=3, solver=solver)
        probe.mean, probe.std = torch.zeros(24), torch.ones(24)
        solve = probe._lbfgs if solver == "lbfgs" else probe._ridge
        weight, bias = solve(z[~held].double(), labels[~held], decay)
        scores.append(float((F.linear(z[held].double(), weight, bias).argmax(1) == labels[held]).double().mean()))
    best = DECAYS[scores.index(max(scores))]
    assert len(set(scores)) > 1
    fixed = [LinearProbe(dim=24, classes=3, solver=solver).fit(x, labels, decay=decay) for decay in DECAYS]
    assert [torch.equal(swept.weight, probe.weight) for probe in fixed] == [decay == best for decay in DECAYS]


def test_l2_is_scikit_learns_penalty() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = noisy()
    for l2 in (0.3, 0.003):
        own = LinearProbe(dim=24, classes=3).fit(x, labels, decay=l2)
        z = ((x - own.mean) / own.std).double().numpy()
        theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(z, labels.numpy())
        assert torch.allclose(own.weight.double(), torch.from_numpy(theirs.coef_), atol=2e-3)


def test_test_labels_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels on the test half change what is right, never what was fitted."""
    x, labels = noisy()
    fitted: list[Tensor] = []
    fit = LinearProbe.fit

    def noted(self: LinearProbe, x: Tensor, labels: Tensor, **options: Any) -> LinearProbe:
        probe = fit(self, x, labels, **options)
        fitted.append(probe.weight)
        return probe

    monkeypatch.setattr(LinearProbe, "fit", noted)
    features: Any = Numbers(x, labels)
    source: Any = Named()
    found = Probe()(features, source)
    tested = [int(row["id"][1:]) for row in found.samples]
    other = labels.clone()
    other[tested] = (other[tested] + 1) % 3
    turned: Any = Numbers(x, other)
    again = Probe()(turned, source)
    assert torch.equal(*fitted) and again.metrics["label"] < found.metrics["label"]
    assert found == Probe(l2="sweep")(features, source)
    Probe(l2=100.0)(features, source)
    assert fitted[-1].norm() < fitted[0].norm() / 4
    with pytest.raises(ValueError, match="greater than 0"):
        Probe(l2=0)
