"""open_clip models as encoders: by architecture and tag, from a folder, from the hub.

Weights are fp32 whatever the file holds. A model is built on the meta device and takes the tensors that are mapped
from the file, so nothing is initialised at random and nothing is held twice. What open_clip only warns about
(QuickGELU, resized positions, default mean and std) is an error here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder, EncoderData, Origin, Preprocess, TextEncoder, Tokenizer
from clipgraft.encoders.tokenizers import tokenizer_for
from clipgraft.encoders.towers import ClipText, HuggingFaceText, ResNetImage, TimmImage, VitImage
from clipgraft.errors import ClipgraftError, InputError, unknown_name
from clipgraft.files import parse_json
from clipgraft.manifests import one_line

State = dict[str, Tensor]
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
WEIGHT_FILES = (
    WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip


TIMM_ARGUMENTS = frozenset(
    ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "act_layer", "class_token", "qkv_bias")
)
"""What a model's configuration may say of its timm tower: others of timm's arguments open files and addresses."""
DEEPEST = 1000
"""Blocks of a tower at most."""


def read_weights(file: Path) -> State:
    """Tensors of a safetensors file, mapped; a pickle (.bin, .pt, .pth) only as open_clip writes them.

    Pickles are read with ``weights_only`` and never any other way; torch doesn't compress them, so a compressed one is
    a bomb.
    """
    if not file.is_file():
        raise InputError(f"the weights file {file} is missing")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _fp32(load_file(file))
        if file.suffix not in (".bin", ".pt", ".pth"):
            raise InputError(f"{file} is no weights file; expected .safetensors, or .bin, .pt, .pth from open_clip")
        if zipped := zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise InputError(f"{file} is compressed, which torch never does; it was not loaded")
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except ClipgraftError:
        raise
    except Exception as error:  # each reader has its own: SafetensorError, UnpicklingError, RuntimeError, EOFError
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{file} is damaged or no plain weights file and was not loaded: {reason}") from None
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise InputError(f"{file} holds no state dict; convert it to safetensors with open_clip's key names")
    return _fp32(loaded)


def folder_weights(folder: Path, *, usual: str) -> State:
    """The weights of a model folder: one file, or the shards that a ``*.safetensors.index.json`` lists."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    state: State = {}
    for file in shard_files(folder):
        state |= read_weights(file)
    return state or read_weights(folder / usual)


def shard_files(folder: Path) -> list[Path]:
    """The files that an index of shards in ``folder`` lists, none without an index."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        return []
    try:
        names = sorted({str(name) for name in parse_json(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is no index of shards; expected a weight_map from tensors to files") from None
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise InputError(f"{index} names {odd[0]!r}; shards must be .safetensors files beside it")
    return [folder / name for name in names]


def _fp32(state: Mapping[str, Tensor]) -> State:
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def custom_layout(state: Mapping[str, Tensor]) -> State:
    """Either layout of open_clip's keys -> the one with ``text.`` in front of the text tower's."""
    plain = {k.removeprefix("module."): v for k, v in state.items()}
    own = ("visual.", "text.", "logit_")
    return {k if k.startswith(own) else f"text.{k}": v for k, v in plain.items()}


def open_clip_state(encoder: Encoder) -> State:
    """The encoder's tensors under the names that open_clip expects for ``encoder.data.model_config``."""
    config = encoder.data.model_config
    custom = config.get("custom_text") or "hf_model_name" in config.get("text_cfg", {})
    names = {"image.tower.": "visual.", "text.tower.": "text." if custom else ""}
    state = {}
    for key, value in encoder.state_dict().items():
        prefix = next((p for p in names if key.startswith(p)), "")
        state[names.get(prefix, "") + key.removeprefix(prefix)] = value
    return state


def why_not_open_clip(encoder: Encoder) -> str:
    """Why stock open_clip can't hold this encoder; empty when it can."""
    if not encoder.data.model_config:
        return "its architecture has no open_clip configuration"
    if kept := [g.name for g in encoder.data.grafts if not g.portable]:
        return f"the graft {kept[0]} changes the architecture beyond open_clip's"
    if name := encoder.data.model_config["vision_cfg"].get("timm_kwargs"):
        return f"its timm image tower differs from the registered one by {sorted(name)}"
    return ""


def preprocess_from(config: Mapping[str, Any], *, size: tuple[int, int], where: str) -> Preprocess:
    """open_clip's ``preprocess_cfg`` as ``Preprocess``, checked against the tower's (H, W')."""
    declared = config.get("size", size)
    declared = (declared, declared) if isinstance(declared, int) else tuple(declared)
    if declared != size:
        raise InputError(
            f"{where} declares images of {declared}, but the model takes {size}; correct preprocess_cfg.size, "
            "or change the model with the graft core/resize-positions"
        )
    if missing := [k for k in ("mean", "std") if not config.get(k)]:
        raise InputError(f"{where} declares no preprocess_cfg.{missing[0]}; add the values the model was trained with")
    rest = {k: config[k] for k in ("interpolation", "resize_mode", "fill_color") if config.get(k) is not None}
    return Preprocess(size=size, mean=tuple(config["mean"]), std=tuple(config["std"]), **rest)


