"""Weight inheritance: plans, slices head by head, plain open_clip students of the published sizes, the recipe."""

import json

import pytest
import torch

from clipgraft.checkpoint import open_export, read_manifest, write_export
from clipgraft.config.load import parse_yaml
from clipgraft.encoders.base import Origin
from clipgraft.encoders.openclip import build
from clipgraft.errors import InputError
from clipgraft.execution import run_recipe
from clipgraft.registry import Registry
from clipgraft.testing.tiny import TinyTokenizer, tiny_clip
from clipgraft_llm.tiny.inheritance import Inherit, inherit, take_over
from clipgraft_llm.tiny.plan import TowerPlan, TowerShape, TowerSize, depth_map, plan_tower

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry():
    return Registry.discover()


def leading(layers, width, heads, head_width, hidden):
    return TowerPlan(
        tuple(layers),
        tuple(range(width)),
        (tuple(range(heads)),) * len(layers),
        tuple(range(head_width)),
        (tuple(range(hidden)),) * len(layers),
    )


@pytest.mark.parametrize(
    ("student", "layers"), [(9, range(9)), (10, range(10)), (6, range(0, 12, 2)), (3, (0, 4, 8)), (12, range(12))]
)
def test_the_official_depth_map(student, layers):
    assert depth_map(12, student) == list(layers)


def test_other_depth_maps_and_too_many_layers():
    assert depth_map(12, 9, depth="even")[-1] == 11 and len(set(depth_map(12, 9, depth="even"))) == 9
    assert depth_map(12, 3, depth="first") == [0, 1, 2] and depth_map(12, 1, depth="even") == [0]
    with pytest.raises(InputError, match="of 12 layers can't give 13; ask for 12 or fewer"):
        depth_map(12, 13)


def test_query_key_and_value_are_taken_head_by_head():
    w = torch.arange(3 * 768 * 768).view(3 * 768, 768).float()
    name = "transformer.resblocks.0.attn.in_proj_weight"
    taken = take_over({name: w}, leading([0], 640, 10, 64, 2560), heads=12)[name]
    assert torch.equal(taken, w.view(3, 12, 64, 768)[:, :10, :, :640].reshape(1920, 640))
    assert not torch.equal(taken, w[:1920, :640])
    narrow = take_over({name: w}, leading([0], 480, 10, 48, 1920), heads=12)[name]
    assert torch.equal(narrow, w.view(3, 12, 64, 768)[:, :10, :48, :480].reshape(1440, 480))


def test_layers_are_renumbered_and_explicit_indices_are_followed():
    state = {f"transformer.resblocks.{k}.ln_1.weight": torch.arange(4.0) + 10 * k for k in range(3)}
    plan = TowerPlan((0, 2), (1, 3), ((0,), (0,)), (0, 1), ((0,), (0,)))
    taken = take_over(state, plan, heads=2)
    assert {k: v.tolist() for k, v in taken.items()} == {
        "transformer.resblocks.0.ln_1.weight": [1, 3],
        "transformer.resblocks.1.ln_1.weight": [21, 23],
    }
    with pytest.raises(InputError, match=r"doesn't know the tensor lora\.weight"):
        take_over({"lora.weight": torch.zeros(1)}, plan, heads=2)


def test_nothing_left_out_is_the_teacher_itself():
    teacher = tiny_clip().eval()
    same, found = inherit(teacher, Inherit())
    assert found.share == 1 and all(torch.equal(v, same.state_dict()[k]) for k, v in teacher.state_dict().items())
    assert same.image is not teacher.image
    before = teacher.state_dict()["image.tower.proj"].clone()
    with torch.no_grad():
        same.image.tower.proj.add_(1)
    assert torch.equal(teacher.state_dict()["image.tower.proj"], before)  # copies, not views


