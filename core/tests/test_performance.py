"""The performance block: what auto becomes, and that the same is computed another way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional as F

from clipgraft import performance
from clipgraft.checkpoint import open_export, write_export
from clipgraft.cli import main
from clipgraft.config.schema import PerformanceConfig
from clipgraft.data import open_source
from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.openclip import build
from clipgraft.errors import ClipgraftError, InputError, Interrupted
from clipgraft.evaluation import evaluate
from clipgraft.evaluation.features import EncoderFeatures
from clipgraft.execution import Result, run_recipe
from clipgraft.registry import Registry
from clipgraft.runner import Run
from clipgraft.spec import runhook
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft.trainer import Trainer

REGISTRY = Registry.discover(allow=[])


def convolutional() -> Encoder:
    """A random CLIP with a ResNet of four small stages."""
    text = {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 2, "layers": 2, "hf_tokenizer_name": "tiny"}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None, "head_width": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(
            {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
            None,
            preprocess={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            tokenizer=TinyTokenizer(),
            origin=Origin("tiny:resnet", "tiny"),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny CLIPs, one of them convolutional, and 16 captioned pictures in two classes."""
    folder = tmp_path_factory.mktemp("world")
    write_export(tiny_clip(), folder / "vit")
    write_export(convolutional(), folder / "resnet")
    g, rows = torch.Generator().manual_seed(0), ["image,caption,label"]
    for i in range(16):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a picture of thing{i},{('odd', 'even')[i % 2]}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder


def trained(world: Path, out: Path, model: str = "vit", **more: object) -> Result:
    values = {"model.from": str(world / model), "data.from": f"csv:{world / 'pairs.csv'}", "train.steps": 4}
    values |= {"train.batch_size": 8, "train.warmup": 0, "train.lr": 1e-3, "train.log_every": 1, **more}
    return run_recipe("finetune", overrides=values, out=out, registry=REGISTRY)


def losses(run: Path) -> list[float]:
    lines = (run / "stages/00-train/metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text("utf-8"))


@contextmanager
def on_a(monkeypatch: pytest.MonkeyPatch, device: str, **capable: bool) -> Iterator[None]:
    """Settle as if on other hardware; nothing is computed there."""
    with monkeypatch.context() as patch:
        patch.setattr(performance, "device_type", lambda: device)
        patch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable.get("bf16", False))
        patch.setattr(performance, "find_spec", lambda name: object() if capable.get(name) else None)
        yield


SETTLED = [
    ("cpu", {"avx512_bf16": True}, {"compile": False, "channels_last": True}, "bf16"),
    ("cpu", {"amx_bf16": True}, {"compile": False, "channels_last": True}, "bf16"),
    ("cpu", {"avx2": True}, {"compile": False, "channels_last": True}, "fp32"),
    ("cuda", {"bf16": True, "triton": True}, {"compile": True, "channels_last": True}, "bf16"),
    ("cuda", {"bf16": False}, {"compile": False, "channels_last": True}, "fp32"),
    ("mps", {}, {"compile": False, "channels_last": False}, "fp32"),
]


@pytest.mark.parametrize(("device", "capable", "wanted", "precision"), SETTLED)
def test_auto_becomes_what_the_hardware_can(device, capable, wanted, precision, monkeypatch):
    config = REGISTRY.config_class("recipe", "core/finetune")(
        model={"from": "x"}, data={"from": "y"}, losses=["core/clip"], performance="auto",
        train={"steps": 1, "batch_size": 2, "lr": 1.0}, evaluate={"precision": "auto"},
    )  # fmt: skip
    with on_a(monkeypatch, device, **capable):
        found, lines = performance.settled(config)
    assert found.performance == PerformanceConfig(**wanted) and found.precision == precision
    assert found.evaluate.precision == precision
    assert len(lines) == 1 and f"precision {precision}" in lines[0] and device in lines[0]
    assert performance.settled(found) == (found, []), "what is settled stays so elsewhere"


