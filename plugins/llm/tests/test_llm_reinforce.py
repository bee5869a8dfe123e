"""Reinforced data: replayed augmentations, the store and its joins, what is drawn, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
from typer.testing import CliRunner

from clipgraft.checkpoint import open_export, write_export
from clipgraft.data import open_source
from clipgraft.data.loader import TrainLoader
from clipgraft.data.sampling import seeded
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.log import RunLog
from clipgraft.registry import Registry
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft_llm.commands import app
from clipgraft_llm.reinforce.augment import OPERATIONS, Augmentation, ReplayableTransform, replay
from clipgraft_llm.reinforce.source import ReinforcedStore, reinforced
from clipgraft_llm.reinforce.write import Teacher, write_store
from clipgraft_llm.reinforce.written import WrittenCaptions

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rng, rows, written = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), ["image,caption"], []
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(root / f"{k}.png")
        rows += [f"{k}.png,a {c} cat {k}" for c in ("red", "small")[: 1 + k % 2]]
        if k != 5:
            written.append(json.dumps({"id": f"{k}.png", "captions": [f"the {c} dog {k}" for c in ("left", "blue")]}))
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    (root / "written.jsonl").write_text("\n".join(written) + "\n")
    write_export(tiny_clip().eval(), root / "base")
    return root


def teachers():
    return [
        Teacher.of("one", tiny_clip(1).eval()),
        Teacher.of("two", tiny_clip(2, image_size=48, embed=24).eval(), scale=70.0),
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("store") / "store"
    found = write_store(
        open_source(f"csv:{pictures}/table.csv"),
        out,
        teachers=teachers(),
        written=WrittenCaptions(pictures / "written.jsonl"),
        transform=ReplayableTransform(),
        augmentations=3,
        rows=5,
        stored="fp32",
        log=RunLog(),
    )
    assert (found.samples, found.shards, found.reused, found.without, found.skipped) == (12, 3, 0, 1, 0)
    return out


# -- augmentations ----------------------------------------------------------------------------------------------------


def test_a_stored_augmentation_is_replayed_to_the_last_bit():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    transform = ReplayableTransform(magnitude=20.0)
    for k in range(30):
        drawn = transform.sample(300, 400, seeded(0, 0, k))
        again = Augmentation.from_list(json.loads(json.dumps(drawn.as_list())))
        assert again == drawn and len(drawn.operations) == 2
        assert torch.equal(replay(picture, drawn, (224, 224)), replay(picture, again, (224, 224)))
        top, left, height, width = drawn.box
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width and height and width


def test_every_operation_runs_and_all_but_the_first_change_a_picture():
    picture = torch.randint(0, 200, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = replay(picture, Augmentation((0, 0, 40, 40)), (32, 32))
    assert plain.shape == (3, 32, 32) and plain.dtype == torch.uint8
    for place, name in enumerate(OPERATIONS):
        strength = {"posterize": 4.0, "rotate": 20.0}.get(name, 0.3)
        changed = replay(picture, Augmentation((0, 0, 40, 40), ((place, strength),)), (32, 32))
        assert torch.equal(changed, plain) == (name == "identity"), name
    with pytest.raises(InputError, match="operation 14 is unknown"):
        replay(picture, Augmentation((0, 0, 40, 40), ((14, 0.0),)), (32, 32))


def test_a_translation_is_a_share_of_any_crop():
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    picture[:, :, 32:] = 255
    drawn = Augmentation((0, 0, 64, 64), ((OPERATIONS.index("translate-x"), 0.25),))
    for side in (32, 64):
        edge = int((replay(picture, drawn, (side, side))[0, side // 2] > 128).int().argmax())
        assert edge == pytest.approx(0.75 * side, abs=1)


# -- the store --------------------------------------------------------------------------------------------------------


def test_the_store_holds_what_the_teachers_say(store, pictures):
    source, held = open_source(f"csv:{pictures}/table.csv"), ReinforcedStore(store)
    assert held.described.dims == (16, 24) and held.described.scales[1] == 70.0
    assert held.described.captions == 2 and held.described.written == 2
    shard = held.shards[1]  # samples 5 to 9
    augmented = Augmentation(
        tuple(shard["box"][2, 1].tolist()),
        tuple(zip(shard["op"][2, 1].tolist(), shard["strength"][2, 1].tolist(), strict=True)),
    )
    for teacher, place in zip(teachers(), (slice(0, 16), slice(16, 40)), strict=True):
        encoder = teacher.encoder
        pixels = replay(source[7].image, augmented, encoder.preprocess.size)[None].float() / 255
        image = F.normalize(encoder.image(encoder.preprocess.normalize(pixels)).pooled, dim=-1)
        assert torch.allclose(shard["image_emb"][2, 1, place], image[0], atol=1e-5)
        text = F.normalize(encoder.text(encoder.tokenizer([source[7].captions[1], "the blue dog 7"])).pooled, dim=-1)
        assert torch.allclose(shard["text_emb"][2, 1, place], text[0], atol=1e-5)  # a caption of its own
        assert torch.allclose(shard["text_emb"][2, 3, place], text[1], atol=1e-5)  # behind R captions: written ones
    assert held.written(1)[0] == [] and held.written(1)[2] == ["the left dog 7", "the blue dog 7"]
    assert int(shard["caption_hash"][0, 2]) == 0


def load(source, pictures, **more):
    settings = {"batch_size": 4, "seed": 1, "crop": None, "tokenizer": TinyTokenizer(), **more}
    return TrainLoader(source, preprocess=tiny_clip().preprocess, **settings)


def test_crops_captions_and_teachers_that_are_drawn_belong_together(store, pictures):
    source, tokenizer = open_source(f"csv:{pictures}/table.csv"), TinyTokenizer()
    held = ReinforcedStore(store)
    joined = reinforced(source, held, tokenizer=tokenizer, size=(32, 32))
    one, seen = teachers()[0].encoder, set()
    for _, batch in zip(range(9), load(joined, pictures).iterate(), strict=False):
        assert batch.extra["teacher_image"].shape == (4, 40) and batch.extra["synthetic"].shape == (4, 16)
        with torch.no_grad():
            text, written = (
                F.normalize(one.text(ids).pooled, dim=-1) for ids in (batch.text, batch.extra["synthetic"])
            )
            image = F.normalize(one.image(one.preprocess.normalize(batch.pixels)).pooled, dim=-1)
        assert torch.allclose(batch.extra["teacher_text"][:, :16], text, atol=1e-5)
        assert torch.allclose(batch.extra["teacher_synthetic"][:, :16], written, atol=1e-5)
        assert torch.allclose(
            batch.extra["teacher_image"][:, :16], image, atol=1e-4
        )  # the student's size is this one's
        seen |= {
            (name, tuple(row[:4].tolist())) for name, row in zip(batch.ids, batch.extra["teacher_image"], strict=True)
        }
    assert len(seen) > 12  # other crops of the same picture
    halves = [next(load(joined, pictures, batch_size=2, rank=r, world=2).iterate(4)) for r in range(2)]
    whole = next(load(joined, pictures).iterate(4))
    assert torch.equal(whole.pixels, torch.cat([half.pixels for half in halves]))


def test_other_written_captions_change_only_the_written_pairing(tmp_path, store, pictures):
    lines = [json.loads(line) for line in (pictures / "written.jsonl").read_text().splitlines()]
    told = {row["id"]: row["captions"] for row in lines}
    shuffled = dict(zip(told, [*list(told.values())[1:], next(iter(told.values()))], strict=True))
    (tmp_path / "w.jsonl").write_text("\n".join(json.dumps({"id": k, "captions": v}) for k, v in shuffled.items()))
    source = open_source(f"csv:{pictures}/table.csv")
    write_store(
        source, tmp_path / "other", teachers=teachers(), written=WrittenCaptions(tmp_path / "w.jsonl"),
        transform=ReplayableTransform(), augmentations=3, rows=5, stored="fp32", log=RunLog(),
    )  # fmt: skip
    one, other = (
        reinforced(source, ReinforcedStore(s), tokenizer=TinyTokenizer(), size=(32, 32)).varied(2, seeded(0, 0, 1))
        for s in (store, tmp_path / "other")
    )
    assert torch.equal(one.extra["teacher_text"], other.extra["teacher_text"]) and one.captions == other.captions
    assert torch.equal(one.image, other.image)
    assert not torch.equal(one.extra["teacher_synthetic"], other.extra["teacher_synthetic"])


def test_bf16_halves_the_store_and_an_interrupted_one_goes_on(tmp_path, pictures):
    source = open_source(f"csv:{pictures}/table.csv")

    def write(out, **more):
        settings = {"augmentations": 2, "rows": 5, "written": None, "transform": ReplayableTransform(), "log": RunLog()}
        return write_store(source, out, teachers=teachers(), **settings | more)

    write(tmp_path / "one")
    (tmp_path / "one/reinforced-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"00001\.safetensors is missing; run the same"):
        ReinforcedStore(tmp_path / "one")
    assert write(tmp_path / "one").reused == 2 and len(ReinforcedStore(tmp_path / "one").place) == 12
    with safe_open(tmp_path / "one/reinforced-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("image_emb").dtype == torch.bfloat16
    with pytest.raises(InputError, match="made with another augmentations"):
        write(tmp_path / "one", augmentations=4)
    joined = reinforced(source, ReinforcedStore(tmp_path / "one"), tokenizer=TinyTokenizer(), size=(32, 32))
    assert "synthetic" not in joined.varied(0, seeded(0, 0, 0)).extra  # nobody wrote captions


def test_samples_without_teachers_are_left_out_and_told(tmp_path, store, pictures, capsys):
    lines = (pictures / "table.csv").read_text().splitlines()
    changed = [line.replace("a red cat 3", "a blue cat 3") for line in lines]
    (pictures / "changed.csv").write_text("\n".join(changed) + "\n")
    joined = reinforced(
        open_source(f"csv:{pictures}/changed.csv"), ReinforcedStore(store), tokenizer=TinyTokenizer(), size=(32, 32)
    )
    assert len(joined) == 11 and "1 of 12 samples" in capsys.readouterr().err
    (pictures / "strange.csv").write_text("image,caption\n0.png,something else\n")
    with pytest.raises(InputError, match=r"no sample of .* is in the store"):
        reinforced(
            open_source(f"csv:{pictures}/strange.csv"), ReinforcedStore(store), tokenizer=TinyTokenizer(), size=(32, 32)
        )
    with pytest.raises(InputError, match=r"holds no reinforced\.json; make a store with"):
        ReinforcedStore(tmp_path)


# -- recipe and command -----------------------------------------------------------------------------------------------


def settings(pictures, store, **more):
    return {
        "model.from": str(pictures / "base"), "data.from": f"csv:{pictures}/table.csv", "store": str(store),
        "train.steps": 3, "train.batch_size": 4, "train.log_every": 1, "train.warmup": 0, "threads": 1,
        "evaluate.retention": "none", **more,
    }  # fmt: skip


def test_a_run_learns_from_the_store_and_encodes_pictures_once(tmp_path, pictures, store, registry, monkeypatch):
    from clipgraft.encoders.towers import ClipText, VitImage

    seen = []
    for kind in (VitImage, ClipText):
        forward = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda self, x, *a, f=forward, k=kind, **m: seen.append((k, len(x))) or f(self, x, *a, **m)
        )
    found = run_recipe("reinforce", overrides=settings(pictures, store), out=tmp_path / "run", registry=registry)
    assert found.status == "done" and seen == [(VitImage, 4), (ClipText, 8)] * 3  # once per step; texts are twice B
    rows = [json.loads(x) for x in (tmp_path / "run/stages/00-train/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["terms"]["ReinforcedLoss.0.contrastive"] == 0 < rows[0]["terms"]["ReinforcedLoss.0.distill"]
    assert open_export(tmp_path / "run/export").image.embed_dim == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"losses": [{"use": "llm/reinforced", "scales": [1.0]}]}, "1 scales for the store's 2 teachers"),
        ({"losses": ["core/clip"]}, "list llm/reinforced"),
        ({"teacher": "base"}, "leave teacher out"),
        ({"store": "nowhere"}, "make a store with"),
    ],
)
def test_bad_settings_are_seen_before_any_work(tmp_path, pictures, store, registry, change, words):
    with pytest.raises(InputError, match=words):
        run_recipe("reinforce", overrides=settings(pictures, store) | change, out=tmp_path / "run", registry=registry)


def test_the_command_writes_a_store_and_prints_one_document(tmp_path, pictures):
    base = str(pictures / "base")
    asked = [
        "reinforce-data",
        f"csv:{pictures}/table.csv",
        "--teacher",
        base,
        "--teacher",
        base,
        "--scale",
        "70",
        "--scale",
        "60",
    ]
    asked += [
        "--captions",
        str(pictures / "written.jsonl"),
        "--augmentations",
        "2",
        "--out",
        str(tmp_path / "s"),
        "--json",
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["samples"] == 12 and [t["scale"] for t in told["teachers"]] == [70, 60]
    assert ReinforcedStore(tmp_path / "s").described.scales == (70.0, 60.0)
    for extra, words in (
        (["--scale", "3"], "3 scales for 2 teachers"),
        (["--area", "0.5", "0.1"], "no range of shares"),
    ):
        result = CliRunner().invoke(app, [*asked, *extra])
        assert isinstance(result.exception, InputError) and words in str(result.exception)
    (tmp_path / "bad.jsonl").write_text('{"id": 3}')
    with pytest.raises(InputError, match="line 1: expected id and a list captions"):
        WrittenCaptions(tmp_path / "bad.jsonl")