def test_dropping_dead_channels_and_layers_leaves_the_function():
    """A teacher whose upper half of channels, heads and units is zero and whose layer 1 is an identity."""
    teacher = tiny_clip(depth=2).eval()
    with torch.no_grad():
        for name, tensor in teacher.state_dict().items():
            if "resblocks.1." in name and name.endswith(
                ("out_proj.weight", "out_proj.bias", "c_proj.weight", "c_proj.bias")
            ):
                tensor.zero_()
    small, found = inherit(teacher, Inherit(image=TowerSize(layers=1), text=TowerSize(layers=1), depth="first"))
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 100, (3, 16))
    for one, other in zip(teacher(pixels, ids), small(pixels, ids), strict=True):
        assert torch.allclose(one.pooled, other.pooled, atol=1e-6)
    assert found.image.layers == (0,) and found.share < 1


def test_the_strongest_heads_and_units_are_found():
    teacher = tiny_clip().eval()
    state = {k.removeprefix("image.tower."): v for k, v in teacher.state_dict().items() if k.startswith("image.tower.")}
    with torch.no_grad():
        for k in range(2):
            state[f"transformer.resblocks.{k}.attn.in_proj_weight"].view(3, 2, 16, 32)[2, 0].mul_(0.01)
            state[f"transformer.resblocks.{k}.mlp.c_proj.weight"][:, :64].mul_(0.01)
            state[f"transformer.resblocks.{k}.mlp.c_proj.weight"][:16].mul_(0.01)
            state[f"transformer.resblocks.{k}.attn.out_proj.weight"][:16].mul_(0.01)
    plan = plan_tower(state, TowerShape(2, 32, 2, 128), TowerSize(width=16, hidden=64), choice="strongest")
    assert plan.heads == ((1,), (1,)) and plan.hidden == (tuple(range(64, 128)),) * 2
    assert plan.channels == tuple(range(16, 32))


def on_meta(model):
    """An encoder without memory: shapes only."""
    import open_clip

    with torch.device("meta"):
        return build(
            open_clip.get_model_config(model),
            None,
            preprocess={"mean": (0.5,) * 3, "std": (0.5,) * 3},
            tokenizer=TinyTokenizer(),
            origin=Origin(model, model),
        )


@pytest.mark.parametrize(
    ("image", "text", "counts"),
    [
        ({}, {}, (87_849_216, 63_428_096)),
        ({"width": 640}, {"layers": 9}, (61_411_200, 53_970_944)),
        ({"width": 512}, {"layers": 6}, (39_691_776, 19_216_896 + 49408 * 512)),
    ],
)
def test_students_have_the_published_numbers_of_parameters(image, text, counts):
    small, found = inherit(on_meta("ViT-B-32"), Inherit(image=TowerSize(**image), text=TowerSize(**text)))
    assert (found.after["image"], found.after["text"]) == counts
    assert small.data.model_config["vision_cfg"]["width"] == image.get("width", 768)


def test_a_narrower_student_exports_as_plain_open_clip(tmp_path):
    import open_clip

    teacher = tiny_clip().eval()
    sizes = Inherit(image=TowerSize(width=16, heads=2, hidden=40), text=TowerSize(width=24, heads=2, layers=1))
    small, found = inherit(teacher, sizes)
    assert found.share < 0.5 and small.image.width == 16 and small.text.width == 24
    write_export(small, tmp_path / "small")
    manifest = read_manifest(tmp_path / "small")
    assert manifest["level"] == "L0"
    pixels = torch.randn(2, 3, 32, 32)
    again = open_export(tmp_path / "small").eval()
    stock = open_clip.create_model(f"local-dir:{tmp_path / 'small'}").eval()
    with torch.no_grad():
        wanted = small.image(pixels).pooled
        assert torch.allclose(again.image(pixels).pooled, wanted, atol=1e-6)
        assert torch.allclose(stock.encode_image(pixels), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"width": 64}, "width 64 is more than the teacher's 32"),
        (
            {"width": 24, "heads": 1},
            r"width 24 with 1 heads needs heads of 24 channels, the teacher's have 16; heads 2 fit",
        ),
        ({"layers": 3}, "image: layers 3 is more than the teacher's 2"),
        ({"hidden": 500}, "hidden 500 is more than"),
    ],
)
def test_sizes_that_do_not_fit_are_told_in_one_line(size, words):
    with pytest.raises(InputError, match=words):
        inherit(tiny_clip(), Inherit(image=TowerSize(**size)))


