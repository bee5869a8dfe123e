"""The manifest: what this plugin offers, as strings."""

from __future__ import annotations

from clipgraft.spec import Component, hookimpl

GENHANCER = (
    "Ma et al., GenHancer: Imperfect Generative Models are Secretly Strong Vision-Centric Enhancers, ICCV 2025, "
    "arXiv 2503.19480"
)
DIVA = "Wang et al., Diffusion Feedback Helps CLIP See Better, ICLR 2025, arXiv 2407.20171"
SDS_CLIP = (
    "Basu et al., Distilling Knowledge from Text-to-Image Generative Models Improves Visio-Linguistic Reasoning in "
    "CLIP, EMNLP 2024, arXiv 2307.09233"
)
UN2CLIP = (
    "Li et al., un2CLIP: Improving CLIP's Visual Detail Capturing Ability via Inverting unCLIP, NeurIPS 2025, "
    "arXiv 2505.24517"
)


@hookimpl
def clipgraft_recipes() -> list[Component]:
    """Recipes."""
    return [
        Component(
            name="diva",
            target="clipgraft_diffusion.diva.recipe:Diva",
            config="clipgraft_diffusion.diva.config:DivaConfig",
            summary="A frozen generator must name the noise on images from CLIP's tokens: CLIP sees better",
            needs=("diffusers>=0.36", "transformers>=4.56"),
            paper=DIVA,
            presets="clipgraft_diffusion.recipes",
        ),
        Component(
            name="genhancer",
            target="clipgraft_diffusion.genhancer.recipe:GenHancer",
            config="clipgraft_diffusion.genhancer.config:GenHancerConfig",
            summary="A small generator must restore images from CLIP's embedding: that teaches CLIP to keep details",
            needs=("diffusers>=0.36",),
            paper=GENHANCER,
            presets="clipgraft_diffusion.recipes",
        ),
        Component(
            name="genhancer-discrete",
            target="clipgraft_diffusion.genhancer.discrete:genhancer_discrete",
            config="clipgraft_diffusion.genhancer.discrete_config:DiscreteConfig",
            summary="GenHancer with masked codes in place of a flow: our reading, its code was never released",
            needs=("diffusers>=0.36",),
            paper=GENHANCER,
            presets="clipgraft_diffusion.discrete_recipes",
        ),
        Component(
            name="sds-clip",
            target="clipgraft_diffusion.sds.recipe:SdsClip",
            config="clipgraft_diffusion.sds.config:SdsClipConfig",
            summary="A frozen text-to-image model, told the caption, judges CLIP's image embedding beside InfoNCE",
            needs=("diffusers>=0.36", "transformers>=4.56"),
            paper=SDS_CLIP,
            presets="clipgraft_diffusion.recipes",
        ),
        Component(
            name="un2clip",
            target="clipgraft_diffusion.unclip.recipe:Un2Clip",
            config="clipgraft_diffusion.unclip.config:Un2ClipConfig",
            summary="A frozen decoder of CLIP's image embeddings must restore images: CLIP learns to write for it",
            needs=("diffusers>=0.36", "transformers>=4.56"),
            paper=UN2CLIP,
            presets="clipgraft_diffusion.unclip_recipes",
        ),
    ]


@hookimpl
def clipgraft_heads() -> list[Component]:
    """Heads."""
    return [
        Component(
            name="recap",
            target="clipgraft_diffusion.recap:Recap",
            config="clipgraft_diffusion.recap:RecapConfig",
            summary="DIVA's visual dense recap: the class token and drawn, averaged or all local tokens",
            paper=DIVA,
        ),
        Component(
            name="global-token",
            target="clipgraft_diffusion.condition:GlobalCondition",
            config="clipgraft_diffusion.condition:GlobalTokenConfig",
            summary="GenHancer's condition: the global embedding as a pooled vector and as one token",
            paper=GENHANCER,
        ),
        Component(
            name="latent-mapper",
            target="clipgraft_diffusion.sds.mapper:LatentMapper",
            config="clipgraft_diffusion.sds.mapper:LatentMapperConfig",
            summary="SDS-CLIP's map: the image embedding, linearly, as a generator's latent",
            paper=SDS_CLIP,
        ),
        Component(
            name="unclip-label",
            target="clipgraft_diffusion.unclip.label:UnclipLabel",
            config="clipgraft_diffusion.unclip.label:UnclipLabelConfig",
            summary="What an unCLIP decoder is told: the noised image embedding and the level of that noise",
            needs=("diffusers>=0.36",),
            paper=UN2CLIP,
        ),
    ]


