"""What is exported opens everywhere and computes the same; its card tells the truth; the hub gets all of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import nn

from clipgraft import card as cards
from clipgraft import hub
from clipgraft.checkpoint import copy_export, described, read_component, read_manifest, write_export
from clipgraft.cli import main
from clipgraft.encoders import load
from clipgraft.encoders.base import Encoder
from clipgraft.encoders.huggingface import write_huggingface
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.registry import Registry, use
from clipgraft.testing.tiny import tiny_clip

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a red circle", "zebra", "two cats"]
KINDS = ["vit", "custom-text", "siglip-timm"]
CARD = {
    "recipe": "core/finetune",
    "summary": "Train.",
    "paper": "Somebody, Something, 2020",
    "model": "/home/somebody/secret-project/clip",
    "data": "csv:/home/somebody/secret-project/pairs.csv",
    "seed": 3,
    "settings": "model: {from: /home/somebody/secret-project/clip}\n",
    "measured": [],
    "kept": [],
    "license": None,
    "sources": None,
    "limits": None,
}
ROW = {
    **{"evaluator": "core/zero-shot", "metric": "top1", "a": 0.5, "b": 0.75, "difference": 0.25, "low": 0.125},
    **{"high": 0.375, "p": 0.01, "p_adjusted": 0.02, "test": "McNemar", "verdict": "better", "n": 64},
}


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with use(Registry.discover(allow=())) as found:
        yield found


@torch.no_grad()
def logits(encoder: Encoder) -> torch.Tensor:
    image, text = encoder.eval()(PIXELS, encoder.tokenizer(TEXTS))
    assert image is not None and text is not None
    scores = encoder.logit_scale.exp() * image.unit() @ text.unit().T
    return scores if encoder.logit_bias is None else scores + encoder.logit_bias


@torch.no_grad()
def in_open_clip(folder: Path) -> torch.Tensor:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    image, text = model.eval().encode_image(PIXELS, normalize=True), model.encode_text(tokens, normalize=True)
    return model.logit_scale.exp() * image @ text.T


@torch.no_grad()
def in_transformers(folder: Path, kind: str) -> torch.Tensor:
    cls = transformers.SiglipModel if kind == "siglip-timm" else transformers.CLIPModel
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", max_length=16)["input_ids"]
    return cls.from_pretrained(folder).eval()(input_ids=torch.tensor(ids), pixel_values=PIXELS).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["clipgraft", "open_clip", "huggingface"])
def test_every_format_computes_the_same_and_loads_again(tmp_path, registry, kind, format):
    encoder = tiny_clip(kind=kind)
    write_export(encoder, tmp_path / "model")
    argv = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--format", format]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    if (kind, format) == ("siglip-timm", "open_clip"):
        assert ended.value.code == 2 and not (tmp_path / "out").exists()
        return
    assert not ended.value.code
    torch.testing.assert_close(logits(load(str(tmp_path / "out"), registry=registry)), logits(encoder))
    if format == "huggingface":
        torch.testing.assert_close(in_transformers(tmp_path / "out", kind), logits(encoder), atol=1e-5, rtol=1e-5)
    elif kind != "siglip-timm":
        torch.testing.assert_close(in_open_clip(tmp_path / "out"), logits(encoder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_through_transformers_is_exact(tmp_path, registry, kind):
    write_huggingface(tiny_clip(kind=kind), tmp_path / "hf")
    write_export(load(str(tmp_path / "hf"), registry=registry), tmp_path / "ours")
    write_huggingface(load(str(tmp_path / "ours"), registry=registry), tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "hf/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()


@torch.no_grad()
def test_clips_own_vocabulary_goes_along_to_transformers(tmp_path, registry):
    """open_clip has it built in and saves nothing; transformers' processor needs files."""
    from clipgraft.encoders.tokenizers import BpeTokenizer

    encoder = tiny_clip(vocab=49408, context=77, width=16)
    encoder.data.tokenizer = BpeTokenizer(77)
    folder = write_huggingface(encoder, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = ["A photo of a Cat!", "two dogs, one of them asleep", "", "naïve café — 12 €"]
    theirs = processor.tokenizer(texts, padding="max_length", max_length=77)["input_ids"]
    for row, ours in zip(theirs, encoder.tokenizer(texts).tolist(), strict=True):
        end = ours.index(49407)
        assert row[: end + 1] == ours[: end + 1] and set(row[end:]) == {49407}, "it pads with the end token"
    pixels = processor.image_processor(torch.rand(3, 40, 50), return_tensors="pt", do_rescale=False)["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    found = model(input_ids=torch.tensor(theirs), pixel_values=PIXELS).logits_per_image
    image, text = encoder.eval()(PIXELS, encoder.tokenizer(texts))
    torch.testing.assert_close(found, encoder.logit_scale.exp() * image.unit() @ text.unit().T, atol=1e-5, rtol=1e-5)
    again = load(str(folder), registry=registry)
    assert torch.equal(again.tokenizer(texts), encoder.tokenizer(texts))


class Bend:
    """A graft that stays."""

    portable = False

    def apply(self, encoder: Encoder) -> Encoder:
        encoder.image.bend = nn.Parameter(torch.ones(1))
        return encoder

    def merge(self, encoder: Encoder) -> Encoder:
        return encoder


def test_what_another_library_cannot_hold_is_refused_with_the_reason(tmp_path, monkeypatch):
    from clipgraft.encoders.base import AppliedGraft

    encoder = tiny_clip()
    encoder.data.grafts.append(AppliedGraft("some/bend", {}, Bend(), portable=False))
    with pytest.raises(InputError, match=r"can't hold tiny:vit/0: the graft some/bend changes .*leave --format out"):
        write_huggingface(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- copies --------------------------------------------------------------------------------------------------------


class Head(nn.Linear):
    registered = ("core/linear-probe", {"classes": ["a", "b"], "width": 16})


def test_a_run_or_an_export_is_copied_with_its_components(tmp_path, registry, capsys):
    head = Head(16, 2)
    write_export(tiny_clip(), tmp_path / "run/export", components={"head": head}, card=CARD)
    argv = [
        "export",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "copy"),
        "--license",
        "MIT",
        "--sources",
        "ours: x",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["export"] == str(tmp_path / "copy")
    assert torch.equal(read_component(tmp_path / "copy", "head")["weight"], head.weight)
    manifest = read_manifest(tmp_path / "copy")
    assert manifest["card"]["license"] == "MIT" and manifest["card"]["recipe"] == "core/finetune"
    assert "This model: MIT." in (tmp_path / "copy/README.md").read_text()
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--format", "huggingface"])
    assert "left out, transformers has no place for it: head" in capsys.readouterr().err
    assert "core/finetune on clip" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "inner/../../outside.txt"])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(tmp_path, name):
    write_export(tiny_clip(), tmp_path / "a" / "model")
    (tmp_path / "a" / "outside.txt").write_text("mine")
    file = tmp_path / "a" / "model" / "clipgraft.json"
    manifest = json.loads(file.read_text())
    manifest["files"] = {name: {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}, **manifest["files"]}
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="which is no file of that folder"):
        copy_export(tmp_path / "a" / "model", tmp_path / "b" / "copy")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("argv", "message"), [
    (["export", "x"], "say where to: --out DIR, or --push-to-hub ORG/NAME"),
    (["export", "x", "--out", "y", "--private"], "--private goes with --push-to-hub"),
    (["export", "x", "--push-to-hub", "just-a-name"], "write ORG/NAME, such as my-name/just-a-name"),
    (["export", "x", "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: Repo id must be"),
    (["export", "x", "--push-to-hub", "me/it"], "needs a token of the hub that may write: hf auth login"),
])  # fmt: skip
def test_refusals_come_before_any_work(capsys, monkeypatch, registry, argv, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(argv)
    told = capsys.readouterr()
    assert ended.value.code == 2 and message in told.err and told.out == ""


# -- cards ---------------------------------------------------------------------------------------------------------


def rendered(manifest: dict | None = None, **more: object) -> str:
    base = described(tiny_clip(), lineage=[{"recipe": "core/finetune", "base": "hf:openai/clip", "seed": 3}])
    return cards.render({**base, **(manifest or {}), "card": {**CARD, **more}})


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard(rendered(license="Apache-2.0")).data
    assert (data.library_name, data.pipeline_tag) == ("open_clip", "zero-shot-image-classification")
    assert data.license == "apache-2.0" and data.base_model == "openai/clip"
    assert data.tags == ["clip", "clipgraft", "finetune"]
    other = ModelCard(rendered(license="My Own Licence")).data.to_dict()
    assert (other["license"], other["license_name"]) == ("other", "my-own-licence")
    bare = ModelCard(cards.render(described(tiny_clip()))).data.to_dict()
    assert not bare.keys() & {"license", "base_model"}, "nothing is claimed that isn't known"
    assert ModelCard(cards.render(described(tiny_clip(kind="siglip-timm")))).data.library_name == "clipgraft"
    blind = tiny_clip()
    blind.text = None
    assert ModelCard(cards.render(described(blind))).data.pipeline_tag == "image-feature-extraction"


def test_base_models_by_their_names_on_the_hub():
    assert cards.hub_name("hf:openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert cards.hub_name("open_clip:ViT-B-32/laion2b_s34b_b79k") == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert (
        cards.hub_name("toyworld/clip") == cards.hub_name("open_clip:ViT-B-32") == cards.hub_name("some/folder") == ""
    )


def test_a_card_tells_what_was_measured_what_it_cost_and_what_nobody_said():
    text = rendered(measured=[ROW], limits="Not for anything important.")
    assert "| core/zero-shot.top1 | 0.5000 | 0.7500 | +0.2500 [+0.1250, +0.3750] | 0.02 | better |" in text
    assert "What the model could do before and may have lost was not measured." in text
    assert "This model: not stated." in text and "Not for anything important." in text
    assert "Method: Somebody, Something, 2020" in text and "from `hf:openai/clip`" in text
    assert 'open_clip.create_model_and_transforms("local-dir:DIR")' in text
    assert "Nothing was measured in this run." in rendered()
    named = rendered(sources={"base": "MIT", "data": "CC-BY-4.0"})
    assert "the base model and the data: base: MIT; data: CC-BY-4.0." in named


def test_a_card_shows_no_folder_of_this_machine():
    text = rendered()
    assert "secret-project" not in text and "somebody/" not in text
    assert "# core/finetune on clip" in text and "`csv:pairs.csv`" in text and "from: clip}" in text
    assert cards._public("see https://example.org/a/b and hf:x/y, a/b/c, 1 / 2") == (
        "see https://example.org/a/b and hf:x/y, a/b/c, 1 / 2"
    )


def test_merged_models_are_listed_with_how_they_came_to_be():
    inner = [
        {"recipe": "llm/negclip", "base": "toyworld/clip", "base_sha256": "a" * 64, "data": "some/data", "seed": 1}
    ]
    models = [{"uri": "one", "sha256": "b" * 64, "lineage": inner}, {"uri": "two", "sha256": "c" * 64}]
    text = rendered({"lineage": [{"merge": "merging/soup", "base": "toyworld/clip", "models": models}]})
    assert "    - merges `one`, sha256 bbbbbbbbbbbb…\n        - llm/negclip, from `toyworld/clip`" in text
    assert "data `some/data`, seed 1" in text and ModelCard(text).data.tags == ["clip", "clipgraft", "soup"]


# -- the hub -------------------------------------------------------------------------------------------------------


class Api:
    """A hub that is a list of calls."""

    calls: ClassVar[list[tuple]] = []
    fail: Exception | None = None
    private = True

    def __init__(self, library_name: str) -> None: ...

    def create_repo(self, name, *, private, exist_ok, repo_type):
        if Api.fail:
            raise Api.fail
        Api.calls.append(("create", name, private))
        return f"https://hub.test/{name}"

    def model_info(self, name):
        return SimpleNamespace(private=Api.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Api.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def api(monkeypatch) -> type[Api]:
    Api.calls, Api.fail, Api.private = [], None, True
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_verysecret")
    return Api


def test_a_push_needs_no_folder_and_never_puts_private_things_in_the_open(tmp_path, api, registry, capsys):
    write_export(tiny_clip(), tmp_path / "model")
    argv = ["export", str(tmp_path / "model"), "--push-to-hub", "me/it", "--private", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    found = json.loads(capsys.readouterr().out)
    assert not ended.value.code and found["hub"] == "https://hub.test/me/it" and found["export"] is None
    assert api.calls[0] == ("create", "me/it", True) and "README.md" in api.calls[1][2]
    api.private, api.calls = False, []
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and "is there already and public" in capsys.readouterr().err
    assert [call[0] for call in api.calls] == ["create"], "nothing was sent"


def test_failures_are_one_line_without_the_token(tmp_path, api):
    from huggingface_hub.errors import HfHubHTTPError

    for status, hint in ((401, "log in again"), (403, "right to write"), (500, "hub refused me/it")):
        api.fail = HfHubHTTPError.__new__(HfHubHTTPError)
        api.fail.args, api.fail.response = ("bad\n hf_verysecret",), SimpleNamespace(status_code=status)
        api.fail.server_message = None
        with pytest.raises(InputError, match=hint) as told:
            hub.push(tmp_path, "me/it")
        assert "verysecret" not in str(told.value) and "\n" not in str(told.value)
    api.fail = ConnectionError("no route with hf_verysecret to the hub")
    with pytest.raises(ClipgraftError, match=r"could not be sent to the hub: no route with \*\*\*") as told:
        hub.push(tmp_path, "me/it")
    assert told.value.exit_code == 1


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs for one commit and for reading it back."""

    files: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.1"

    def reply(self, body: object = None, *, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        content = json.dumps(body).encode() if raw is None else raw
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_verysecret":
            return self.reply({"error": "who are you"}, status=401)
        base = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            told = json.loads(body)
            Hub.files[f"{told['organization']}/{told['name']}"] = {}
            return self.reply({"url": f"{base}/{told['organization']}/{told['name']}"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            paths = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]
            return self.reply({"files": modes})
        for line in body.splitlines():
            value = json.loads(line)
            if value["key"] == "file":
                Hub.files[name][value["value"]["path"]] = base64.b64decode(value["value"]["content"])
        return self.reply({"commitUrl": f"{base}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""})

    def do_GET(self) -> None:
        Hub.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            held = Hub.files["/".join(parts[2:4])]
            if "tree" in parts:
                return self.reply([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in held.items()])
            names = [{"rfilename": n} for n in held]
            info = {"id": "/".join(parts[2:4]), "sha": "1" * 40, "siblings": names, "private": True, "tags": []}
            return self.reply(info)
        content = Hub.files["/".join(parts[:2])].get("/".join(parts[4:]))
        if content is None:
            return self.reply({"error": "none"}, status=404, X_Error_Code="EntryNotFound")
        tag = hashlib.sha256(content).hexdigest()
        return self.reply(raw=content, ETag=f'"{tag}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
def test_the_hubs_own_client_sends_everything_and_load_reads_it_back(tmp_path, registry):
    """Against a server of this test; the token reaches it and appears nowhere."""
    encoder = tiny_clip()
    write_export(encoder, tmp_path / "model", components={"head": Head(16, 2)}, card=CARD)
    Hub.files, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    env = {**os.environ, "CLIPGRAFT_PLUGINS": "", "HF_ENDPOINT": there, "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_TOKEN": "hf_verysecret", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_HUB_OFFLINE": "0"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env={**env, **more}, capture_output=True, text=True)

    try:
        words = ("-m", "clipgraft", "export", str(tmp_path / "model"), "--push-to-hub", "me/it", "--license", "mit")
        done = run(*words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hub"] == f"{there}/me/it"
        assert "verysecret" not in done.stdout + done.stderr
        sent = Hub.files["me/it"]
        assert {"clipgraft.json", "head.safetensors", "open_clip_model.safetensors", "README.md"} <= sent.keys()
        readme = sent["README.md"].decode()
        assert 'create_model_and_transforms("hf-hub:me/it")' in readme and 'clipgraft.load("hf-hub:me/it")' in readme
        assert ModelCard(readme).data.license == "mit" and "/api/validate-yaml" in Hub.asked
        script = (
            "import clipgraft, sys; e = clipgraft.load(sys.argv[1]); print(e.data.origin.uri, e.data.origin.sha256)"
        )
        for reference in ("hf-hub:me/it", "hf:me/it"):
            done = run("-c", script, reference)
            assert done.returncode == 0, done.stderr
            folder, digest = done.stdout.split()
            assert digest == load(str(tmp_path / "model"), registry=registry).data.origin.sha256
            assert read_component(Path(folder), "head").keys() == {"weight", "bias"}
        refused = run(*words, HF_TOKEN="hf_wrong")
        assert refused.returncode == 2 and "hub refused me/it" in refused.stderr and "hf_wrong" not in refused.stderr
    finally:
        server.shutdown()
        server.server_close()
    away = run(*words, HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 1 and "could not be sent to the hub" in away.stderr and "Traceback" not in away.stderr
