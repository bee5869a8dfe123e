"""A transformers model that says what a text means: hidden states pooled over the text's own tokens.

B texts, L tokens, V width of the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgraft.encoders.base import DEFAULT_REQUEST
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.types import FeatureRequest, TextFeatures
from clipgraft_llm.tower.caption_tokens import CaptionTokenizer
from clipgraft_llm.tower.model_folder import ModelFolder, quiet
from clipgraft_llm.tower.settings import TextSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = tuple(range(2, 8))
"""Places of ids in the vocabulary that the probe reads; another last one follows."""


class LanguageModel(nn.Module):
    """``model`` asked as ``tokens.settings`` say. ``mask4d``: attention is opened by an explicit mask.

    A causal model is opened by ``config.is_causal = False``, which transformers reads when it builds masks; an
    attribute of the attention modules has no effect with padding. Where a model ignores the configuration too, an
    additive mask (B, 1, L, L) does it. Whether it worked is measured, not believed: see ``reads_the_end``.
    """

    def __init__(self, model: Any, *, tokens: CaptionTokenizer) -> None:
        super().__init__()
        self.model, self.tokens, self.settings = model, tokens, tokens.settings
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # not what is read here, and without a gradient
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.mask4d = False
        if self.settings.attention == "bidirectional":
            self._open()

    def _open(self) -> None:
        """Let every token see all tokens; raises when the first one still ignores the last."""
        self.model.config.is_causal = False
        if not self.reads_the_end():
            self.mask4d = True
        if not self.reads_the_end():
            kind = self.model.config.model_type
            raise ClipgraftError(
                f"a {kind} stays causal in this version of transformers: its first token ignores the last one; set "
                "text.attention to native and text.pooling to last, or use another model"
            )

    @torch.no_grad()
    def reads_the_end(self) -> bool:
        """Whether the first token's state follows the last token, with and without padding."""
        held, few = self.training, max(2, min(len(PROBE), int(self.model.config.vocab_size) - 3))
        self.eval()
        ids = torch.tensor([PROBE[:few]], device=self.device)
        other = ids.clone()
        other[0, -1] = few + 2
        found = []
        for pad in (0, 2):
            side = (pad, 0) if self.settings.decoder else (0, pad)
            real = F.pad(torch.ones_like(ids, dtype=torch.bool), side, value=False)
            first = pad if self.settings.decoder else 0
            a, b = (self.hidden(F.pad(x, side), real=real)[0, first].float() for x in (ids, other))
            found.append(bool((a - b).abs().max() > 0))
        self.train(held)
        return all(found)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """V."""
        return self.settings.width

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, V) token embeddings without positions."""
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def hidden(self, tokens: Tensor, *, real: Tensor) -> Tensor:
        """Ids (B, L) or embeddings (B, L, V) and what of them is no padding (B, L) -> last hidden states (B, L, V)."""
        more: dict[str, Any] = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        if self.settings.decoder and "position_ids" in self._accepts:
            more["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self._accepts:
            more["use_cache"] = False
        mask: Tensor = real.long()
        if self.mask4d:
            dtype = next(self.model.parameters()).dtype
            mask = torch.zeros(real.shape, dtype=dtype, device=real.device)
            mask = mask.masked_fill(~real, torch.finfo(dtype).min)[:, None, None].expand(-1, 1, real.shape[1], -1)
        found: Tensor = self.model(attention_mask=mask, **more).last_hidden_state
        return found

    def forward(
        self,
        tokens: Tensor,
        want: FeatureRequest = DEFAULT_REQUEST,
        *,
        ids: Tensor | None = None,
        lead: int | None = None,
    ) -> TextFeatures:
        """Ids (B, L), or embeddings (B, L, V) with their ``ids``, -> pooled (B, V) in fp32, not projected.

        ``lead``: ids before the text, where they aren't the tokenizer's own.
        """
        if ids is None and tokens.is_floating_point():
            raise InputError("token embeddings were given without their ids; call text(embeddings, ids=ids)")
        real = self.tokens.real(tokens if ids is None else ids)
        hidden = self.hidden(tokens, real=real)
        lead = self.tokens.lead if lead is None else lead
        pooled = pool(hidden, real=real, settings=self.settings, lead=lead)
        pooled = F.normalize(pooled, dim=-1) if self.settings.unit else pooled
        return TextFeatures(pooled, hidden, real) if want.tokens else TextFeatures(pooled)


def pool(hidden: Tensor, *, real: Tensor, settings: TextSettings, lead: int) -> Tensor:
    """(B, L, V) and what is no padding (B, L) -> (B, V) fp32.

    ``mean`` over the caption leaves out the first ``lead`` real tokens: what begins the text and the template, not
    what ends them (LLM2CLIP's rule: the caption and its end token).
    """
    place = real.long().cumsum(1)  # 1 for the first real token
    rows = torch.arange(len(hidden), device=hidden.device)
    if settings.pooling == "cls":
        return hidden[rows, (place == 1).int().argmax(1)].float()
    if settings.pooling == "last":
        return hidden[rows, (place * real).argmax(1)].float()
    own = real & (place > lead) if settings.over == "caption" else real
    share = own[..., None].float()
    return (hidden.float() * share).sum(1) / share.sum(1).clamp(min=1)


def read_language_model(folder: ModelFolder, settings: TextSettings) -> LanguageModel:
    """The model in ``folder``, frozen, in eval mode; ``settings.random`` draws its weights instead of reading them."""
    from transformers import AutoConfig, AutoModel

    tokens = CaptionTokenizer.of(folder, settings)
    if settings.random is not None:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        model = from_config(config, seed=settings.random, dtype=DTYPES[settings.dtype])
    else:
        assert folder.weights  # one line here instead of a long one there
        try:
            with quiet(), torch.random.fork_rng(devices=[]):  # an absent pooler is drawn, then dropped
                model, told = AutoModel.from_pretrained(
                    folder.path,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=DTYPES[settings.dtype],
                    output_loading_info=True,
                )
        except Exception as error:  # OSError, SafetensorError, RuntimeError: whatever is wrong with the files
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"text model {folder.reference}: its weights can't be read: {reason}") from None
        if absent := sorted(k for k in told["missing_keys"] if not k.startswith("pooler.")):
            raise InputError(
                f"text model {folder.reference}: {absent[0]} is missing from its weights ({len(absent)} such); fetch "
                "the whole model"
            )
    return LanguageModel(model, tokens=tokens).requires_grad_(False).eval()


def from_config(config: Any, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """An untrained model of an architecture; the global random state stays as it is."""
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config, trust_remote_code=False, dtype=dtype)
