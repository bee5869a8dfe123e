from clipgraft.data.base import Sample
from clipgraft_diffusion.source import Part, held_out_split


class Numbers:
    """n samples whose id is their index."""

    name, fingerprint, classes, templates, attributes = (
        "numbers",
        "n",
        ("a", "b"),
        ("a {}",),
        {"parity": ("even", "odd")},
    )

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return Sample(str(index), None, label=index % 2)


def ids(source):
    return [int(source[i].id) for i in range(len(source))]


def test_every_tenth_image_is_held_out():
    train, held = held_out_split(Numbers(100), batch_size=16)
    assert ids(held) == list(range(9, 100, 10))
    assert sorted(ids(train) + ids(held)) == list(range(100))
    assert train.classes == ("a", "b")
    assert train.attributes["parity"] == ("even", "odd")
    assert len({train.fingerprint, held.fingerprint, "n"}) == 3


def test_at_most_256_are_held_out():
    train, held = held_out_split(Numbers(10_001), batch_size=16)
    assert 200 < len(held) <= 256
    assert not set(ids(train)) & set(ids(held))


def test_a_small_source_is_measured_on_what_it_trains_on():
    source = Numbers(17)
    train, held = held_out_split(source, batch_size=16)
    assert train is source
    assert ids(held) == list(range(17))


def test_part_has_its_own_fingerprint():
    source = Numbers(10)
    assert Part(source, range(4)).fingerprint != Part(source, range(5)).fingerprint
