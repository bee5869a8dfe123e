"""Hugging Face's ``CLIPModel`` and ``SiglipModel`` folders to and from open_clip's names, tensor for tensor.

Both directions walk one list of moves, so a round trip is exact and no tensor is left over unnoticed: q, k and v are
fused by concatenation, projections are transposed, the input projection of SigLIP's pooling attention is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipgraft.encoders.base import Encoder, Origin
from clipgraft.encoders.openclip import State, build, custom_layout, folder_weights, open_clip_state
from clipgraft.encoders.tokenizers import BpeTokenizer, tokenizer_for
from clipgraft.encoders.towers import ClipText, TimmImage, VitImage
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.files import parse_json, write_json
from clipgraft.manifests import one_line

PILLOW = {"nearest": 0, "bilinear": 2, "bicubic": 3}
TIMM_SIZES = {(768, 12): "base", (1024, 24): "large", (1152, 27): "so400m", (1536, 40): "giantopt"}


class _Move(NamedTuple):
    """``theirs`` and ``ours`` hold the same numbers; several names on one side are parts along dim 0."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    how: str = ""


def _carry(values: list[Tensor], *, parts: int, how: str) -> list[Tensor]:
    """The tensors of one side of a move -> those of the other; works both ways."""
    x = torch.cat(values) if len(values) > 1 else values[0]
    if how == "transposed":
        x = x.T.contiguous()
    if how == "batched":
        x = x[0] if x.ndim == 3 else x[None]
    if parts == 1:
        return [x]
    third = len(x) // 3  # three parts are q, k, v; two are q, kv
    return [part.clone() for part in torch.split(x, [third, third * 2] if parts == 2 else third)]


def _pairs(theirs: str, ours: str) -> Iterator[_Move]:
    for kind in ("weight", "bias"):
        yield _Move((f"{theirs}.{kind}",), (f"{ours}.{kind}",))


def _blocks(theirs: str, ours: str, depth: int, names: tuple[str, ...], qkv: str) -> Iterator[_Move]:
    for i in range(depth):
        a, b = f"{theirs}.encoder.layers.{i}", f"{ours}.{i}"
        for x, y in zip(("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"), names, strict=True):
            yield from _pairs(f"{a}.{x}", f"{b}.{y}")
        for kind in ("weight", "bias"):
            yield _Move(tuple(f"{a}.self_attn.{p}_proj.{kind}" for p in "qkv"), (f"{b}.attn.{qkv}{kind}",))


OPEN_CLIP_BLOCK = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"), "in_proj_"
TIMM_BLOCK = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"), "qkv."


