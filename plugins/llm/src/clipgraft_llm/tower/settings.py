"""How a text model is asked: prompt, attention, pooling, length. What nobody says is read from its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from clipgraft.config.schema import Config
from clipgraft.errors import InputError
from clipgraft_llm.tower.model_folder import OWN, ModelFolder, modules_of

Pooling = Literal["mean", "last", "cls"]
Over = Literal["caption", "all"]
Attention = Literal["native", "bidirectional"]
DType = Literal["fp32", "bf16", "fp16"]
LONGEST = 512
"""Tokens of a text where neither the directory nor the configuration says less."""
_POOLED: dict[str, Pooling] = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last",
                               "cls": "cls", "mean": "mean"}  # fmt: skip


class TextModelConfig(Config):
    """A frozen text model. What is null comes from the model's directory."""

    model: str = Field(description="directory (llm:DIR), registered head, or ORG/NAME of the hub; safetensors only")
    template: str | None = Field(
        None, description="prompt around a text, with {} once; null: the directory's own, else the text alone"
    )
    pooling: Pooling | None = Field(None, description="of hidden states; null: the directory's own, else mean")
    over: Over | None = Field(
        None, description="tokens that mean pools: caption leaves out what stands before it; null: as the kind of model"
    )
    attention: Attention | None = Field(
        None, description="bidirectional lets a causal model read to the end; null: the directory's own, else native"
    )
    max_length: int | None = Field(
        None, gt=3, description="longest text, prompt included [tokens]; null: the directory's own, 512 at most"
    )
    dtype: DType = Field("fp32", description="of the text model's weights")
    random: int | None = Field(
        None, ge=0, description="a control: the architecture with weights drawn from this seed, nothing learnt"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """``TextModelConfig`` with every question answered, and what kind of model it is.

    ``decoder``: padded on the left, so that its last token is at the end; other models on the right.
    """

    template: str
    pooling: Pooling
    over: Over
    attention: Attention
    max_length: int
    dtype: DType
    random: int | None
    unit: bool
    decoder: bool
    width: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def settled(config: TextModelConfig, folder: ModelFolder) -> TextSettings:
    """The settings of ``config``; the rest from ``folder``, or as the kind of model is."""
    model = _architecture(folder)
    own, published = folder.read(OWN), _published(folder)
    said = {**published, **own}

    def pick(name: str, otherwise: Any) -> Any:
        given = getattr(config, name)
        return said.get(name, otherwise) if given is None else given

    decoder, template = _is_decoder(model, folder), pick("template", "{}")
    if template.count("{}") != 1:
        raise InputError(f"text.template {template!r} must hold {{}} once, where the text goes")
    room = _room(model, folder)
    length = pick("max_length", min(room, LONGEST))
    if length > room:
        raise InputError(f"text.max_length {length} is more than {folder.reference} reads; set it to {room} or less")
    pooling = pick("pooling", "mean")
    if pooling == "cls" and decoder:
        raise InputError("text.pooling cls reads the first token, which in a decoder knows nothing; use mean or last")
    return TextSettings(
        template=template,
        pooling=pooling,
        over=pick("over", "caption" if decoder else "all"),
        attention=pick("attention", "native"),
        max_length=length,
        dtype=config.dtype,
        random=config.random,
        unit=bool(said.get("unit", False)),
        decoder=decoder,
        width=int(model.hidden_size),
    )


def features_hash(settings: TextSettings, *, model: str, tokenizer: str) -> str:
    """Hex digest of all that a text's features follow from; ``model`` and ``tokenizer`` are fingerprints."""
    told = json.dumps([settings.as_dict(), model, tokenizer], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _architecture(folder: ModelFolder) -> Any:
    """transformers' configuration of the model; refused unless it is one text model that needs no remote code."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"text model {folder.reference}: transformers doesn't know it without its own code: {reason}"
        ) from None
    if config.is_encoder_decoder or config.get_text_config() is not config or not hasattr(config, "hidden_size"):
        raise InputError(f"text model {folder.reference}: a {config.model_type} is no plain encoder or decoder of text")
    return config


def _is_decoder(config: Any, folder: ModelFolder) -> bool:
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    raise InputError(f"text model {folder.reference}: a {kind} is no language model that reads text; choose another")


def _room(config: Any, folder: ModelFolder) -> int:
    """Most tokens that positions, tokenizer and the published limit allow."""
    limits = [getattr(config, "max_position_embeddings", None)]
    if config.model_type in ("roberta", "xlm-roberta", "mpnet", "camembert") and limits[0]:
        limits[0] -= 2  # positions start behind the padding's
    limits.append(folder.read("sentence_bert_config.json").get("max_seq_length"))
    if (file := folder.path / "tokenizer_config.json").is_file():
        limits.append(json.loads(file.read_text("utf-8")).get("model_max_length"))
    found = [int(n) for n in limits if n and n < 10**7]
    return min(found) if found else LONGEST


def _published(folder: ModelFolder) -> Mapping[str, Any]:
    """Pooling, prompt and normalisation as sentence-transformers' files say; empty for a plain directory."""
    found: dict[str, Any] = {}
    for module in modules_of(folder.root):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            found |= _pooling(folder, str(module.get("path", "")))
        elif kind == "Normalize":
            found["unit"] = True
        elif kind != "Transformer":
            raise InputError(
                f"text model {folder.reference}: its step {kind} is not supported; choose a model of Transformer, "
                "Pooling and Normalize"
            )
    described = folder.read("config_sentence_transformers.json")
    prompt = (described.get("prompts") or {}).get(described.get("default_prompt_name") or "")
    if prompt:
        found["template"] = prompt.replace("{}", "") + "{}"
    return found


def _pooling(folder: ModelFolder, path: str) -> dict[str, Any]:
    described = folder.read(f"{path}/config.json")
    on = [k.removeprefix("pooling_mode_") for k, v in described.items() if k.startswith("pooling_mode_") and v is True]
    on = on or [str(described.get("pooling_mode", "mean"))]
    if len(on) != 1 or on[0] not in _POOLED:
        raise InputError(
            f"text model {folder.reference}: it pools by {' and '.join(on)}; mean, cls and lasttoken are supported"
        )
    return {"pooling": _POOLED[on[0]], "over": "all" if described.get("include_prompt", True) else "caption"}