def test_other_towers_are_refused():
    with pytest.raises(InputError, match="knows open_clip's ViT and its text transformer, this model has TimmImage"):
        inherit(tiny_clip(kind="siglip-timm"), Inherit())


def test_random_weights_are_a_control_of_the_same_size():
    teacher = tiny_clip().eval()
    state = torch.random.get_rng_state()
    one, two, other = (
        inherit(teacher, Inherit(weights="random", seed=seed, image=TowerSize(layers=1)))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    a, b, c = (x.state_dict()["image.tower.conv1.weight"] for x in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c) and one.image.depth == 1
    assert not torch.equal(c, teacher.state_dict()["image.tower.conv1.weight"])
    assert torch.equal(one.logit_scale, teacher.logit_scale)


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    from PIL import Image

    rows = ["image,caption"]
    for k in range(16):
        Image.new("RGB", (32, 32), (16 * k, 255 - 16 * k, 40)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,a {['red', 'green', 'blue', 'star'][k % 4]} {['cat', 'dog'][k % 2]} {k}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    write_export(tiny_clip().eval(), tmp_path / "base")
    return {
        "model.from": str(tmp_path / "base"), "data.from": f"csv:{tmp_path}/table.csv", "train.steps": 3,
        "train.batch_size": 8, "train.log_every": 1, "train.lr": 1e-3, "train.warmup": 0, "threads": 1,
        "student": parse_yaml("{image: {layers: 1}, text: {width: 16}}", origin="test"), "evaluate.retention": "none",
    }  # fmt: skip


def test_a_run_leaves_a_smaller_plain_clip(tmp_path, settings, registry):
    found = run_recipe("tinyclip", overrides=settings, out=tmp_path / "run", registry=registry)
    assert found.status == "done" and found.steps == 3
    manifest = read_manifest(tmp_path / "run/export")
    assert manifest["level"] == "L0" and manifest["model_config"]["vision_cfg"]["layers"] == 1
    assert len(manifest["lineage"]) == 1 and manifest["lineage"][0]["recipe"] == "llm/tinyclip"
    told = json.loads((tmp_path / "run/stages/00-inherit/inheritance.json").read_text())
    small = open_export(tmp_path / "run/export")
    count = sum(p.numel() for t in (small.image, small.text) for p in t.parameters())
    assert sum(told["parameters"]["after"].values()) == count and told["share"] < 1 and told["image"]["layers"] == [0]
    rows = [json.loads(x) for x in (tmp_path / "run/stages/01-train/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and "AffinityLoss.0.image_to_text" in rows[0]["terms"]
    start = open_export(tmp_path / "run/stages/00-inherit/result/encoder").state_dict()
    moved = {k for k, v in small.state_dict().items() if not torch.equal(v, start[k])}
    assert {"image.tower.conv1.weight", "text.tower.text_projection"} < moved and "logit_scale" not in moved


def test_the_same_student_as_a_graft_of_another_recipe(tmp_path, settings, registry):
    del settings["student"]
    settings["grafts"] = [{"use": "llm/inherit", "image": {"layers": 1}}]
    run_recipe("finetune", overrides=settings, out=tmp_path / "run", registry=registry)
    manifest = read_manifest(tmp_path / "run/export")
    assert manifest["level"] == "L0" and open_export(tmp_path / "run/export").image.depth == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": {}}, "student says no size"),
        ({"student": {"text": {"layers": 9}}}, r"student\.text: layers 9 is more than the teacher's 2"),
        ({"teacher": None}, "affinity learns from a teacher; set teacher to base"),
        ({"student": {"image": {"wide": 9}}}, "wide"),
    ],
)
def test_bad_settings_are_seen_before_any_work(tmp_path, settings, registry, change, words):
    with pytest.raises(InputError, match=words):
        run_recipe("tinyclip", overrides=settings | change, out=tmp_path / "run", registry=registry)
    assert not (tmp_path / "run").exists()