def _moves(kind: str, vision_depth: int, text_depth: int) -> Iterator[_Move]:
    """Every tensor of a CLIPModel ("clip") or SiglipModel ("siglip")."""
    v, e = "vision_model", "vision_model.embeddings"
    yield _Move(("logit_scale",), ("logit_scale",))
    yield _Move(("text_model.embeddings.token_embedding.weight",), ("text.token_embedding.weight",))
    yield _Move(("text_model.embeddings.position_embedding.weight",), ("text.positional_embedding",))
    yield from _blocks("text_model", "text.transformer.resblocks", text_depth, *OPEN_CLIP_BLOCK)
    yield from _pairs("text_model.final_layer_norm", "text.ln_final")
    if kind == "clip":
        yield _Move((f"{e}.class_embedding",), ("visual.class_embedding",))
        yield _Move((f"{e}.patch_embedding.weight",), ("visual.conv1.weight",))
        yield _Move((f"{e}.position_embedding.weight",), ("visual.positional_embedding",))
        yield from _pairs(f"{v}.pre_layrnorm", "visual.ln_pre")
        yield from _blocks(v, "visual.transformer.resblocks", vision_depth, *OPEN_CLIP_BLOCK)
        yield from _pairs(f"{v}.post_layernorm", "visual.ln_post")
        yield _Move(("visual_projection.weight",), ("visual.proj",), "transposed")
        yield _Move(("text_projection.weight",), ("text.text_projection",), "transposed")
        return
    o, pool = "visual.trunk", "visual.trunk.attn_pool"
    yield from _pairs("text_model.head", "text.text_projection")
    yield _Move(("logit_bias",), ("logit_bias",))
    yield from _pairs(f"{e}.patch_embedding", f"{o}.patch_embed.proj")
    yield _Move((f"{e}.position_embedding.weight",), (f"{o}.pos_embed",), "batched")
    yield from _blocks(v, f"{o}.blocks", vision_depth, *TIMM_BLOCK)
    yield from _pairs(f"{v}.post_layernorm", f"{o}.norm")
    yield _Move((f"{v}.head.probe",), (f"{pool}.latent",))
    for kind in ("weight", "bias"):
        yield _Move((f"{v}.head.attention.in_proj_{kind}",), (f"{pool}.q.{kind}", f"{pool}.kv.{kind}"))
    for x, y in (("attention.out_proj", "proj"), ("layernorm", "norm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
        yield from _pairs(f"{v}.head.{x}", f"{pool}.{y}")


def _walk(moves: list[_Move], state: State, *, back: bool, where: str) -> State:
    moves = [_Move(m.ours, m.theirs, m.how) for m in moves] if back else moves
    if odd := sorted({n for m in moves for n in m.theirs} ^ set(state)):
        what = "has no place in a" if odd[0] in state else "is missing for a"
        raise InputError(f"{where}: the tensor {odd[0]} {what} plain CLIP or SigLIP ({len(odd)} such)")
    carried = {m: _carry([state[n] for n in m.theirs], parts=len(m.ours), how=m.how) for m in moves}
    return {name: value for m, values in carried.items() for name, value in zip(m.ours, values, strict=True)}


def _activation(module: Any) -> str:
    """transformers' name of an activation module."""
    tanh = type(module).__name__ == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else "gelu_pytorch_tanh" if tanh else "gelu"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{file} can't be read as a JSON object; fetch it again") from None


def _read_preprocess(folder: Path) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` from what transformers writes; never guessed."""
    files = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    file = files[0] if files[0].is_file() else files[1]
    if not file.is_file():
        raise InputError(f"{folder} has no preprocessor_config.json, so its mean and std are unknown; add that file")
    found = _read_json(file)
    found = found.get("image_processor", found)
    resized = found.get("size") or {}
    size = found.get("crop_size") if found.get("do_center_crop") else resized
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    names = {number: name for name, number in PILLOW.items()}
    if (interpolation := names.get(found.get("resample", 3))) in (None, "nearest"):
        raise InputError(f"{file} resizes with resample {found['resample']}; expected 2 (bilinear) or 3 (bicubic)")
    mode = "squash" if isinstance(resized, dict) and "height" in resized else "shortest"
    config = {"mean": found.get("image_mean"), "std": found.get("image_std"), "interpolation": interpolation}
    return config | {"resize_mode": mode} | ({"size": size} if size else {})


def _style(config: Any, *, eps: float) -> dict[str, Any]:
    """What differs from open_clip's defaults in norms and activation."""
    norm = {} if config.layer_norm_eps == eps else {"norm_kwargs": {"eps": config.layer_norm_eps}}
    return norm | ({"act_kwargs": {"approximate": "tanh"}} if config.hidden_act == "gelu_pytorch_tanh" else {})


def _model_config(config: Any) -> dict[str, Any]:
    """transformers' config -> open_clip's ``model_cfg``."""
    v, t, siglip = config.vision_config, config.text_config, config.model_type == "siglip"
    acts = {v.hidden_act, t.hidden_act}
    if acts - {"gelu", "gelu_pytorch_tanh", "quick_gelu"} or ("quick_gelu" in acts and (siglip or len(acts) > 1)):
        raise InputError(f"open_clip can't mix or doesn't know these activations: {sorted(acts)}; use another model")
    text = {"context_length": t.max_position_embeddings, "vocab_size": t.vocab_size, "width": t.hidden_size}
    text |= {"heads": t.num_attention_heads, "layers": t.num_hidden_layers}
    text |= {"mlp_ratio": t.intermediate_size / t.hidden_size, **_style(t, eps=1e-5)}
    if not siglip:
        # transformers pools at the highest id when eos_token_id is 2, as the first CLIP configs say
        text |= {} if t.eos_token_id == 2 else {"pool_type": "eos", "eos_id": t.eos_token_id}
        vision = {"image_size": v.image_size, "patch_size": v.patch_size, "width": v.hidden_size}
        vision |= {"layers": v.num_hidden_layers, "head_width": v.hidden_size // v.num_attention_heads}
        vision |= {"mlp_ratio": v.intermediate_size / v.hidden_size, **_style(v, eps=1e-5)}
        quick = {"quick_gelu": "quick_gelu" in acts}
        return {"embed_dim": config.projection_dim, **quick, "vision_cfg": vision, "text_cfg": text}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    vision = {"image_size": v.image_size, "timm_pool": "map", "timm_proj": "none", **_timm_trunk(v)}
    sigmoid = {"init_logit_bias": -10, "custom_text": True}
    return {"embed_dim": t.projection_size, **sigmoid, "vision_cfg": vision, "text_cfg": text}


def _timm_trunk(config: Any) -> dict[str, Any]:
    """The registered timm model that is this SigLIP image tower, with what differs from it."""
    import timm

    if config.layer_norm_eps != 1e-6:
        raise InputError(f"timm's image towers have norms with eps 1e-6, this one has {config.layer_norm_eps}")
    name = f"vit_{TIMM_SIZES.get((config.hidden_size, config.num_hidden_layers))}_patch{config.patch_size}_siglip"
    name, known = f"{name}_{config.image_size}", timm.is_model(f"{name}_{config.image_size}")
    name = name if known else "vit_base_patch16_siglip_224"
    kwargs: dict[str, Any] = {}
    if not known:
        kwargs = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.hidden_size}
        kwargs |= {"depth": config.num_hidden_layers, "num_heads": config.num_attention_heads}
        kwargs |= {"mlp_ratio": config.intermediate_size / config.hidden_size}
    with torch.device("meta"):
        registered: Any = timm.create_model(name)
    usual = _activation(registered.blocks[0].mlp.act)
    if usual != config.hidden_act:
        kwargs["act_layer"] = {"gelu_pytorch_tanh": "gelu_tanh"}.get(config.hidden_act, "gelu")
    return {"timm_model_name": name} | ({"timm_kwargs": kwargs} if kwargs else {})


def open_folder(folder: Path, *, uri: str = "") -> Encoder:
    """A folder that ``CLIPModel.save_pretrained`` or ``SiglipModel.save_pretrained`` and a processor wrote."""
    import transformers

    kind = _read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "siglip"):
        raise InputError(f"{folder} holds a {kind!r} model; expected model_type clip or siglip")
    reader: Any = transformers.CLIPConfig if kind == "clip" else transformers.SiglipConfig
    try:
        config = reader.from_pretrained(folder)
        model_config = _model_config(config)
        depths = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    except ClipgraftError:
        raise
    except Exception as error:  # transformers checks little of what it reads
        raise InputError(f"{folder / 'config.json'} describes no CLIP: {one_line(error)[:160]}") from None
    weights = folder_weights(folder, usual="model.safetensors")
    state = {k: v for k, v in weights.items() if not k.endswith("position_ids")}
    state = _walk(list(_moves(kind, *depths)), state, back=False, where=str(folder))
    text = model_config["text_cfg"]
    # CLIP's own vocabulary is open_clip's built-in one, which pads with 0 where transformers pads with the end token
    if kind == "siglip" or text["vocab_size"] != 49408:
        text |= {"hf_tokenizer_name": uri.removeprefix("hf:") if uri.startswith("hf:") else "tokenizer"}
        text |= {"tokenizer_kwargs": {"clean": "canonicalize"}} if kind == "siglip" else {}
    return build(
        model_config,
        state,
        preprocess=_read_preprocess(folder),
        tokenizer=tokenizer_for(text, folder=folder),
        origin=Origin(uri or str(folder), f"hf-{kind}"),
    )


def huggingface_state(encoder: Encoder) -> State:
    """The encoder's tensors under the names of ``CLIPModel`` or ``SiglipModel``."""
    kind, where, text = _kind(encoder), encoder.data.origin.uri, _text_tower(encoder)
    moves = list(_moves(kind, encoder.image.depth, len(text.transformer.resblocks)))
    state = _walk(moves, custom_layout(open_clip_state(encoder)), back=True, where=where)
    # transformers keeps SigLIP's two scalars as vectors of one
    return {k: v.reshape(1) if kind == "siglip" and k.startswith("logit_") else v for k, v in state.items()}


def _text_tower(encoder: Encoder) -> Any:
    if not isinstance(encoder.text, ClipText):
        raise InputError(f"{encoder.data.origin.uri} has no CLIP text tower, which transformers' CLIPModel needs")
    return encoder.text.tower


def _kind(encoder: Encoder) -> str:
    """Which of transformers' two models computes what this encoder computes."""
    image, text = encoder.image, _text_tower(encoder)
    causal, pool = text.attn_mask is not None, text.pool_type
    if isinstance(image, TimmImage) and image.tower.trunk.global_pool == "map" and pool == "last" and not causal:
        return "siglip"
    if isinstance(image, VitImage) and causal and pool in ("argmax", "eos"):
        tower = image.tower
        if tower.pool_type == "tok" and tower.attn_pool is None and not tower.final_ln_after_pool:
            return "clip"
    raise InputError(f"{encoder.data.origin.uri} pools in a way that transformers' CLIPModel and SiglipModel don't")


def _tower_config(blocks: Any, *, width: int, model_type: str) -> dict[str, Any]:
    block = blocks[0]
    fc, act = (block.mlp.c_fc, block.mlp.gelu) if hasattr(block.mlp, "c_fc") else (block.mlp.fc1, block.mlp.act)
    norm = block.ln_1 if hasattr(block, "ln_1") else block.norm1
    sizes = {"hidden_size": width, "intermediate_size": fc.out_features, "num_hidden_layers": len(blocks)}
    style = {"hidden_act": _activation(act), "layer_norm_eps": norm.eps, "model_type": model_type}
    return sizes | {"num_attention_heads": block.attn.num_heads} | style


def _write_bpe(folder: Path, *, context_length: int) -> None:
    """CLIP's own vocabulary and merges, which open_clip has built in, as transformers' ``CLIPTokenizer`` reads them."""
    from open_clip.tokenizer import SimpleTokenizer

    simple = SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    theirs = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    write_json(folder / "vocab.json", {theirs.get(token, token): number for token, number in simple.encoder.items()})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True, **names},
    )


def write_huggingface(
    encoder: Encoder, folder: Path, *, card: Mapping[str, Any] | None = None, where: str = "DIR"
) -> Path:
    """Write config.json, model.safetensors, preprocessor_config.json, the tokenizer's files and a model card.

    ``card``: what a run told of itself; ``where``: the hub's ORG/NAME that the card names, if the folder goes there.
    """
    from clipgraft.card import render
    from clipgraft.checkpoint import CARD, described
    from clipgraft.files import whole_folder, write_tensors

    if kept := [graft.name for graft in encoder.data.grafts if not graft.portable]:
        raise InputError(
            f"transformers can't hold {encoder.data.origin.uri}: the graft {kept[0]} changes the architecture beyond "
            "CLIPModel; leave --format out to export for clipgraft"
        )
    kind, state, text, pre = _kind(encoder), huggingface_state(encoder), _text_tower(encoder), encoder.preprocess
    if pre.size[0] != pre.size[1] or pre.resize_mode == "longest":
        raise InputError("transformers' image processors crop or squash to a square; give the encoder square images")
    image: Any = encoder.image
    blocks = image.tower.transformer.resblocks if kind == "clip" else image.tower.trunk.blocks
    patch = image.tower.conv1 if kind == "clip" else image.tower.trunk.patch_embed.proj
    vision = _tower_config(blocks, width=image.width, model_type=f"{kind}_vision_model")
    vision |= {"image_size": pre.size[0], "patch_size": patch.kernel_size[0]}
    words = _tower_config(text.transformer.resblocks, width=text.width, model_type=f"{kind}_text_model")
    words |= {"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length}
    words |= {"eos_token_id": text.eos_id if text.pool_type == "eos" else 2, "pad_token_id": text.pad_id}
    words |= {"projection_size": image.embed_dim}
    config: dict[str, Any] = {"architectures": ["CLIPModel" if kind == "clip" else "SiglipModel"], "model_type": kind}
    config |= {"projection_dim": image.embed_dim, "text_config": words, "vision_config": vision}
    square, crop = {"height": pre.size[0], "width": pre.size[1]}, pre.resize_mode == "shortest"
    processor: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor"}
    processor |= {"do_center_crop": crop, "crop_size": square, "resample": PILLOW[pre.interpolation]}
    processor |= {"size": {"shortest_edge": pre.size[0]} if crop else square}
    processor |= {"image_mean": list(pre.mean), "image_std": list(pre.std)}
    with whole_folder(Path(folder), marker="config.json") as draft:
        write_json(draft / "config.json", config)
        write_json(draft / "preprocessor_config.json", processor)
        write_tensors(draft / "model.safetensors", state)
        if encoder.data.tokenizer is not None:
            encoder.data.tokenizer.save(str(draft))
        if isinstance(encoder.data.tokenizer, BpeTokenizer):
            _write_bpe(draft, context_length=text.context_length)
        told = described(encoder) | {"card": dict(card or {}), "transformers": config["architectures"][0]}
        (draft / CARD).write_text(render(told, form="transformers", where=where), encoding="utf-8")
    return Path(folder)
