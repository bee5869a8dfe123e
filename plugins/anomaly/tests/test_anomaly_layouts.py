"""Folders and tables of pictures with masks, written in their published layouts."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, Listed, Source
from clipgraft.errors import InputError
from clipgraft.log import RunLog
from clipgraft_anomaly.inspection import Masked, mask_of, name_of, names_of, open_inspection

torch.set_num_threads(1)


def picture(path, size=(8, 6), value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def mask(path, size=(8, 6), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[1:3, 2:5] = value
    Image.fromarray(pixels).save(path)


def mvtec_tree(root, part="bottle", kinds=("scratch", "dent")):
    for n in range(2):
        picture(root / part / "train/good" / f"{n:03}.png", value=n)
        picture(root / part / "test/good" / f"{n:03}.png", value=10 + n)
    for kind in kinds:
        for n in range(2):
            picture(root / part / "test" / kind / f"{n:03}.png", value=20 + n)
            mask(root / part / "ground_truth" / kind / f"{n:03}_mask.png")


def facts(source):
    return [(source.entry(i).id, source.entry(i).label, source.mask(i) is not None) for i in range(len(source))]


def test_mvtec_test_split_has_kinds_and_masks_of_the_same_stem(tmp_path):
    mvtec_tree(tmp_path)
    mvtec_tree(tmp_path, "screw", ("thread",))
    (tmp_path / "license").mkdir()
    source = open_inspection(f"mvtec:{tmp_path}")
    assert isinstance(source, Source) and isinstance(source, Listed) and isinstance(source, Masked)
    assert len(source) == 6 + 4 and names_of(source) == ("bottle", "screw")
    assert source.attributes["kind"] == ("good", "dent", "scratch", "thread")
    ids = [source.entry(i).id for i in range(len(source))]
    assert ids == [source[i].id for i in range(len(source))] and len(set(ids)) == 10
    sample = source[ids.index("bottle/test/dent/001.png")]
    assert sample.label == 1 and name_of(source, sample) == "bottle" and sample.group == "bottle"
    found = mask_of(source, ids.index(sample.id), sample)
    assert found.dtype == torch.uint8 and found.shape == (6, 8) and int(found.sum()) == 6
    good = ids.index("screw/test/good/000.png")
    assert source.mask(good) is None and int(mask_of(source, good, source[good]).sum()) == 0
    assert source.content(0) == (tmp_path / ids[0]).read_bytes()
    again = pickle.loads(pickle.dumps(source))  # worker processes
    assert again.fingerprint == source.fingerprint and again[3].id == source[3].id


def test_splits_and_objects_are_chosen_by_the_reference_and_share_nothing(tmp_path):
    mvtec_tree(tmp_path)
    mvtec_tree(tmp_path, "screw")
    both = {split: open_source(f"mvtec:{tmp_path}?split={split}") for split in ("train", "test")}
    ids = {split: {s.entry(i).id for i in range(len(s))} for split, s in both.items()}
    assert not ids["train"] & ids["test"] and len(ids["train"]) == 4 and ids["train"] | ids["test"]
    assert both["train"].fingerprint != both["test"].fingerprint
    one = open_source(f"mvtec:{tmp_path}?object=screw")
    assert names_of(one) == ("screw",) and {one.entry(i).group for i in range(len(one))} == {"screw"}
    assert [e for e in ids["test"] if e.startswith("screw")] and len(one) == 6
    two = open_source(f"mvtec:{tmp_path}?object=[screw,bottle]")
    assert len(two) == 12
    with pytest.raises(InputError, match="did you mean screw"):
        open_source(f"mvtec:{tmp_path}?object=screws")
    with pytest.raises(InputError, match="split"):
        open_source(f"mvtec:{tmp_path}?split=tune")
    alone = open_source(f"mvtec:{tmp_path / 'screw'}")
    assert names_of(alone) == ("screw",) and len(alone) == 6


def test_masks_that_could_belong_to_two_pictures_are_refused(tmp_path):
    mvtec_tree(tmp_path)
    mask(tmp_path / "bottle/ground_truth/scratch/000.png")
    with pytest.raises(InputError, match="has two masks"):
        open_source(f"mvtec:{tmp_path}")
    (tmp_path / "bottle/ground_truth/scratch/000.png").unlink()
    picture(tmp_path / "bottle/test/scratch/000.bmp")
    with pytest.raises(InputError, match="could belong to"):
        open_source(f"mvtec:{tmp_path}")


def test_a_flat_mask_folder_is_refused_when_kinds_repeat_stems_and_taken_when_they_do_not(tmp_path):
    for kind in ("scratch", "dent"):
        picture(tmp_path / "abnormal" / kind / "000.png")
    picture(tmp_path / "normal/000.png")
    mask(tmp_path / "mask/000.png")
    with pytest.raises(InputError, match="could belong to abnormal/dent"):
        open_inspection(f"folder:{tmp_path}")
    (tmp_path / "abnormal/dent/000.png").rename(tmp_path / "abnormal/dent/001.png")
    mask(tmp_path / "mask/001_mask.png")
    source = open_inspection(f"folder:{tmp_path}")
    assert facts(source) == [
        ("normal/000.png", 0, False),
        ("abnormal/dent/001.png", 1, True),
        ("abnormal/scratch/000.png", 1, True),
    ]


def test_missing_masks_are_told_and_never_replaced_by_the_next_file(tmp_path, capsys):
    mvtec_tree(tmp_path)
    (tmp_path / "bottle/ground_truth/scratch/000_mask.png").unlink()
    source = open_inspection(f"mvtec:{tmp_path}", log=RunLog())
    assert "1 of 4 anomalous pictures have no mask (bottle/test/scratch/000.png)" in capsys.readouterr().err
    at = {source.entry(i).id: i for i in range(len(source))}
    bare = at["bottle/test/scratch/000.png"]
    assert source.mask(bare) is None and mask_of(source, bare, source[bare]) is None
    assert source.mask(at["bottle/test/scratch/001.png"]) is not None


def test_empty_and_unrelated_mask_folders_are_errors(tmp_path):
    for n in range(2):
        picture(tmp_path / "normal" / f"{n}.png")
        picture(tmp_path / "abnormal" / f"{n}.png")
    assert [row[2] for row in facts(open_inspection(f"folder:{tmp_path}"))] == [False] * 4
    (tmp_path / "mask").mkdir()
    with pytest.raises(InputError, match="mask folder mask is empty"):
        open_inspection(f"folder:{tmp_path}")
    mask(tmp_path / "mask/other.png")
    with pytest.raises(InputError, match="none of 1 masks"):
        open_inspection(f"folder:{tmp_path}")
    mvtec_tree(tmp_path / "m")
    for n in range(2):
        (tmp_path / "m/bottle/ground_truth/dent" / f"{n:03}_mask.png").unlink()
    with pytest.raises(InputError, match="ground_truth/dent is empty"):
        open_inspection(f"mvtec:{tmp_path / 'm'}")


def test_a_mask_of_another_size_is_refused_and_a_turned_picture_has_its_upright_size(tmp_path):
    picture(tmp_path / "abnormal/a.png")
    picture(tmp_path / "normal/a.png")
    mask(tmp_path / "mask/a.png", size=(8, 7))
    source = open_inspection(f"folder:{tmp_path}")
    with pytest.raises(InputError, match=r"8 x 7 pixels, its picture abnormal/a.png 8 x 6"):
        source.mask(1)
    turned = Image.new("RGB", (7, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "abnormal/a.png", exif=exif)
    source = open_inspection(f"folder:{tmp_path}")
    assert source[1].image.size == (8, 7) and source.mask(1).shape == (7, 8)


def test_masks_hold_ids_palettes_and_bits_and_no_jpeg(tmp_path):
    pixels = np.zeros((6, 8), np.uint8)
    pixels[0, :3] = (1, 2, 7)
    kinds = {
        "ids": Image.fromarray(pixels),
        "wide": Image.fromarray(pixels.astype(np.uint16)),
        "bits": Image.fromarray(pixels > 0),
        "colour": Image.fromarray(np.stack([pixels * 0, pixels, pixels * 0], -1)),
        "clear": Image.fromarray(np.stack([pixels, pixels, pixels, pixels * 0 + 255], -1)),
    }
    kinds["palette"] = Image.fromarray(pixels, "L").convert("P")
    kinds["palette"].putpalette([0, 0, 0] * 256)  # all black; the indices count
    for name, image in kinds.items():
        picture(tmp_path / "bad" / f"{name}.jpg")
        (tmp_path / "mask").mkdir(exist_ok=True)
        image.save(tmp_path / "mask" / f"{name}.png")
    source = open_inspection(f"folder:{tmp_path}")
    for i in range(len(source)):
        assert torch.equal(source.mask(i), torch.from_numpy((pixels > 0).astype(np.uint8))), source.entry(i).id
    Image.fromarray(pixels).save(tmp_path / "mask/ids.jpg")
    with pytest.raises(InputError, match="is a JPEG"):
        open_inspection(f"folder:{tmp_path}")


def test_damaged_and_huge_files_are_bad_samples(tmp_path):
    mvtec_tree(tmp_path)
    (tmp_path / "bottle/ground_truth/dent/000_mask.png").write_bytes(b"nothing")
    source = open_inspection(f"mvtec:{tmp_path}")
    at = [source.entry(i).id for i in range(len(source))].index("bottle/test/dent/000.png")
    with pytest.raises(BadSample, match=r"mask 000_mask.png"):
        source.mask(at)
    small = open_inspection(f"mvtec:{tmp_path}", max_pixels=20)
    with pytest.raises(BadSample, match="8 x 6"):
        small[0]
    with pytest.raises(BadSample, match="8 x 6"):
        small.mask(at)


def test_a_folder_may_be_split_have_kinds_beside_good_or_hold_many_parts(tmp_path):
    for split, kind in (("train", "good"), ("test", "good"), ("test", "scratch"), ("test", "dent")):
        picture(tmp_path / "split" / split / kind / "1.png")
    mask(tmp_path / "split/ground_truth/scratch/1_mask.png")
    mask(tmp_path / "split/ground_truth/dent/1_mask.png")
    source = open_inspection(f"folder:{tmp_path / 'split'}?name=bracket")
    assert [row[0] for row in facts(source)] == ["test/good/1.png", "test/dent/1.png", "test/scratch/1.png"]
    assert names_of(source) == ("bracket",) and source.attributes["kind"] == ("good", "dent", "scratch")
    assert len(open_inspection(f"folder:{tmp_path / 'split'}?split=train")) == 1
    for kind in ("OK", "scratch"):
        picture(tmp_path / "many/left" / kind / "1.png")
        picture(tmp_path / "many/right/test" / kind / "1.png")
    many = open_inspection(f"folder:{tmp_path / 'many'}")
    assert names_of(many) == ("left", "right") and [row[1] for row in facts(many)] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no picture of split train, it has: test"):
        open_inspection(f"folder:{tmp_path / 'many'}?split=train")


def test_folders_of_other_names_are_told_and_mixtures_refused(tmp_path):
    picture(tmp_path / "fine/1.png")
    picture(tmp_path / "broken/1.png")
    mask(tmp_path / "where/1.png")
    with pytest.raises(InputError, match="found broken, fine, where"):
        open_inspection(f"folder:{tmp_path}")
    source = open_inspection(f"folder:{tmp_path}?normal=fine&abnormal=broken&mask=where")
    assert facts(source) == [("fine/1.png", 0, False), ("broken/1.png", 1, True)]
    with pytest.raises(InputError, match="no folder wher;"):
        open_inspection(f"folder:{tmp_path}?normal=fine&abnormal=broken&mask=wher")
    picture(tmp_path / "good/1.png")
    picture(tmp_path / "bad/1.png")
    with pytest.raises(InputError, match="bad and also broken"):
        open_inspection(f"folder:{tmp_path}")
    picture(tmp_path / "stray.png")
    with pytest.raises(InputError, match="clipgraft anomaly predict"):
        open_inspection(f"folder:{tmp_path}")


class Pairs:
    """Minimal pairs."""

    name, fingerprint, patterns = "pairs", "pairs", ("a",)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError("nothing is read")


def test_what_is_no_inspection_data_is_refused(tmp_path, monkeypatch):
    mvtec_tree(tmp_path)
    whole = open_source(f"mvtec:{tmp_path}")
    whole.classes = ("cat", "dog", "bird")
    monkeypatch.setattr("clipgraft.data.open_source", lambda *args, **more: whole)
    with pytest.raises(InputError, match="3 classes"):
        open_inspection("animals")
    monkeypatch.setattr("clipgraft.data.open_source", lambda *args, **more: Pairs())
    with pytest.raises(InputError, match="minimal pairs"):
        open_inspection("pairs")


def visa_tree(root, part="pcb1"):
    rows = ["object,split,label,image,mask"]
    for n, split in enumerate(("train", "test")):
        picture(root / part / "Data/Images/Normal" / f"{n:04}.JPG", value=n)
        rows.append(f"{part},{split},normal,{part}/Data/Images/Normal/{n:04}.JPG,")
    for n in range(2):
        picture(root / part / "Data/Images/Anomaly" / f"{n:03}.JPG", value=30 + n)
        mask(root / part / "Data/Masks/Anomaly" / f"{n:03}.png", value=n + 1)  # ids, not 255
        image, where = f"{part}/Data/Images/Anomaly/{n:03}.JPG", f"{part}/Data/Masks/Anomaly/{n:03}.png"
        rows.append(f"{part},test,anomaly,{image},{where}")
    table = root / "split_csv/1cls.csv"
    table.parent.mkdir(exist_ok=True)
    if table.exists():
        rows = [*table.read_text().splitlines(), *rows[1:]]
    table.write_text("\n".join(rows) + "\n")
    return table


def test_visa_as_published_follows_its_table_and_masks_hold_small_ids(tmp_path):
    visa_tree(tmp_path)
    table = visa_tree(tmp_path, "candle")
    source = open_inspection(f"visa:{tmp_path}?object=candle")
    assert facts(source) == [
        ("candle/Data/Images/Normal/0001.JPG", 0, False),
        ("candle/Data/Images/Anomaly/000.JPG", 1, True),
        ("candle/Data/Images/Anomaly/001.JPG", 1, True),
    ]
    assert [int(source.mask(i).max()) for i in (1, 2)] == [1, 1]
    assert len(open_inspection(f"visa:{tmp_path}")) == 6 and len(open_inspection(f"visa:{tmp_path}?split=train")) == 2
    (tmp_path / "candle/Data/Masks/Anomaly/001.png").unlink()
    noted = open_inspection(f"visa:{tmp_path}")
    assert "1 of 4 anomalous pictures have no mask" in noted.notes[0]
    with pytest.raises(InputError, match=r"2cls_fewshot\.csv is missing"):
        open_inspection(f"visa:{tmp_path}?protocol=2cls_fewshot")
    table.write_text(table.read_text().replace("pcb1,test,normal", "pcb1,test,fine"))
    with pytest.raises(InputError, match="line 3 has label 'fine'"):
        open_inspection(f"visa:{tmp_path}")
    table.write_text("object,split,label,image\n")
    with pytest.raises(InputError, match="no column mask"):
        open_inspection(f"visa:{tmp_path}")


@pytest.mark.parametrize("inside", ["", "1cls", "visa_pytorch"])
def test_visa_converted_to_folders(tmp_path, inside):
    part = tmp_path / inside / "candle"
    for where in ("train/good/0", "test/good/1", "test/bad/0", "test/bad/1"):
        picture(part / f"{where}.JPG")
    for n in range(2):
        mask(part / f"ground_truth/bad/{n}.png")
    source = open_inspection(f"visa:{tmp_path}")
    assert [row[1:] for row in facts(source)] == [(1, True), (1, True), (0, False)] and names_of(source) == ("candle",)
    with pytest.raises(InputError, match="neither split_csv"):
        open_inspection(f"visa:{part / 'test'}")
    with pytest.raises(InputError, match="needs split_csv"):
        open_inspection(f"visa:{tmp_path}?protocol=2cls_highshot")


def test_tables_in_csv_and_json_lines_say_the_same(tmp_path):
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png")
    picture(tmp_path / "images/c.png")
    mask(tmp_path / "images/b_damage.png")
    (tmp_path / "parts.csv").write_text(
        "image,label,mask,object,split\nimages/a.png,good,,nut,test\nimages/b.png,1,images/b_damage.png,nut,test\n"
        "images/c.png,normal,,nut,train\n"
    )
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/parts.jsonl").write_text(
        '{"image": "a.png", "label": 0, "object": "nut"}\n\n'
        '{"image": "b.png", "label": true, "mask": "b_damage.png", "object": "nut", "split": "test"}\n'
        '{"image": "c.png", "label": false, "mask": null, "object": "nut", "split": "train"}\n'
    )
    one = open_inspection(f"csv:{tmp_path / 'parts.csv'}")
    two = open_inspection(f"parts-table:{tmp_path / 'tables/parts.jsonl'}?root=../images")
    assert facts(one) == [("images/a.png", 0, False), ("images/b.png", 1, True)]
    assert [row[1:] for row in facts(two)] == [row[1:] for row in facts(one)] and names_of(one) == names_of(two)
    assert torch.equal(one.mask(1), two.mask(1)) and len(open_inspection(f"csv:{tmp_path / 'parts.csv'}?split=train"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,mask\na.png,\n", "columns image and label"),
        ("image,label\na.png,maybe\n", "line 2: label 'maybe'"),
        ("image,label\na.png,\n", "line 2: has no label"),
        ("image,label\na.png,0\na.png,0\n", "listed before"),
        ("image,label,mask\na.png,1,m.png\n", r"no mask m\.png"),
        ("image,label,mask\na.png,1,m.jpg\n", "is a JPEG"),
        ("image,label\na.png,0,5\n", "more cells"),
        ("image,label\n", "holds no row"),
    ],
)
def test_tables_with_mistakes_name_the_line(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        open_inspection(f"parts-table:{tmp_path / 't.csv'}")


def test_a_table_cannot_reach_outside_its_root(tmp_path):
    picture(tmp_path / "outside.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/t.csv").write_text("image,label\n../outside.png,0\n")
    source = open_inspection(f"csv:{tmp_path / 'in/t.csv'}")
    with pytest.raises(BadSample, match="leaves the data folder"):
        source[0]
    with pytest.raises(BadSample, match="leaves the data folder"):
        source.content(0)