def test_a_run_writes_down_what_auto_became_and_a_repeated_one_does_the_same(world, tmp_path, monkeypatch):
    with on_a(monkeypatch, "cpu", avx2=True):
        first = trained(world, tmp_path / "a", performance="auto")
    assert config_of(first.run)["performance"] == {"compile": False, "channels_last": True, "attention": "auto"}
    assert config_of(first.run)["precision"] == "fp32"
    assert "auto on this cpu: compile false, channels_last true, precision fp32" in (first.run / "log.txt").read_text()
    with on_a(monkeypatch, "cpu", avx512_bf16=True):
        again = run_recipe(repeat=first.run, out=tmp_path / "b", registry=REGISTRY)
    assert config_of(again.run) == config_of(first.run)
    assert (again.run / "repeat.json").read_text().count('"same_weights": true') == 1


def test_a_precision_that_is_set_stays(world, tmp_path, monkeypatch):
    with on_a(monkeypatch, "cpu", avx512_bf16=True):
        found = trained(world, tmp_path / "run", performance="auto", precision="fp32")
    assert config_of(found.run)["precision"] == "fp32"


def test_without_the_block_nothing_changes(world, tmp_path):
    assert config_of(trained(world, tmp_path / "run").run)["performance"] == {
        "compile": False, "channels_last": False, "attention": "auto",
    }  # fmt: skip


class Orders:
    """Notes the memory order of every convolution, and which blocks are compiled, while a stage trains."""

    def __init__(self) -> None:
        self.last, self.convolutions, self.compiled = 0, 0, 0

    @runhook
    def before_step(self, run: Run, stage: nn.Module, step: int, batch: object) -> None:
        found = [m.weight for m in stage.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[2:].numel() > 1]
        self.convolutions = len(found)
        self.last = sum(w.is_contiguous(memory_format=torch.channels_last) for w in found)
        self.compiled = sum(m._compiled_call_impl is not None for m in stage.modules())


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Registered with every run."""
    seen, fit = Orders(), Trainer.fit

    def watched(self: Trainer, run: Run, stage: nn.Module) -> object:
        run.hooks.register(seen, "orders")
        return fit(self, run, stage)

    monkeypatch.setattr(Trainer, "fit", watched)
    return seen


def test_convolutions_in_channels_last_train_as_in_the_usual_order(world, tmp_path, orders):
    usual = trained(world, tmp_path / "usual", "resnet")
    assert orders.last == 0 < orders.convolutions
    other = trained(world, tmp_path / "other", "resnet", **{"performance.channels_last": True})
    assert orders.last == orders.convolutions
    assert losses(other.run) == pytest.approx(losses(usual.run), rel=1e-4)
    ours = open_export(other.export)
    assert all(p.is_contiguous() for p in ours.parameters())
    for (name, a), (_, b) in zip(ours.named_parameters(), open_export(usual.export).named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=5e-4, msg=name)


def test_channels_last_resumes_exactly(world, tmp_path, monkeypatch):
    settings = {"performance.channels_last": True, "train.save_every": 2}
    whole = trained(world, tmp_path / "whole", "resnet", **settings)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            trained(world, tmp_path / "run", "resnet", **settings)
    resumed = run_recipe(resume=tmp_path / "run", registry=REGISTRY)
    assert (resumed.export / "open_clip_model.safetensors").read_bytes() == (
        whole.export / "open_clip_model.safetensors"
    ).read_bytes()


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Ask for a stop after ``steps``, as Ctrl-C does."""

    class Stop:
        @runhook
        def after_step(self, run: Run, stage: object, step: int) -> None:
            run.stop_requested = step + 1 >= steps

    fit = Trainer.fit

    def stopped(self: Trainer, run: Run, stage: nn.Module) -> object:
        run.hooks.register(Stop(), "stop")
        return fit(self, run, stage)

    patch.setattr(Trainer, "fit", stopped)


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_resume_exactly_and_leave_no_trace(world, tmp_path, orders, monkeypatch):
    eager = trained(world, tmp_path / "eager")
    assert orders.compiled == 0
    settings = {"performance.compile": True, "train.save_every": 2}
    compiled = trained(world, tmp_path / "compiled", **settings)
    assert orders.compiled == 4, "two blocks of either tower"
    assert losses(compiled.run) == pytest.approx(losses(eager.run), rel=1e-4)
    pixels = torch.rand(2, 3, 32, 32)
    ours, theirs = open_export(compiled.export), open_export(eager.export)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        cosine = F.cosine_similarity(ours.eval().image(pixels).pooled, theirs.eval().image(pixels).pooled)
    assert float(cosine.min()) > 0.999
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            trained(world, tmp_path / "run", **settings)
    resumed = run_recipe(resume=tmp_path / "run", registry=REGISTRY)
    assert (resumed.export / "open_clip_model.safetensors").read_bytes() == (
        compiled.export / "open_clip_model.safetensors"
    ).read_bytes()