def _construct(model_config: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that builds the model with open_clip's classes, in the custom-text layout."""
    from open_clip.model import CustomTextCLIP

    config = deepcopy(dict(model_config))
    config.pop("custom_text", None)
    if missing := [k for k in ("embed_dim", "vision_cfg", "text_cfg") if k not in config]:
        raise InputError(f"the model configuration has no {missing[0]}; expected open_clip's model_cfg")
    if "multimodal_cfg" in config:
        raise InputError("this is a CoCa model, whose text decoder is not a CLIP tower; use a CLIP or SigLIP model")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise InputError("vision_cfg and text_cfg of the model configuration must be objects, as open_clip writes them")
    timm_kwargs = vision.pop("timm_kwargs", None)
    _refuse(vision, text, timm_kwargs)
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False

    def construct() -> Any:
        try:
            with _timm_arguments(timm_kwargs), _without_questions(wanted="hf_model_name" in text):
                return CustomTextCLIP(**config)
        except TypeError as error:
            reason = str(error).split(") ")[-1].split(".__init__() ")[-1]
            raise InputError(f"open_clip can't build this model configuration as a CLIP: {reason}") from None
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the text model {text.get('hf_model_name')} is not available: {reason}") from None
        except Exception as error:  # sizes that don't fit one another: every layer checks them in its own way
            reason = one_line(error)[:160]
            raise InputError(f"open_clip can't build this model configuration as a CLIP: {reason}") from None

    return construct


def _refuse(vision: Mapping[str, Any], text: Mapping[str, Any], timm_kwargs: Any) -> None:
    """What no CLIP needs and a configuration made for harm may hold."""
    timm = {} if timm_kwargs is None else timm_kwargs
    if not isinstance(timm, dict) or (odd := sorted(set(timm) - TIMM_ARGUMENTS)):
        raise InputError(f"timm_kwargs {odd if isinstance(timm, dict) else timm!r} are not supported; remove them")
    if ":" in str(vision.get("timm_model_name", "")):
        raise InputError(f"timm_model_name {vision['timm_model_name']!r} is an address; name a model of timm's")
    depths = [vision.get("layers"), text.get("layers"), timm.get("depth")]
    flat = [n for depth in depths for n in (depth if isinstance(depth, list | tuple) else [depth])]
    if deep := [n for n in flat if isinstance(n, int | float) and not n <= DEEPEST]:
        raise InputError(f"a tower of {deep[0]} blocks is refused, {DEEPEST} are the most; correct the configuration")


@contextmanager
def _without_questions(*, wanted: bool) -> Iterator[None]:
    """transformers asks on the terminal whether a text model may run its own code; here it may not."""
    if not wanted:
        yield
        return
    from transformers import dynamic_module_utils

    usual, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = usual


@contextmanager
def _timm_arguments(arguments: Mapping[str, Any] | None) -> Iterator[None]:
    """Let open_clip's ``TimmModel`` build a trunk with more arguments than open_clip can pass on."""
    if not arguments:
        yield
        return
    import timm

    create = timm.create_model
    timm.create_model = partial(create, **arguments)
    try:
        yield
    finally:
        timm.create_model = create


def _assign(model: Any, state: State, *, where: str) -> None:
    """Put ``state`` into ``model`` by reference, after checking every name and shape."""
    want, state = model.state_dict(), custom_layout(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # transformers stopped storing it in 4.31
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in want:
            state[scalar] = state[scalar].reshape(want[scalar].shape)
    for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding", "visual.trunk.pos_embed"):
        if name in state and name in want and state[name].shape != want[name].shape:
            raise InputError(
                f"{where}: the weights hold {state[name].shape[-2]} image positions, the declared image size needs "
                f"{want[name].shape[-2]}; correct vision_cfg.image_size, then use the graft core/resize-positions"
            )
    problems = [
        f"{k} is {'unexpected' if k in state else 'missing'}" for k in [*want, *state] if (k in want) ^ (k in state)
    ]
    shapes = {k: (tuple(state[k].shape), tuple(want[k].shape)) for k in want.keys() & state.keys()}
    if problems := problems + [
        f"{k} is {has} instead of {needs}" for k, (has, needs) in shapes.items() if has != needs
    ]:
        raise InputError(f"{where}: the weights don't fit the configuration: {problems[0]} ({len(problems)} in all)")
    model.load_state_dict(state, assign=True)


def build(
    model_config: Mapping[str, Any],
    state: State | None,
    *,
    preprocess: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    origin: Origin,
) -> Encoder:
    """The encoder of open_clip's ``model_cfg`` with weights in either layout; ``state`` None draws random ones."""
    construct = _construct(model_config)
    if state is None:
        model = construct()
    else:
        with torch.device("meta"):
            model = construct()
        _assign(model, state, where=origin.uri)
        if getattr(model.text, "attn_mask", None) is not None:
            model.text.attn_mask = model.text.build_causal_mask()
        if any(b.is_meta for b in model.buffers()):
            # some trunks compute buffers that no file holds: build those for real
            real = construct()
            real.load_state_dict(model.state_dict(), assign=True)
            model = real
    visual, embed_dim = model.visual, model_config["embed_dim"]
    kind = {"TimmModel": TimmImage, "ModifiedResNet": ResNetImage}.get(type(visual).__name__, VitImage)
    text: TextEncoder
    if type(model.text).__name__ == "HFTextEncoder":
        length = model_config["text_cfg"].get("context_length", 77)
        text = HuggingFaceText(model.text, embed_dim=embed_dim, context_length=length)
    else:
        text = ClipText(model.text, embed_dim=embed_dim)
    size = visual.image_size
    h, w = (size, size) if isinstance(size, int) else size
    data = EncoderData(
        preprocess=preprocess_from(preprocess, size=(h, w), where=origin.uri),
        tokenizer=tokenizer or tokenizer_for(model_config["text_cfg"]),
        origin=origin,
        model_config=deepcopy(dict(model_config)),
    )
    bias = model.logit_bias
    return Encoder(kind(visual, embed_dim=embed_dim), text, logit_scale=model.logit_scale, logit_bias=bias, data=data)


def open_architecture(name: str) -> Encoder:
    """``ARCH/TAG`` with open_clip's pretrained weights, or ``ARCH`` with random ones."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    arch, _, tag = name.partition("/")
    config, usual = open_clip.get_model_config(arch), open_clip.transform.PreprocessCfg()
    if config is None:
        raise unknown_name("open_clip architecture", arch, open_clip.list_models())
    uri, default = f"open_clip:{name}", {"mean": usual.mean, "std": usual.std}
    if not tag:
        return build(config, None, preprocess=default, origin=Origin(uri, arch))
    known = get_pretrained_cfg(arch, tag)
    if not known:
        raise unknown_name(f"weights tag of {arch}", tag, open_clip.pretrained.list_pretrained_tags_by_model(arch))
    if advice := quickgelu_advice(arch, tag):
        kinds = ("with", "without") if known.get("quick_gelu") else ("without", "with")
        raise InputError(f"{tag} was trained {kinds[0]} QuickGELU, the architecture {arch} is {kinds[1]}; use {advice}")
    try:
        file = Path(download_pretrained(known))
    except Exception as error:  # network, disk and hub errors alike
        raise InputError(f"the weights of {uri} could not be fetched: {' '.join(str(error).split())[:200]}") from None
    return build(config, read_weights(file), preprocess={**default, **known}, origin=Origin(uri, arch))


def quickgelu_advice(arch: str, tag: str) -> str:
    """The reference to use instead when a tag's weights need the other activation; empty when it fits."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    needs, config = bool(get_pretrained_cfg(arch, tag).get("quick_gelu")), open_clip.get_model_config(arch) or {}
    other = f"{arch}-quickgelu" if needs else arch.removesuffix("-quickgelu")
    # one architecture (roberta-ViT-B-32) has the flag where its tag forgot it: then the architecture is right
    wrong = needs != bool(config.get("quick_gelu")) and other != arch
    return f"open_clip:{other}/{tag}" if wrong else ""


def open_folder(folder: Path, *, uri: str = "") -> Encoder:
    """A folder with ``open_clip_config.json`` and weights, as open_clip's ``local-dir:`` and hub pages hold."""
    file = folder / CONFIG
    try:
        config = parse_json(file.read_bytes())
        model_config = config["model_cfg"]
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG}; expected an open_clip or Hugging Face folder") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file} is no open_clip configuration; expected model_cfg and preprocess_cfg") from None
    return build(
        model_config,
        folder_weights(folder, usual=WEIGHTS),
        preprocess=config.get("preprocess_cfg", {}),
        tokenizer=tokenizer_for(model_config["text_cfg"], folder=folder),
        origin=Origin(uri or str(folder), architecture_name(model_config)),
    )


def architecture_name(model_config: Mapping[str, Any]) -> str:
    """A short name such as ViT-768x12-p32."""
    vision = model_config["vision_cfg"]
    if name := vision.get("timm_model_name"):
        return str(name)
    if isinstance(vision.get("layers", 12), (list, tuple)):
        return f"ResNet-{'-'.join(str(n) for n in vision['layers'])}"
    return f"ViT-{vision.get('width', 768)}x{vision.get('layers', 12)}-p{vision.get('patch_size', 16)}"
