"""Tables, lists and shards of any kind: a source whose samples are good or bad one by one, or one refusal."""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgraft.data import open_source
from clipgraft.data.base import BadSample, entry_of
from clipgraft.errors import InputError

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]
many, some, few = (settings.get_profile(f"fuzz-{name}") for name in ("many", "some", "few"))

NAMES = st.one_of(
    st.sampled_from(
        ["a.png", "b.png", "gone.png", "", " ", "..", "../a.png", "/etc/passwd", "a\0b", "x" * 300, "é.png", "loop.png"]
    ),
    st.sampled_from(
        ["a.png\n", "\ufeffa.png", "a.png\\", "\udcff.png", "con", "-", "~root/x", "~nobody-here/x", "a/" * 2000]
    ),
    st.text(max_size=8),
)
CELLS = st.one_of(
    NAMES,
    st.sampled_from(
        ["0", "-1", "--1", "²", "٣", "9" * 5000, "nan", "1.0", "=cmd()", "a,b", '"', '""', "\x00", "\r", "\t"]
    ),
    st.text(max_size=12),
)
COLUMNS = st.lists(
    st.sampled_from(["image", "caption", "label", "captions", "Image", "", "caption_weights", "group", "x", "image "]),
    max_size=5,
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7", "cp037")
JSONS: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), CELLS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(arena) -> Path:
    """Two pictures and a loop of links."""
    place = arena.work / "data"
    place.mkdir(exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(place / f"{name}.png")
    (place / "loop.png").unlink(missing_ok=True)
    (place / "loop.png").symlink_to("loop.png")
    return Path(place)


def check(arena: Any, reference: str) -> str:
    """Open, then everything of every sample; the refusal if there was one."""

    def attempt() -> None:
        source = open_source(reference)
        if len(source) > 200:
            return
        for index in range(len(source)):
            for read in (lambda i: source[i], lambda i: entry_of(source, i), lambda i: source.content(i)):
                try:
                    read(index)
                except BadSample as error:
                    assert len(str(error.reason).splitlines()) == 1 and len(error.reason) < 300
                except LookupError:
                    assert not hasattr(source, "content")
        json.dumps([source.fingerprint, list(source.classes), source.name])

    _, said = arena.call(attempt)
    return str(said)


def with_plugin() -> None:
    pytest.importorskip("clipgraft_data")


@many
@given(
    columns=COLUMNS,
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=6),
    encoding=st.sampled_from(ENCODINGS),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    separator=st.sampled_from([",", "\t", ";"]),
    quoted=st.booleans(),
)
def test_any_csv_is_a_source_or_refused(arena, folder, columns, rows, encoding, end, separator, quoted):
    def line(cells: list[str]) -> str:
        return separator.join('"' + c.replace('"', '""') + '"' if quoted else c for c in cells)

    text = end.join(line(cells) for cells in [columns, *rows])
    for suffix in ("csv", "tsv"):
        file = folder / f"t.{suffix}"
        file.write_bytes(codecs.encode(text, encoding, "replace" if encoding[:3] != "utf" else "surrogatepass"))
        check(arena, f"csv:{file}")


@some
@given(content=st.binary(max_size=400))
def test_any_bytes_are_a_table_or_refused(arena, folder, content):
    with_plugin()
    for start in (b"", b"image,caption\n", b"PAR1", b'{"images": [', b"- from: "):
        for scheme, suffix in (("csv", "csv"), ("table", "jsonl"), ("table", "parquet"), ("mix", "yaml")):
            file = folder / f"x.{suffix}"
            file.write_bytes(start + content)
            check(arena, f"{scheme}:{file}")
        for scheme in ("karpathy", "coco"):
            check(arena, f"{scheme}:{file}?images={folder}")


KEYS = ("image", "caption", "captions", "caption_weights", "label", "negatives", "group", "id")


@many
@given(
    rows=st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from(KEYS), JSONS, max_size=5),
            st.builds(
                lambda image, row: {"image": image, **row},
                NAMES,
                st.dictionaries(st.sampled_from(KEYS[1:]), JSONS, max_size=4),
            ),
            JSONS,
        ),
        min_size=1,
        max_size=5,
    ),
    more=st.sampled_from(["", "[" * 50_000, "9" * 5000, '{"image": "a.png", "caption": "\\ud800"}', "NaN", "{'a': 1}"]),
    captions=st.sampled_from(["", "?captions=caption", "?captions=a:0.3,b:1", "?captions=:", "?captions=captions:-1"]),
)
def test_any_json_lines_are_a_source_or_refused(arena, folder, rows, more, captions):
    with_plugin()
    file = folder / "t.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), more]), "utf-8", "surrogatepass")
    check(arena, f"table:{file}{captions}")


@some
@given(
    document=JSONS,
    images=st.lists(
        st.dictionaries(
            st.sampled_from(["id", "file_name", "filename", "filepath", "split", "sentences"]), JSONS, max_size=5
        ),
        max_size=4,
    ),
    notes=st.lists(st.dictionaries(st.sampled_from(["image_id", "caption", "id"]), JSONS, max_size=3), max_size=4),
)
def test_any_caption_file_is_a_source_or_refused(arena, folder, document, images, notes):
    with_plugin()
    file = folder / "t.json"
    for value in (document, {"images": images, "annotations": notes}, {"images": document, "annotations": document}):
        file.write_text(json.dumps(value), "utf-8", "surrogatepass")
        for reference in (
            f"karpathy:{file}?images={folder}",
            f"coco:{file}?images={folder}",
            f"karpathy:{file}?images=a\0b",
        ):
            check(arena, reference)


