"""The manifest of ``evaluation``."""

from __future__ import annotations

from clipgraft.spec import CommandSpec, Component, hookimpl

PACKAGE = "clipgraft_evaluation"


@hookimpl
def clipgraft_commands() -> list[CommandSpec]:
    """Commands that the core leaves to this plugin."""
    table = {
        "demo": ("demo:demo", "Improve a tiny CLIP, measure it before and after, write a report."),
        "compare": ("compare_command:compare", "Tell whether one model is better than another, with paired tests."),
        "report": ("report_command:report", "Write the HTML report of a run, or compare two runs."),
        "claims": ("claim_command:claims", "Check the papers' claims by experiment."),
    }
    return [CommandSpec(name=name, target=f"{PACKAGE}.{target}", help=text) for name, (target, text) in table.items()]


@hookimpl
def clipgraft_evaluators() -> list[Component]:
    """Evaluators, each its own config."""
    table = {
        "knn": ("knn:Knn", "Classes by the nearest images", ""),
        "clustering": ("clustering:Clustering", "Whether clusters of embeddings are the classes: NMI, ACC, ARI", ""),
        "calibration": (
            "calibration:Calibration",
            "Whether zero-shot confidence is right as often as it says: ECE",
            "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599",
        ),
        "out-of-distribution": (
            "outliers:OutOfDistribution",
            "Telling known classes from other images: AUROC, FPR95",
            "Ming et al., Delving into Out-of-Distribution Detection, NeurIPS 2022, arXiv 2211.13445",
        ),
        "corruption": (
            "corruption:Corruption",
            "Zero-shot accuracy under noise, blur, weather and compression at five severities",
            "Hendrycks and Dietterich, Benchmarking Neural Network Robustness, ICLR 2019, arXiv 1903.12261",
        ),
        "geometry": (
            "geometry:Geometry",
            "Modality gap, alignment and uniformity of the embeddings",
            "Liang et al., Mind the Gap, NeurIPS 2022, arXiv 2203.02053; Wang and Isola, ICML 2020, arXiv 2005.10242",
        ),
        "pairs-grid": (
            "pairs_grid:PairsGrid",
            "Minimal pairs under each choice of activation and of pooling that published numbers differ by",
            "Tong et al., Eyes Wide Shut? Exploring the Visual Shortcomings of MLLMs, CVPR 2024, arXiv 2401.06209",
        ),
        "winoground": (
            "winoground:WinogroundScore",
            "Two images and two captions of the same words: text, image and group score",
            "Thrush et al., Winoground, CVPR 2022, arXiv 2204.03162",
        ),
        "hard-negatives": (
            "hard_negatives:HardNegatives",
            "The right caption among wrong ones that differ in order, object, attribute or relation",
            "Yuksekgonul et al., ARO, ICLR 2023, arXiv 2210.01936; Hsieh et al., SugarCrepe, NeurIPS 2023, "
            "arXiv 2306.14610",
        ),
    }
    return [
        Component(name=name, target=target, config=target, summary=summary, paper=paper)
        for name, (attribute, summary, paper) in table.items()
        for target in [f"{PACKAGE}.{attribute}"]
    ]


@hookimpl
def clipgraft_reports() -> list[Component]:
    """Sections of a run's page."""
    return [
        Component(
            name="retrieval",
            target=f"{PACKAGE}.retrieval_gallery:retrieval_gallery",
            summary="Captions with the pictures that they find, before and after the run",
        )
    ]


@hookimpl
def clipgraft_datasets() -> list[Component]:
    """Benchmarks in their published layouts, opened as ``mmvp:DIR`` and so on."""
    table = {
        "mmvp": ("mmvp:open_mmvp", "mmvp:MmvpConfig", "MMVP-VLM: minimal pairs of nine visual patterns"),
        "aro": ("aro:open_aro", "aro:AroConfig", "ARO: attribution, relation and order of words"),
        "sugarcrepe": (
            "sugarcrepe:open_sugarcrepe",
            "sugarcrepe:SugarCrepeConfig",
            "SugarCrepe: fluent hard negatives",
        ),
        "winoground": ("winoground:open_winoground", "winoground:WinogroundConfig", "Winoground"),
    }
    return [
        Component(name=name, target=f"{PACKAGE}.{target}", config=f"{PACKAGE}.{config}", summary=summary)
        for name, (target, config, summary) in table.items()
    ]
