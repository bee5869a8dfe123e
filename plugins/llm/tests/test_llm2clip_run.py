"""LLM2CLIP from a language model's directory to an export: overfitted, resumed, cached as online, both stages."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft import encoders
from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.config.schema import TrainConfig
from clipgraft.data import open_source
from clipgraft.encoders.base import AppliedGraft
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.evaluation import evaluate
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.runhooks import RunHooks
from clipgraft.spec import runhook
from clipgraft.testing.ranks import run_ranks
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch
from clipgraft_llm.llm2clip.vision_stage import VisionStage
from clipgraft_llm.testing import LLAMA_TEMPLATE, WORDS, write_tiny_embedder, write_tiny_llama
from clipgraft_llm.tower.graft import TransformerText
from clipgraft_llm.tower.model_folder import find_model

torch.set_num_threads(1)
NAMES = WORDS.split()
ASKED = {"text.template": LLAMA_TEMPLATE, "text.attention": "bidirectional", "text.blocks": 1}


@pytest.fixture(scope="module")
def registry():
    return Registry.discover(allow=["llm"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_export(tiny_clip().eval(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """64 pictures of noise, each with a short and a long caption of its own."""
    root, rows = tmp_path_factory.mktemp("pictures"), ["image,caption"]
    rng = np.random.default_rng(0)
    for k in range(64):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.NEAREST).save(root / f"{k}.png")
        short = f"{NAMES[8 + k % 8]} {NAMES[16 + k // 8]}"
        rows += [f"{k}.png,a {short}", f"{k}.png,there is a photo of one large {short} in the picture"]
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    return f"csv:{root}/table.csv"


def settings(base, table, llama, **more):
    return {
        "model.from": str(base), "data.from": table, "text.model": str(llama), "train.steps": 6, "train.batch_size": 16,
        "train.log_every": 1, "train.warmup": 0, "cache.stored": "fp32", "threads": 1, **ASKED, **more,
    }  # fmt: skip


def rows_of(run, stage):
    return [json.loads(line) for line in (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def tensors(folder, registry):
    return open_export(folder, registry=registry).state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, table, llama, registry):
    """A short run with a cache of its own."""
    out = tmp_path_factory.mktemp("run") / "run"
    return run_recipe("llm/llm2clip", overrides=settings(base, table, llama), out=out, registry=registry)


@pytest.mark.slow
def test_it_learns_64_pairs_by_heart(tmp_path, base, table, llama, registry):
    more = {"train.steps": 250, "train.batch_size": 64, "train.lr": 4e-3, "train.warmup": 20, "train.log_every": 50}
    evaluator = [{"use": "core/retrieval", "ks": [1], "data": table}]
    found = run_recipe(
        "llm/llm2clip",
        overrides=settings(base, table, llama, **more, **{"evaluate.on": evaluator}),
        out=tmp_path / "run",
        registry=registry,
    )
    assert found.metrics == {"core/retrieval.image_to_text_r1": 1.0, "core/retrieval.text_to_image_r1": 1.0}
    export = open_export(tmp_path / "run" / "export", registry=registry).eval()
    again = evaluate(export, ["core/retrieval?ks=[1]"], registry=registry, default_data=table)["core/retrieval"]
    assert again.metrics["image_to_text_r1"] == 1.0


def test_a_run_leaves_an_export_with_the_text_model_outside(trained, llama, registry):
    run = trained.run
    assert trained.status == "done" and trained.steps == 6
    manifest = read_manifest(run / "export")
    assert manifest["level"] == "L2" and manifest["grafts"][0]["use"] == "llm/transformer-text"
    rows = rows_of(run, "01-vision")
    assert set(rows[0]["terms"]) == {"image_to_text", "text_to_image", "logit_scale"}
    assert sorted(p.name for p in (run / "text-features").iterdir()) == ["cache.json", "features-00000.safetensors"]
    result = json.loads((run / "stages/00-features/result/metrics.json").read_text())
    assert result == {"captions": 128, "cut": 0, "skipped": 0}
    encoder = encoders.load(str(run / "export"), registry=registry).eval()
    assert encoder.tokenizer.settings.template == LLAMA_TEMPLATE
    assert not any("inner" in k for k in encoder.state_dict())


def test_online_features_train_the_same_model_as_cached_ones(trained, tmp_path, base, table, llama, registry):
    online = run_recipe(
        "llm/llm2clip",
        overrides=settings(base, table, llama, **{"cache.use": "online"}),
        out=tmp_path / "run",
        registry=registry,
    )
    cached = [row["loss"] for row in rows_of(trained.run, "01-vision")]
    assert [row["loss"] for row in rows_of(online.run, "00-vision")] == pytest.approx(cached, abs=1e-5)
    one, other = tensors(trained.run / "export", registry), tensors(online.run / "export", registry)
    assert all(torch.allclose(one[k].float(), other[k].float(), atol=1e-4) for k in one)


class Stop:
    """Asks the run to stop after its third step."""

    @runhook
    def after_step(self, run, stage, step, output):
        run.stop_requested = step == 2


def test_a_stopped_run_goes_on_bit_by_bit(trained, tmp_path, base, table, llama, registry, monkeypatch):
    usual = RunHooks.__init__

    def stopping(self, *args, **more):
        usual(self, *args, **more)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunHooks, "__init__", stopping)
        run_recipe("llm/llm2clip", overrides=settings(base, table, llama), out=tmp_path / "run", registry=registry)
    kept = next((tmp_path / "run/stages/01-vision/state").glob("step-*/stage.safetensors"))
    assert kept.stat().st_size < 2_000_000  # no language model in it
    run_recipe(resume=tmp_path / "run", registry=registry)
    straight, resumed = tensors(trained.run / "export", registry), tensors(tmp_path / "run/export", registry)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def stage_of(base, table, llama, *, weights="reference", **more):
    encoder = open_export(base)
    torch.manual_seed(0)
    graft = TransformerText(
        model=str(llama), template=LLAMA_TEMPLATE, attention="bidirectional", blocks=1, weights=weights
    )
    encoder = graft.apply(encoder)
    encoder.data.grafts.append(AppliedGraft("llm/transformer-text", graft.model_dump(mode="json"), graft, False))
    train = TrainConfig(steps=1, batch_size=8, lr=1e-3)
    return VisionStage("vision", train=train, source=open_source(table), encoder=encoder, **more)


def batch_of(stage, table, rows):
    source = open_source(table)
    samples = [source[k] for k in rows]
    pixels = torch.stack([torch.from_numpy(np.array(s.image)).permute(2, 0, 1) / 255 for s in samples])
    return Batch(pixels, [s.id for s in samples], stage.encoder.tokenizer([s.captions[0] for s in samples]))


@pytest.mark.parametrize("weights", ["reference", "stored"])
def test_fact_9_gradients_reach_everything_but_the_text_model(base, table, llama, weights):
    stage = stage_of(base, table, llama, weights=weights).train()
    stage(batch_of(stage, table, range(8))).loss.backward()
    trained = {name for name, p in stage.named_parameters() if p.grad is not None}
    language = stage.text.language
    assert all(p.grad is None and not p.requires_grad for p in language.parameters()) and not language.training
    expected = {n for n, _ in stage.named_parameters() if ".inner." not in n and not n.startswith("loss")}
    assert trained == expected and "encoder.logit_scale" in trained
    assert any(n.startswith("encoder.text.projection") for n in trained)
    listed = {id(p) for group in stage.param_groups() for p in group["params"]}
    assert listed == {id(p) for n, p in stage.named_parameters() if n in trained}
    assert not any(".inner." in name for name in stage.trained_state())


def test_rates_of_the_image_tower_fall_towards_the_pixels(base, table, llama):
    stage = stage_of(base, table, llama, visual_decay=0.5)
    names = {id(p): n for n, p in stage.named_parameters()}
    rate = {names[id(p)]: g.get("lr_scale", 1.0) for g in stage.param_groups() for p in g["params"]}
    tower = "encoder.image.tower"
    assert rate[f"{tower}.conv1.weight"] == rate[f"{tower}.class_embedding"] == 0.5**3
    assert rate[f"{tower}.transformer.resblocks.1.ln_1.weight"] == 0.5
    assert rate[f"{tower}.proj"] == rate["encoder.logit_scale"] == 1.0
    frozen = stage_of(base, table, llama, train_image=False)
    assert not any(p.requires_grad for p in frozen.encoder.image.parameters())
    assert [g["name"] for g in frozen.param_groups()] == ["text projection and scale"]


def ranked(base, table, llama):
    """Loss and gradient of this rank's half of eight pairs."""
    from clipgraft import distributed

    stage = stage_of(base, table, llama)
    world, rank = distributed.world_size(), distributed.rank()
    rows = range(rank * 8 // world, (rank + 1) * 8 // world)
    output = stage(batch_of(stage, table, rows))
    output.loss.backward()
    grads = {n: p.grad for n, p in stage.named_parameters() if p.grad is not None and "projection" in n}
    return float(output.loss.detach()), {n: g.tolist() for n, g in grads.items()}


@pytest.mark.slow
def test_two_ranks_are_one(base, table, llama):
    loss, grads = ranked(base, table, llama)
    found = run_ranks(ranked, 2, base, table, llama)
    assert [value for value, _ in found] == pytest.approx([loss] * 2, abs=1e-5)
    for name, grad in grads.items():
        mean = sum(torch.tensor(g[name]) for _, g in found) / 2
        assert torch.allclose(mean, torch.tensor(grad), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "embedder"])