@hookimpl
def clipgraft_losses() -> list[Component]:
    """Losses that score a generator: ``loss(denoiser, x0, condition, generator=None)`` -> (B,)."""
    return [
        Component(
            name="eps",
            target="clipgraft_diffusion.objectives:eps_loss",
            config="clipgraft_diffusion.objectives:EpsConfig",
            summary="A generator must name the noise at a drawn step of a DDPM schedule",
            needs=("diffusers>=0.36",),
            paper="Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, arXiv 2006.11239",
        ),
        Component(
            name="v",
            target="clipgraft_diffusion.objectives:v_loss",
            config="clipgraft_diffusion.objectives:EpsConfig",
            summary="A generator must name v, noise and image in one, at a drawn step of a DDPM schedule",
            needs=("diffusers>=0.36",),
            paper="Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022, "
            "arXiv 2202.00512",
        ),
        Component(
            name="flow",
            target="clipgraft_diffusion.objectives:flow_loss",
            config="clipgraft_diffusion.objectives:FlowLossConfig",
            summary="A generator must name the velocity of a rectified flow at a drawn time",
            paper="Liu et al., Flow Straight and Fast, ICLR 2023, arXiv 2209.03003",
        ),
        Component(
            name="masked-token",
            target="clipgraft_diffusion.objectives:masked_token_loss",
            config="clipgraft_diffusion.objectives:MaskedTokenConfig",
            summary="A generator must name an image's hidden codes from the shown ones",
            paper=GENHANCER,
        ),
        Component(
            name="sds",
            target="clipgraft_diffusion.sds.loss:sds_loss",
            config="clipgraft_diffusion.sds.loss:SdsConfig",
            summary="Score distillation of a latent, through the generator or with its error as the gradient",
            needs=("diffusers>=0.36",),
            paper=SDS_CLIP,
        ),
    ]


@hookimpl
def clipgraft_claims() -> list[Component]:
    """Claims."""
    return [
        Component(
            name="diva",
            target="clipgraft_diffusion.diva.claims:DIVA",
            summary="A frozen, pretrained generator's feedback lets the untouched text tower tell minimal pairs apart",
            needs=("clipgraft-toyworld",),
            paper=DIVA,
        ),
        Component(
            name="diva-own",
            target="clipgraft_diffusion.diva.claims:OWN",
            summary="A generator pretrained over the base's own tokens lets its text tower tell minimal pairs apart",
            needs=("clipgraft-toyworld",),
            paper=DIVA,
        ),
        Component(
            name="genhancer",
            target="clipgraft_diffusion.genhancer.claims:GENHANCER",
            summary="Details become readable from the global embedding while zero-shot is kept",
            needs=("clipgraft-toyworld",),
            paper=GENHANCER,
        ),
        Component(
            name="genhancer-pairs",
            target="clipgraft_diffusion.genhancer.claims:PAIRS",
            summary="Minimal pairs are told apart better by the untouched text tower",
            needs=("clipgraft-toyworld",),
            paper=GENHANCER,
        ),
        Component(
            name="genhancer-discrete",
            target="clipgraft_diffusion.genhancer.claims:DISCRETE",
            summary="Minimal pairs are told apart better after the feedback of a predictor of masked codes",
            needs=("clipgraft-toyworld",),
            paper=GENHANCER,
        ),
        Component(
            name="sds-clip",
            target="clipgraft_diffusion.sds.claims:SDS",
            summary="Images and captions that differ in one detail are matched better than after contrastive training",
            needs=("clipgraft-evaluation", "clipgraft-toyworld"),
            paper=SDS_CLIP,
        ),
        Component(
            name="un2clip",
            target="clipgraft_diffusion.unclip.claims:UN2CLIP",
            summary="Details become readable from the global embedding when its decoder is turned round",
            needs=("clipgraft-toyworld",),
            paper=UN2CLIP,
        ),
        Component(
            name="un2clip-pairs",
            target="clipgraft_diffusion.unclip.claims:PAIRS",
            summary="Minimal pairs are told apart better when the decoder of the embedding is turned round",
            needs=("clipgraft-toyworld",),
            paper=UN2CLIP,
        ),
    ]