@few
@given(
    entries=st.lists(
        st.one_of(
            JSONS,
            st.fixed_dictionaries(
                {
                    "from": st.sampled_from(
                        [
                            "csv:t.csv",
                            "mix:m.yaml",
                            "data/mix?path=m.yaml",
                            " mix:m.yaml",
                            "mix?path=m.yaml",
                            "folder:.",
                            "",
                        ]
                    )
                },
                optional={"weight": JSONS},
            ),
        ),
        max_size=4,
    )
)
def test_any_mix_is_a_source_or_refused(arena, folder, entries):
    with_plugin()
    (folder / "m.yaml").write_text(json.dumps(entries), "utf-8", "surrogatepass")
    (arena.work / "m.yaml").write_text(json.dumps(entries), "utf-8", "surrogatepass")
    check(arena, f"mix:{folder / 'm.yaml'}")


# -- shards --------------------------------------------------------------------------------------------------------

PIXELS = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PIXELS, "PNG")
TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 8
    + [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
    ]
)
MEMBERS = st.tuples(
    st.one_of(
        st.sampled_from(
            [
                "0.png",
                "0.txt",
                "0.json",
                "0.cls",
                "1.png",
                "1.txt",
                "a/b.PNG",
                "__x__.txt",
                ".png",
                "0.tar.gz",
                "./0.png",
                "0..png",
            ]
        ),
        NAMES,
    ),
    TYPES,
    st.one_of(
        st.just(PIXELS.getvalue()),
        CELLS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        JSONS.map(lambda v: json.dumps(v).encode()),
        st.sampled_from([b"[" * 50_000, b"9" * 5000]),
    ),
)


def written(members: list[tuple[str, bytes, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            try:
                tar.addfile(info, io.BytesIO(content) if info.size else None)
            except (ValueError, UnicodeError):
                continue
    return buffer.getvalue()


@many
@given(
    members=st.lists(MEMBERS, max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    settings_=st.sampled_from(
        ["", "?truncated=keep", "?lines=true", "?captions=caption", "?captions=a:1,b:2&truncated=keep"]
    ),
)
def test_any_shard_is_a_source_or_refused(arena, folder, members, form, settings_):
    with_plugin()
    (folder / "s.tar").write_bytes(written(members, form))
    check(arena, f"wds:{folder / 's.tar'}{settings_}")


GOOD = [
    (f"{i}.{suffix}", tarfile.REGTYPE, content)
    for i in range(3)
    for suffix, content in (("png", PIXELS.getvalue()), ("txt", b"red"), ("cls", b"1"))
]


@many
@given(
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    edits=st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=12)), max_size=4),
    cut=st.integers(0, 14_000),
    keep=st.sampled_from(["", "?truncated=keep"]),
)
def test_a_damaged_shard_is_a_source_or_refused(arena, folder, form, edits, cut, keep):
    with_plugin()
    content = bytearray(written(GOOD, form))
    for place, value in edits:
        content[place : place + len(value)] = value
    (folder / "s.tar").write_bytes(content[: cut or None])
    check(arena, f"wds:{folder / 's.tar'}{keep}")


@some
@given(path=st.one_of(st.text("{}.,0123456789:as/*?[]$~\\-", max_size=25), NAMES))
def test_any_pattern_of_shards_is_opened_or_refused(arena, folder, path):
    with_plugin()
    check(arena, f"wds:{path}")
    check(arena, f"wds:{folder}/{path}.tar")


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.png", b"\xc3\x28/a.png", "\u202egnp.png".encode(), b"-rf.png", b"a\nb.png"]
)
def test_names_that_are_no_text_stay_names(arena, name):
    """A file system holds bytes; nothing that is printed, logged or hashed may fail on them."""
    with_plugin()
    place = arena.work / "odd"
    target = Path(os.fsdecode(bytes(place) + b"/" + name))
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(target, "PNG")
    assert not check(arena, f"folder:{place}")
    for flags in ((), ("--json",)):
        outcome = arena.command("data", "check", f"folder:{place}", "--out", str(arena.out / "r.json"), *flags)
        assert outcome.code == 0
        if flags:
            json.loads(outcome.out)
    json.loads((arena.out / "r.json").read_text("utf-8"))
    shutil.rmtree(place)


def test_a_fifo_and_a_device_in_a_folder_never_block(arena, folder):

    place = arena.work / "pipes"
    place.mkdir()
    os.mkfifo(place / "a.png")
    Image.new("RGB", (8, 8), "red").save(place / "b.png")
    check(arena, f"folder:{place}")
    (place / "t.csv").write_text("image,caption\na.png,x\n", "utf-8")
    check(arena, f"csv:{place / 't.csv'}")
    os.mkfifo(place / "u.csv")
    with pytest.raises(InputError):
        open_source(f"csv:{place / 'u.csv'}")