def test_stage_1_makes_captions_of_a_picture_alike_and_feeds_stage_2(kind, tmp_path, base, table, llama, registry):
    model = llama if kind == "llama" else write_tiny_embedder(tmp_path / "embedder")
    out = tmp_path / "one"
    more = {"text.template": LLAMA_TEMPLATE} if kind == "llama" else {"text.attention": None}
    found = run_recipe(
        "llm/caption-contrast",
        overrides={
            "model.from": f"llm:{model}", "data.from": table, "train.steps": 12, "train.batch_size": 16,
            "train.accumulate": 2, "train.lr": 5e-3, "train.warmup": 0, "train.log_every": 1, "threads": 1,
            "lora.rank": 4, "lora.dropout": 0.1, **more,
            "evaluate.on": [{"use": "llm/caption-retrieval", "ks": [1], "data": table}],
        },
        out=out,
        registry=registry,
    )  # fmt: skip
    rows = rows_of(out, "00-captions")
    assert rows[-1]["loss"] < rows[0]["loss"] and found.status == "done"
    before = json.loads((out / "evaluations.json").read_text())["before"]["llm/caption-retrieval"]["r1"]
    assert found.metrics["llm/caption-retrieval.r1"] >= before
    tuned = out / "text-model"
    described = json.loads((tuned / "text_model.json").read_text())
    assert described["attention"] == ("bidirectional" if kind == "llama" else "native")
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(tuned, local_files_only=True)  # opens without us, adapters merged
    assert not any("lora" in name for name, _ in plain.named_parameters())
    alone = encoders.load(str(out / "export"), registry=registry).eval()
    direct = encoders.load(f"llm:{tuned}", registry=registry).eval()
    ids = direct.tokenizer(["a red dog"])
    assert torch.equal(alone.text(ids).pooled, direct.text(ids).pooled)
    assert find_model(str(out)).path == tuned.resolve()  # the run itself is a reference too
    assert direct.tokenizer.settings.template == (LLAMA_TEMPLATE if kind == "llama" else "{}")
    second = run_recipe(
        "llm/llm2clip",
        overrides={
            k: v
            for k, v in settings(base, table, tuned, **{"train.steps": 1}).items()
            if k not in ("text.template", "text.attention")
        },
        out=tmp_path / "two",
        registry=registry,
    )
    assert encoders.load(str(second.export), registry=registry).tokenizer.settings == direct.tokenizer.settings


