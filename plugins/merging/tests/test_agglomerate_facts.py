"""AM-RADIO and PHI-S: what their equations imply."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clipgraft.config.schema import TrainConfig
from clipgraft.encoders.base import Preprocess
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.given import Given
from clipgraft.testing.tiny import tiny_clip
from clipgraft.types import Batch, FeatureRequest
from clipgraft_merging.agglomerate.adaptors import Adaptor, Adaptors, AdaptorShape
from clipgraft_merging.agglomerate.groups import Group, alternated, of_rank, split
from clipgraft_merging.agglomerate.hadamard import hadamard, reachable
from clipgraft_merging.agglomerate.losses import COSINE, SMOOTH_L1, on_one_grid, spatial_loss, summary_loss
from clipgraft_merging.agglomerate.phi_s import Normaliser, transform
from clipgraft_merging.agglomerate.stage import AgglomerateStage
from clipgraft_merging.agglomerate.statistics import Moments, joined
from clipgraft_merging.agglomerate.student import Student, cropped_positions, random_positions, resized_positions
from clipgraft_merging.agglomerate.teachers import ClipFeatures, Teacher, TeacherFeatures, open_teacher

TRAIN = TrainConfig(steps=2, batch_size=4, lr=1e-3)


class _SpatialOnly(torch.nn.Module):
    """Stands for a SAM: patch means, no summary."""

    def forward(self, pixels: Tensor) -> TeacherFeatures:
        found = F.avg_pool2d(pixels, 8)
        return TeacherFeatures(None, found.flatten(2).transpose(1, 2), tuple(found.shape[-2:]))


def stage(*, balance: str = "split", groups: tuple[Group, ...] | None = None, sizes: int = 32) -> AgglomerateStage:
    """A tiny CLIP that follows another one (summary and tokens) and something like a SAM (spatial only)."""
    encoder, other = tiny_clip(0), tiny_clip(1)
    shapes = (
        AdaptorShape(teacher="clip", kind="summary", reads="cls", inputs=32, outputs=16, hidden=8),
        AdaptorShape(teacher="clip", kind="spatial", reads="tokens", inputs=32, outputs=32, hidden=8, blocks=1),
        AdaptorShape(teacher="sam", kind="spatial", reads="tokens", inputs=32, outputs=3, hidden=8),
    )
    torch.manual_seed(0)
    plain = Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3)
    teachers = {"clip": Teacher(ClipFeatures(other), other.preprocess), "sam": Teacher(_SpatialOnly(), plain)}
    return AgglomerateStage(
        "distil",
        train=TRAIN,
        source=Given(torch.eye(4), [0, 1, 0, 1]),
        encoder=encoder,
        student=Student(encoder.image),
        adaptors=Adaptors(shapes=shapes),
        teachers=teachers,
        weights={"clip-summary": 1.0, "clip-spatial": 1.0, "sam-spatial": 1.0},
        groups=groups or (Group(("clip", "sam"), (sizes, sizes), 1),),
        balance=balance,
        crop=None,
        tower_lr=1.0,
    )


def batch(n: int = 4, side: int = 48) -> Batch:
    pixels = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, [str(i) for i in range(n)])


# -- the ten facts ---------------------------------------------------------------------------------------------------


def test_fact_1_a_teacher_without_summary_weight_has_no_summary_head_and_no_gradient_comes_from_it() -> None:
    made = stage()
    assert "sam-summary" not in made.adaptors.heads
    made.train()
    made.weights = {"sam-spatial": 1.0}  # with its spatial features alone, nothing of the clip's head moves
    made(batch()).loss.backward()
    assert made.adaptors.heads["sam-spatial"].first.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in made.adaptors.heads["clip-summary"].parameters())


def test_fact_2_the_spatial_loss_is_zero_only_for_equal_features_and_half_of_it_knows_their_length() -> None:
    x = torch.randn(2, 5, 8)
    assert spatial_loss(x, x).abs() < 1e-6 and spatial_loss(x, x + 0.1 * torch.randn_like(x)) > 1e-4
    assert torch.allclose(summary_loss(x, 3 * x), torch.zeros(()), atol=1e-6)
    longer = spatial_loss(x, 3 * x)  # the cosine part is zero, smooth L1 is not
    assert torch.allclose(longer, SMOOTH_L1 * F.smooth_l1_loss(x, 3 * x), atol=1e-6) and longer > 0.01


def test_fact_3_its_two_weights_sum_to_one() -> None:
    assert COSINE + SMOOTH_L1 == 1.0
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    by_hand = 0.9 * (1 - F.cosine_similarity(x, y, dim=-1)).mean() + 0.1 * F.smooth_l1_loss(x, y)
    assert torch.allclose(spatial_loss(x, y), by_hand)


def _moments(width: int, rows: int = 4000) -> tuple[Moments, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-2, 2, width, dtype=torch.float64)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales @ mix + 50
    moments = Moments.of(width)
    for part in x.split(700):
        moments.update(part)
    return moments, x


@pytest.mark.parametrize("width", [12, 16, 20])
def test_fact_4_phi_s_gives_every_dimension_variance_one_and_keeps_errors_in_proportion(width: int) -> None:
    moments, _ = _moments(width)
    matrix, _ = transform(moments, "phi-s")
    after = matrix @ moments.covariance() @ matrix.T
    assert (after.diagonal() - 1).abs().max() < 1e-9
    square = matrix @ matrix.T
    assert (square / square[0, 0] - torch.eye(width)).abs().max() < 1e-9
    # by contrast: standardising has variances of one too, but is no rotation; whitening makes all of it the identity
    other = transform(moments, "standardise")[0]
    assert ((other @ moments.covariance() @ other.T).diagonal() - 1).abs().max() < 1e-9
    assert (other @ other.T / other[0, 0] ** 2 - torch.eye(width)).abs().max() > 1e-3
    white = transform(moments, "whiten")[0]
    assert (white @ moments.covariance() @ white.T - torch.eye(width)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["phi-s", "standardise", "whiten"])
def test_fact_5_normalisation_can_be_undone(kind: str) -> None:
    moments, x = _moments(12)
    matrix, inverse = transform(moments, kind)
    assert torch.allclose(((x - moments.mean) @ matrix.T) @ inverse.T + moments.mean, x, atol=1e-6)
    normaliser = Normaliser(12)
    normaliser.fit(moments, kind)
    y = x[:50].float()
    assert torch.allclose(normaliser.restored(normaliser(y)), y, rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 48, 64, 96, 144, 192, 320, 384])
def test_fact_6_hadamard_matrices_are_orthogonal(order: int) -> None:
    found = hadamard(order)
    assert found.abs().eq(1).all()
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


def test_fact_6_the_widths_of_real_teachers_are_reached_and_others_fail_loudly() -> None:
    for order in (768, 1024, 1152, 1280, 1408):
        assert reachable(order)
        found = hadamard(order)
        row = torch.randint(order, ())
        assert torch.equal((found @ found[row]).nonzero()[:, 0], row.view(1))
    for order in (3, 6, 10, 30, 92):
        assert not reachable(order)
        with pytest.raises(InputError, match="set normalise to standardise"):
            hadamard(order)
    moments, _ = _moments(10)
    with pytest.raises(InputError, match="eyes has 10 dimensions: no Hadamard"):
        transform(moments, "phi-s", teacher="eyes")


def test_fact_7_cropped_positions_are_the_table_at_its_size_and_crops_of_a_square_else() -> None:
    table = torch.randn(8, 8, 5)
    assert torch.equal(cropped_positions(table, (8, 8))[0], table.flatten(0, 1))
    assert torch.equal(resized_positions(table, (8, 8))[0], table.flatten(0, 1))
    assert cropped_positions(table, (4, 4)).shape == (1, 16, 5)
    square, oblong = cropped_positions(table, (6, 6)), cropped_positions(table, (6, 4))
    assert torch.equal(oblong, square.unflatten(1, (6, 6))[:, :, :4].flatten(1, 2))
    places = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
    found = random_positions(places, (6, 6), batch=50, generator=torch.Generator().manual_seed(0)).unflatten(1, (6, 6))
    assert found.shape == (50, 6, 6, 2) and found.min() >= 0 and found.max() <= 7
    rows, columns = found[..., 0], found[..., 1]
    assert (rows.diff(dim=1) >= 0).all() and (columns.diff(dim=2) >= 0).all()  # a rectangle: order is kept
    assert torch.allclose(rows, rows[:, :, :1].expand_as(rows), atol=1e-5)
    assert (columns[:, 0, -1] - columns[:, 0, 0]).std() > 0.1  # of another size for every picture


def test_fact_8_432_over_16_and_378_over_14_are_one_grid() -> None:
    assert 432 // 16 == 378 // 14 == 27
    x, y = torch.randn(1, 729, 4), torch.randn(1, 729, 4)
    found = on_one_grid(x, (27, 27), y, (27, 27))
    assert found[0] is x and found[1] is y
    small, large = on_one_grid(torch.randn(1, 256, 4), (16, 16), y, (27, 27))
    assert small.shape == large.shape == (1, 729, 4) and large is y
    flat = torch.ones(1, 4, 4)
    assert torch.allclose(on_one_grid(flat, (2, 2), y, (27, 27))[0], torch.ones(1, 729, 4))


GROUPS = (Group(("clip",), (32, 32), 1), Group(("sam",), (48, 48), 1))


def _ranked() -> dict[str, Tensor]:
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from clipgraft.trainer import Step

    made = stage(balance="ranks", groups=GROUPS).train()
    wrapped = DistributedDataParallel(Step(made))
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    wrapped(batch()[rows]).loss.backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def _whole() -> dict[str, Tensor]:
    made = stage(balance="split", groups=GROUPS).train()
    made(batch()).loss.backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_fact_9_two_processes_with_a_group_each_have_the_gradient_of_one_with_both() -> None:
    from clipgraft.testing.ranks import run_ranks

    whole, (first, second) = _whole(), run_ranks(_ranked, 2)
    assert whole.keys() == first.keys() == second.keys()
    for name, wanted in whole.items():
        assert torch.allclose(first[name], wanted, atol=1e-6), name
        assert torch.equal(first[name], second[name])


def test_fact_9_the_gradients_of_two_parts_sum_to_that_of_the_batch() -> None:
    whole, made = _whole(), stage(balance="split", groups=GROUPS).train()
    for part in made.parts(4):
        loss = made.group_loss(part.group, batch().pixels[part.rows])
        (part.weight * sum(loss.values())).backward()
    for name, parameter in made.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, whole[name], atol=1e-6), name


def _written(tmp_path: Path, model: object, *, processor: bool) -> Path:
    import json

    model.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    if processor:
        told = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 28}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    return tmp_path


def test_fact_10_a_radio_directory_teaches_its_summary_and_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.RadioConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32, max_img_size=64,
        summary_idxs=[0, 2],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RadioModel(config).eval()
    _written(tmp_path, model, processor=False)
    teacher = open_teacher(str(tmp_path), setting="teachers.radio", registry=Registry.discover())
    pixels = torch.rand(2, 3, 32, 32)
    said = teacher(pixels)
    assert said.summary.shape == (2, 2 * 16) and said.spatial.shape == (2, 16, 16) and said.grid == (4, 4)
    with torch.no_grad():
        assert torch.allclose(said.summary, model(pixels).summary, atol=1e-5)  # it standardises by itself


# -- other properties ------------------------------------------------------------------------------------------------


def test_a_dino_directory_teaches_its_class_token_and_patches(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28, num_register_tokens=3
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    _written(tmp_path, model, processor=True)
    given = {"setting": "teachers.dino", "registry": Registry.discover()}
    teacher = open_teacher(str(tmp_path), **given)
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        tokens = model((pixels - 0.5) / 0.25).last_hidden_state
        said = teacher(pixels)
        assert torch.allclose(said.summary, tokens[:, 0], atol=1e-5)
        assert torch.allclose(said.spatial, tokens[:, 4:], atol=1e-5) and said.grid == (2, 2)
        assert open_teacher(str(tmp_path), size=56, **given)(pixels).grid == (4, 4)
    with pytest.raises(InputError, match="set it to 56"):
        open_teacher(str(tmp_path), size=50, **given)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="mean and std are unknown"):
        open_teacher(str(tmp_path), **given)


def test_moments_do_not_depend_on_how_rows_came() -> None:
    moments, x = _moments(6, rows=999)
    assert torch.allclose(moments.mean, x.mean(0)) and moments.count == 999
    assert torch.allclose(moments.covariance(), torch.cov(x.T, correction=0), rtol=1e-9)
    parts = [Moments.of(6) for _ in range(3)]
    for part, rows in zip(parts, (x[:10], x[10:10], x[10:]), strict=True):
        part.update(rows)
    together = joined(parts)
    assert torch.allclose(together.scatter, moments.scatter, rtol=1e-9) and together.count == 999


def test_features_that_never_change_are_refused() -> None:
    moments = Moments.of(4)
    moments.update(torch.ones(5, 4))
    with pytest.raises(InputError, match="never change"):
        transform(moments, "phi-s")


def test_an_adaptor_is_a_residual_mlp_or_nothing() -> None:
    adaptor = Adaptor(6, 3, hidden=10, blocks=2)
    count = (6 * 10 + 10) + 2 * (20 + 10 * 10 + 10) + 20 + (10 * 3 + 3)
    assert sum(p.numel() for p in adaptor.parameters()) == count
    x = torch.randn(4, 5, 6)
    h = adaptor.first(x)
    for block in adaptor.blocks:
        h = h + block[2](F.gelu(block[0](h)))
    assert torch.allclose(adaptor(x), adaptor.last[2](F.gelu(adaptor.last[0](h))))
    assert Adaptor(6, 6, hidden=0, blocks=0)(x) is x
    with pytest.raises(InputError, match="without an adaptor"):
        Adaptor(6, 5, hidden=0, blocks=0)


def test_a_student_at_its_own_size_is_the_tower_and_reads_other_sizes() -> None:
    encoder, pixels = tiny_clip(0).eval(), torch.randn(2, 3, 32, 32)
    for positions in ("resize", "crop"):
        student = Student(encoder.image, positions=positions).eval()
        found, plain = student(pixels), encoder.image(pixels, FeatureRequest(tokens=True, layers=(-1,)))
        assert torch.allclose(found.pooled, plain.pooled, atol=1e-5) and torch.allclose(found.cls, plain.cls, atol=1e-5)
        assert torch.allclose(found.tokens, plain.tokens, atol=1e-5)
        assert torch.allclose(found.tower, plain.layers[-1], atol=1e-5)
        assert student(torch.randn(1, 3, 64, 48)).grid == (8, 6)
    assert student.train()(torch.randn(3, 3, 64, 48)).tokens.shape == (3, 48, 32)
    with pytest.raises(InputError, match="multiple"):
        student(torch.randn(1, 3, 30, 32))


def test_groups_take_turns_share_batches_and_processes() -> None:
    one, two = Group(("a",), (32, 32), 3), Group(("b",), (64, 64), 1)
    turns = [alternated((one, two), step).teachers[0] for step in range(8)]
    assert turns[:4].count("a") == 3 and turns[:4] == turns[4:]
    parts = split((one, two), 8)
    assert [(p.rows.start, p.rows.stop, p.weight) for p in parts] == [(0, 6, 0.75), (6, 8, 0.25)]
    assert all(p.rows.stop > p.rows.start for p in split((one, two), 2))
    assert [of_rank((one, two), rank, 4).teachers[0] for rank in range(4)] == ["a", "a", "a", "b"]
    with pytest.raises(InputError, match="set balance to split"):
        of_rank((one, two), 0, 1)
    with pytest.raises(InputError, match="batch_size"):
        split((one, two), 1)


def test_teachers_text_and_scale_are_frozen_and_every_trained_part_gets_a_gradient() -> None:
    made = stage(balance="alternate", groups=GROUPS).train()
    assert made.training and not any(m.training for m in made.teachers.modules())
    learning = {name for name, p in made.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("teachers", "encoder.text", "encoder.logit")) for name in learning)
    for step in range(2):
        made.step = step
        made.zero_grad()
        made(batch()).loss.backward()
        assert all(p.grad is not None for _, p in made.must_receive_gradient())
        idle = made.adaptors.heads["sam-spatial" if step == 0 else "clip-summary"]
        assert not any(p.grad.any() for p in idle.parameters())
    assert made.own.size == (32, 32) and made.encoder.preprocess.size == (48, 48)
    assert made.current_encoder().preprocess.size == (32, 32)


def test_adaptors_speak_for_each_teacher_in_its_own_scale() -> None:
    shape = AdaptorShape(
        teacher="t", kind="spatial", reads="tokens", inputs=12, outputs=12, hidden=0, normalise="phi-s"
    )
    adaptors = Adaptors(shapes=[shape])
    moments, x = _moments(12)
    adaptors.normalisers["t-spatial"].fit(moments, "phi-s")
    encoder = tiny_clip(0, width=12, embed=8)
    student = Student(encoder.image)(torch.randn(1, 3, 32, 32))
    said = adaptors.said("t", student)  # without an adaptor the student's features are in the teacher's space already
    assert torch.allclose(said.spatial, student.tokens, rtol=1e-3, atol=0.05)
    assert said.summary is None and said.grid == (4, 4)
    assert torch.equal(adaptors.predicted("t-spatial", student), adaptors.target("t-spatial", student.tokens))
    learnt = Adaptors(shapes=[shape.model_copy(update={"hidden": 6})])
    learnt.normalisers.load_state_dict(adaptors.normalisers.state_dict())
    guess = learnt.heads["t-spatial"](student.tokens)
    assert torch.equal(learnt.predicted("t-spatial", student), guess)
    wanted = learnt.normalisers["t-spatial"].restored(guess)
    assert torch.allclose(learnt.said("t", student).spatial, wanted)
    name, config = adaptors.registered
    again = Registry.discover().build("head", name, config)
    again.load_state_dict(adaptors.state_dict())
    assert torch.equal(again.target("t-spatial", x[:3].float()), adaptors.target("t-spatial", x[:3].float()))
    with pytest.raises(InputError, match="no adaptor of a teacher 'u'; there are: t"):
        adaptors.said("u", student)


GOLDEN = [2.59405, 1.27952, 1.10577, 0.99779]


def test_twenty_steps_end_where_they_did() -> None:
    made = stage(
        balance="alternate", groups=(Group(("clip", "sam"), (32, 32), 1), Group(("sam",), (48, 48), 1))
    ).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(20):
        made.step = step
        optimizer.zero_grad()
        output = made(batch())
        output.loss.backward()
        optimizer.step()
        found.append(float(output.loss.detach()))
    assert found[0::6] == pytest.approx(GOLDEN, rel=2e-3)
