"""Long-CLIP from captions to an export: two captions per image, the step, a run, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.checkpoint import open_export, write_export
from clipgraft.config.schema import TrainConfig
from clipgraft.data import open_source
from clipgraft.encoders.tokenizers import BpeTokenizer
from clipgraft.errors import InputError, Interrupted
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.stage import ContrastiveStage
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_llm.longclip.components import matching, primary_components
from clipgraft_llm.longclip.config import PcmConfig
from clipgraft_llm.longclip.graft import StretchPositions
from clipgraft_llm.longclip.stage import LongClipStage
from clipgraft_llm.longclip.two_captions import look, short_caption, two_captions

torch.set_num_threads(1)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
TAIL = "it lies on a table. there is nothing beside it. the light comes from the left"


def clip(seed=0):
    encoder = tiny_clip(seed, context=20, vocab=49408, width=16, depth=1).eval()
    encoder.data.tokenizer = BpeTokenizer(20)
    del encoder.data.model_config["text_cfg"]["hf_tokenizer_name"]
    with torch.no_grad():
        encoder.logit_scale.fill_(3.0)
    return encoder


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_export(clip(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A table of long captions, one of two captions each, and one without captions."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    long, two, labels = ["image,caption"], ["image,caption"], ["image,label"]
    for k in range(32):
        name = list(COLOURS)[k % 4]
        pixels = np.clip(rng.normal(COLOURS[name], 40, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{k}.png")
        long.append(f'{k}.png,"a {name} square. {TAIL} of square {k}"')
        two += [f'{k}.png,"a {name} square, {TAIL}"', f"{k}.png,{name} thing"]
        labels.append(f"{k}.png,{name}")
    for file, rows in (("long.csv", long), ("two.csv", two), ("labels.csv", labels)):
        (root / file).write_text("\n".join(rows) + "\n")
    return root


def settings(base, pictures, **more):
    return {
        "model.from": str(base), "data.from": f"csv:{pictures}/long.csv", "train.steps": 3, "train.batch_size": 16,
        "train.lr": 1e-3, "train.log_every": 1, "train.warmup": 0, "pcm.components": 4, "threads": 1,
        "grafts": [{"use": "llm/stretch-positions", "keep": 6, "ratio": 4}], "evaluate.retention": "none", **more,
    }  # fmt: skip


def test_the_short_caption_is_the_first_sentence_or_the_second_caption():
    assert short_caption(("A cat. It sleeps. Long.",), "first-sentence") == "A cat"
    assert short_caption(("A cat of 3.5 kg sleeps",), "first-sentence") == "A cat of 3.5 kg sleeps"
    assert short_caption(("long", "short", "other"), "second") == "short"
    assert short_caption(("long",), "second") is None and short_caption((), "first-sentence") is None


def test_a_sample_has_the_long_caption_and_the_ids_of_the_short_one(pictures):
    tokenizer = BpeTokenizer(62)
    source = open_source(f"csv:{pictures}/long.csv")
    both = two_captions(source, tokenizer=tokenizer, short="first-sentence")
    sample = both[5]
    assert sample.captions == source[5].captions and sample.caption_weights == ()
    assert torch.equal(sample.extra["short"], tokenizer(["a green square"])[0])
    assert both.fingerprint != source.fingerprint and len(both) == 32 and both.entry(5).file == "5.png"
    assert both.content(5) == (pictures / "5.png").read_bytes()
    second = two_captions(open_source(f"csv:{pictures}/two.csv"), tokenizer=tokenizer, short="second")
    assert len(second[0].captions) == 1 and torch.equal(second[0].extra["short"], tokenizer(["red thing"])[0])


def test_what_is_cut_is_counted_before_training(pictures):
    source = open_source(f"csv:{pictures}/long.csv")
    found = look(source, tokenizer=BpeTokenizer(20), short="first-sentence")
    full = [len(BpeTokenizer(77)([source[k].captions[0]])[0].nonzero()) for k in range(32)]
    assert (found.count, found.cut, found.single, found.problem) == (32, 32, 0, "")
    assert found.longest == max(full) and found.lost == sum(full) - 20 * 32
    assert "32 are cut" in str(found)
    assert look(source, tokenizer=BpeTokenizer(62), short="first-sentence").cut == 0
    assert "needs two" in look(source, tokenizer=BpeTokenizer(20), short="second").problem


def stage_of(pictures, *, encoder=None, **more):
    encoder = encoder or StretchPositions(keep=6).apply(clip())
    source = two_captions(open_source(f"csv:{pictures}/long.csv"), tokenizer=encoder.tokenizer, short="first-sentence")
    train = TrainConfig(steps=10, batch_size=8, lr=0.5, weight_decay=0.1, schedule="constant")
    kwargs = {"pcm": PcmConfig(components=3), **more}
    return LongClipStage("long", train=train, source=source, encoder=encoder, **kwargs)


def batch_of(stage, n=8):
    rows = [stage.source[k] for k in range(n)]
    pixels = torch.stack([torch.from_numpy(np.asarray(row.image).copy()).permute(2, 0, 1) / 255 for row in rows])
    ids = stage.encoder.tokenizer([row.captions[0] for row in rows])
    short = torch.stack([row.extra["short"] for row in rows])
    return Batch(pixels=pixels, ids=[row.id for row in rows], text=ids, extra={"short": short})


def test_the_step_is_both_losses_with_one_scale(pictures):
    stage = stage_of(pictures, pcm=PcmConfig(components=3, weight=0.5), smoothing=0.1)
    batch = batch_of(stage)
    assert not [name for name in stage.state_dict() if not name.startswith("encoder.")]
    assert isinstance(stage, ContrastiveStage) and stage.training_crop is None
    with torch.no_grad():
        output, (image, long, short) = stage(batch), [torch.nn.functional.normalize(f) for f in stage.encode(batch)]
    scale = math.exp(3)
    whole = matching(image, long, scale=scale, smoothing=0.1)
    reduced = matching(primary_components(image, count=3), short, scale=scale, smoothing=0.1)
    assert float(output.terms["long"]) == pytest.approx(float(whole), abs=1e-5)
    assert float(output.terms["short"]) == pytest.approx(float(reduced), abs=1e-5)
    assert float(output.loss) == pytest.approx(float(whole + 0.5 * reduced), abs=1e-5)
    plain = stage_of(pictures, pcm=PcmConfig(components=None))
    kept = matching(image, short, scale=scale)
    assert float(plain(batch).terms["short"].detach()) == pytest.approx(float(kept), abs=1e-5)
    assert abs(float(kept - matching(primary_components(image, count=3), short, scale=scale))) > 1e-4
    alone = stage_of(pictures, pcm=PcmConfig(weight=0))
    assert set(alone(batch).terms) == {"long"} and len(alone.encode(batch)) == 2


def test_everything_gets_a_gradient_but_the_kept_rows(pictures):
    stage = stage_of(pictures)
    stage(batch_of(stage)).loss.backward()
    assert all(p.grad is not None for p in stage.parameters())
    rows = stage.encoder.text.tower.parametrizations.positional_embedding
    assert rows[0].kept.grad is None and rows[0].kept.shape == (6, 16) and rows.original.grad.abs().sum() > 0


def test_the_papers_decay_shrinks_norms_biases_and_scale_too(pictures):
    names = ("encoder.logit_scale", "encoder.text.tower.ln_final.weight")
    for decay_all in (False, True):
        stage = stage_of(pictures, decay_all=decay_all, scale=100.0, max_scale=None)
        before = {name: p.detach().clone() for name, p in stage.named_parameters()}
        assert before[names[0]].item() == pytest.approx(math.log(100))
        stage.after_update(3)
        after = dict(stage.named_parameters())
        for name in names:
            assert torch.allclose(after[name], before[name] * (1 - 0.5 * 0.1 * decay_all))
        matrix = "encoder.text.tower.token_embedding.weight"
        assert torch.equal(after[matrix], before[matrix])


def test_the_scale_is_clamped_unless_told_otherwise(pictures):
    for most, expected in ((100.0, math.log(100)), (None, 6.0)):
        stage = stage_of(pictures, max_scale=most)
        with torch.no_grad():
            stage.encoder.logit_scale.fill_(6.0)
        stage.after_update(0)
        assert stage.encoder.logit_scale.item() == pytest.approx(expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, pictures, registry):
    out = tmp_path_factory.mktemp("run") / "run"
    on = [{"use": "llm/long-retrieval", "data": f"csv:{pictures}/long.csv"}]
    return out, run_recipe(
        "long-clip", overrides=settings(base, pictures, **{"evaluate.on": on}), out=out, registry=registry
    )


def test_a_run_leaves_a_plain_clip_with_the_long_context(trained, base):
    out, _ = trained
    rows = [json.loads(line) for line in (out / "stages/00-long/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and {"long", "short"} == rows[0]["terms"].keys()
    manifest = json.loads((out / "export/clipgraft.json").read_text())
    assert manifest["level"] == "L0" and manifest["model_config"]["text_cfg"]["context_length"] == 62
    before, after = open_export(base), open_export(out / "export")
    assert after.tokenizer.context_length == after.text.context_length == 62
    kept, now = before.text.tower.positional_embedding, after.text.tower.positional_embedding
    assert torch.equal(now[:6], kept[:6]) and not torch.equal(now[6::4], kept[6:])
    assert not torch.equal(after.image.tower.proj, before.image.tower.proj)


def test_the_evaluation_says_that_nothing_is_cut_any_more(trained):
    found = json.loads((trained[0] / "evaluations.json").read_text())["after"]["llm/long-retrieval"]
    assert found["truncated"] == 0 and found["tokens"] > 20


class Stop:
    """Asks the run to stop after its second step."""

    observer = False

    @runhook
    def after_step(self, run, step):
        run.stop_requested = step == 1


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, base, pictures, registry, monkeypatch):
    given = settings(base, pictures, **{"decay": "all", "train.steps": 4})
    run_recipe("long-clip", overrides=given, out=tmp_path / "straight", registry=registry)
    made = RunHooks.__init__

    def with_stop(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "__init__", with_stop)
        with pytest.raises(Interrupted, match="after step 2"):
            run_recipe("long-clip", overrides=given, out=tmp_path / "cut", registry=registry)
    run_recipe(resume=tmp_path / "cut", registry=registry)
    one, two = (open_export(tmp_path / name / "export").state_dict() for name in ("straight", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_chunks_train_as_the_whole_batch_does(tmp_path, base, pictures, registry):
    found = []
    for chunks in (1, 4):
        overrides = settings(base, pictures, **{"train.steps": 2, "train.accumulate": chunks, "pcm.group": 8})
        run_recipe("long-clip", overrides=overrides, out=tmp_path / str(chunks), registry=registry)
        lines = (tmp_path / str(chunks) / "stages/00-long/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_golden_losses_of_twenty_steps(tmp_path, base, pictures, registry):
    overrides = settings(base, pictures, **{"train.steps": 20})
    run_recipe("long-clip", overrides=overrides, out=tmp_path / "run", registry=registry)
    lines = (tmp_path / "run/stages/00-long/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[::4] + losses[-1:] == pytest.approx(GOLDEN, abs=0.05)


GOLDEN = [5.545, 4.977, 4.403, 3.871, 3.618, 3.536]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pcm.components": 15}, "16 images have 15 components"),
        ({"pcm.components": 16}, "lower components"),
        ({"pcm.group": 5}, "don't split into groups of 5"),
        ({"data.from": "csv:{}/labels.csv"}, "needs a long one for each image"),
        ({"captions.short": "second"}, "set captions.short to first-sentence"),
        ({"grafts": [{"use": "llm/stretch-positions", "context": 12, "keep": 2}]}, "reads 20 tokens already"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, base, pictures, registry, change, said):
    change = {k: v.format(pictures) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(InputError, match=said):
        run_recipe("long-clip", overrides=settings(base, pictures, **change), out=tmp_path / "run", registry=registry)
    assert not (tmp_path / "run" / "stages").exists()


def test_without_short_captions_components_do_not_matter(tmp_path, base, pictures, registry):
    overrides = settings(base, pictures, **{"pcm.weight": 0, "pcm.components": 99, "train.steps": 1, "grafts": []})
    assert run_recipe("long-clip", overrides=overrides, out=tmp_path / "run", registry=registry).steps == 1
    assert "32 are cut" in (tmp_path / "run/log.txt").read_text()