def test_a_stopped_stage_1_goes_on_bit_by_bit(tmp_path, table, llama, registry, monkeypatch):
    def overrides():
        return {
            "model.from": f"llm:{llama}", "data.from": table, "train.steps": 5, "train.batch_size": 8, "threads": 1,
            "train.lr": 1e-3, "lora.rank": 2, "lora.dropout": 0.2, "instruction": "find: ",
        }  # fmt: skip

    run_recipe("llm/caption-contrast", overrides=overrides(), out=tmp_path / "straight", registry=registry)
    usual = RunHooks.__init__

    def stopping(self, *args, **more):
        usual(self, *args, **more)
        self.register(Stop(), "stop")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunHooks, "__init__", stopping)
        run_recipe("llm/caption-contrast", overrides=overrides(), out=tmp_path / "run", registry=registry)
    stored = next((tmp_path / "run/stages/00-captions/state").glob("step-*/stage.safetensors"))
    assert stored.stat().st_size < (llama / "model.safetensors").stat().st_size / 2  # adapters alone
    run_recipe(resume=tmp_path / "run", registry=registry)
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "text-model/model.safetensors") for name in ("straight", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    start = load_file(llama / "model.safetensors")
    assert not torch.equal(one["layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])


def test_bad_input_is_told_before_any_work(tmp_path, base, table, llama, registry):
    def told(recipe, overrides):
        with pytest.raises(ClipgraftError) as error:
            run_recipe(recipe, overrides=overrides, out=tmp_path / "never", registry=registry)
        assert not (tmp_path / "never").exists() and "\n" not in str(error.value)
        assert isinstance(error.value, InputError)
        return str(error.value)

    bare = tmp_path / "bare"
    write_tiny_llama(bare)
    (bare / "model.safetensors").unlink()
    good = settings(base, table, llama)
    assert "no weights" in told("llm/llm2clip", {**good, "text.model": str(bare)})
    assert "a directory of transformers" in told("llm/llm2clip", {**good, "text.model": ""})
    assert "cache.json" in told("llm/llm2clip", {**good, "cache.folder": str(tmp_path)})
    assert "leave it out, or switch" in told(
        "llm/llm2clip", {**good, "cache.use": "online", "cache.folder": str(tmp_path)}
    )
    assert "use visual_decay here" in told("llm/llm2clip", {**good, "train.layer_decay": 0.9})
    one = {"model.from": f"llm:{llama}", "data.from": table, "train.steps": 1, "train.batch_size": 8}
    assert "is no text model" in told("llm/caption-contrast", {**one, "model.from": str(base)})
    assert "text.over to caption" in told("llm/caption-contrast", {**one, "instruction": "find: ", "text.over": "all"})
    root = table.removeprefix("csv:").rpartition("/")[0]
    single = tmp_path / "single.csv"
    Image.open(f"{root}/0.png").save(tmp_path / "0.png")
    single.write_text("image,caption\n0.png,a dog\n")
    assert "2 that differ are needed" in told("llm/caption-contrast", {**one, "data.from": f"csv:{single}"})


def test_adapters_that_fit_nothing_name_what_there_is(tmp_path, table, llama, registry):
    with pytest.raises(InputError, match="linear layers are down_proj"):
        run_recipe(
            "llm/caption-contrast",
            overrides={
                "model.from": f"llm:{llama}", "data.from": table, "train.steps": 1, "train.batch_size": 8,
                "lora.targets": ["query"],
            },
            out=tmp_path / "run",
            registry=registry,
        )  # fmt: skip
