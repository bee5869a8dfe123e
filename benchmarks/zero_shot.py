"""CPU seconds of a zero-shot classifier, ours against open_clip's build_zero_shot_classifier, in this run.

The text tower of a ViT-B-32 with random weights, ImageNet's class names and OpenAI's templates, spread over as many as
are asked for; 1000 names x 80 templates take open_clip hours on one core, and the ratio hardly depends on how many.
Both ways tokenise and encode the same prompts on one thread, take turns, and must agree to 1e-5.

    python benchmarks/zero_shot.py [--names 20] [--templates 8] [--repeats 2] [--json | --markdown]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from table import table


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly over all."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def main() -> None:
    """Build the classifier both ways ``--repeats`` times, interleaved, and keep the best CPU time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=20)
    parser.add_argument("--templates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()

    import open_clip
    import torch

    from clipgraft.encoders import load
    from clipgraft.evaluation.features import EncoderFeatures

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = load("open_clip:ViT-B-32").eval()
    names = spread(open_clip.IMAGENET_CLASSNAMES, options.names)
    functions = spread(open_clip.OPENAI_IMAGENET_TEMPLATES, options.templates)
    templates = [function("{}") for function in functions]

    class Theirs(torch.nn.Module):
        """What build_zero_shot_classifier asks of a model, over the same tower at full length."""

        def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            found = encoder.text(text)
            return found.unit() if normalize else found.pooled

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    cases: dict[str, Callable[[], torch.Tensor]] = {
        "open_clip": lambda: open_clip.build_zero_shot_classifier(Theirs(), tokenizer, names, functions).T,
        "ours": lambda: EncoderFeatures(encoder).classifier(names, templates),
    }
    with torch.no_grad():
        encoder.text(encoder.tokenizer(["warm"]))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    found = {}
    for _ in range(options.repeats):
        for name, build in cases.items():
            start = time.process_time()
            found[name] = build()
            seconds[name].append(time.process_time() - start)
    apart = float((found["ours"] - found["open_clip"]).abs().max())
    if apart > 1e-5:
        sys.exit(f"the classifiers differ by {apart:.1e}")
    best = {name: min(values) for name, values in seconds.items()}
    result = {
        "prompts": len(names) * len(templates),
        "cpu_seconds": {name: round(value, 2) for name, value in best.items()},
        "times_faster": round(best["open_clip"] / best["ours"], 2),
        "largest_difference": apart,
    }
    if options.json:
        print(json.dumps(result))
        return
    lines = [(name, f"{value:.2f}", f"{best['open_clip'] / value:.2f}") for name, value in best.items()]
    print(table(("classifier", "CPU s", "times as fast"), lines, markdown=options.markdown))
    print(f"\n{len(names)} class names in {len(templates)} templates, one thread")


if __name__ == "__main__":
    main()