def test_an_attention_kernel_that_is_not_there_is_one_line(world, tmp_path):
    with pytest.raises(ClipgraftError, match=r"performance.attention: cudnn has no kernel .* set it to auto"):
        trained(world, tmp_path / "run", **{"performance.attention": "cudnn"})


def test_plain_attention_trains_as_torchs_own_choice(world, tmp_path):
    usual, plain = (trained(world, tmp_path / name, **{"performance.attention": name}) for name in ("auto", "math"))
    assert losses(plain.run) == pytest.approx(losses(usual.run), rel=1e-4)


REFUSED = [
    ({"performance": "fast"}, "performance is 'fast'; write auto, or a block"),
    ({"performance.compile": "maybe"}, "performance.compile"),
    ({"performance.attention": "xformers"}, "performance.attention"),
    ({"precision": "int8"}, "precision"),
    ({"performance.compile": True, "distributed.shard": True}, "compile is not offered with distributed.shard"),
    ({"performance.channels_last": True, "distributed.shard": True}, "channels_last is not offered with distributed"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED)
def test_bad_settings_are_one_line(world, tmp_path, more, said, monkeypatch):
    monkeypatch.setattr("clipgraft.launching.refuse_fewer", lambda layout: None)
    with pytest.raises(InputError, match=said) as caught:
        trained(world, tmp_path / "run", **more)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_compile_without_a_compiler_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(performance.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler .* install g\+\+ or set it to false"):
        trained(world, tmp_path / "run", **{"performance.compile": True})


def test_bf16_evaluation_is_near_fp32_and_its_features_are_kept_apart(world, tmp_path):
    encoder, source = open_export(world / "vit").eval(), f"csv:{world / 'pairs.csv'}"
    options = {"default_data": source, "cache": tmp_path / "cache", "registry": REGISTRY, "workers": 0}
    found = {
        precision: evaluate(encoder, ["core/zero-shot", "core/retrieval"], precision=precision, **options)
        for precision in ("fp32", "bf16", "fp32")
    }
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == 6, "images, captions and classes, each in either precision"
    for name, evaluation in found["fp32"].items():
        assert evaluation.metrics.keys() == found["bf16"][name].metrics.keys()
    rows = open_source(source, registry=REGISTRY)
    full, half = (EncoderFeatures(encoder, precision=p).images(rows) for p in ("fp32", "bf16"))
    assert full.dtype == half.dtype == torch.float32 and not torch.equal(full, half)
    assert float((full * half).sum(-1).min()) > 0.999


PROCESSORS = [
    ({"cpu_name": "AMD EPYC"}, True),
    ({"cpu_name": "AMD EPYC", "amx_bf16": True}, False),  # the same switch rounds factors there
    ({"cpu_name": "Intel(R) Xeon(R)"}, False),
    ({}, False),
]


@pytest.mark.parametrize(("capable", "wanted"), PROCESSORS)
def test_products_take_another_library_only_where_it_rounds_no_factor(capable, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    performance._exact_onednn.cache_clear()
    try:
        with performance.quick_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() in (("medium", "highest") if wanted else ("highest",))
            a, b = torch.randn(64, 512), torch.randn(512, 64)
            assert float((a @ b - a.double() @ b.double()).abs().max()) < 1e-3
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        performance._exact_onednn.cache_clear()


def test_a_precision_of_products_that_somebody_chose_is_kept():
    try:
        torch.set_float32_matmul_precision("high")
        with performance.quick_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_eval_takes_a_precision(world, capsys, precision):
    words = ["eval", str(world / "vit"), "--on", "zero-shot", "--data", f"csv:{world / 'pairs.csv'}", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--precision", precision])
    assert ended.value.code == 0 and "core/zero-shot" in json.loads(capsys.readouterr().out)["results"]
