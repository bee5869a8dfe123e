"""Which samples an epoch shows and in what order: a pure function of (seed, epoch), the same on every rank.

Shapes: n samples, k neighbours, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

from clipgraft.data.base import BadSample, Drawn, Source, entry_of
from clipgraft.errors import InputError
from clipgraft.files import parse_json
from clipgraft.log import RunLog

Balance = Literal["none", "class", "group"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an epoch is drawn from.

    ``parts``: disjoint index tensors with how often an epoch draws from each; a count None stands for an equal share of
    ``size``. With ``together`` k (which divides the counts) every run of k samples comes from one part. ``neighbours``
    (n, k) int32, nearest first, -1 for none: the epoch is a walk over neighbourhoods of ``cluster`` samples. Without
    either an epoch is every sample once.
    """

    size: int
    parts: tuple[tuple[Tensor, int | None], ...] = ()
    together: int = 0
    neighbours: Tensor | None = None
    cluster: int = 0


def plan(
    source: Source,
    *,
    balance: Balance = "none",
    neighbours: Path | None = None,
    cluster: int = 16,
    missing: float = 0.0,
    log: RunLog | None = None,
) -> Plan:
    """The plan of ``source``; ``neighbours`` is a file of embeddings, which may lack a share ``missing`` of samples."""
    quotas = source.quotas if isinstance(source, Drawn) else ()
    asked = [
        name for name, on in (("a mix", quotas), ("balance", balance != "none"), ("hard batches", neighbours)) if on
    ]
    if len(asked) > 1:
        raise InputError(f"{source.name}: {' and '.join(asked)} each decide what an epoch shows; choose one of them")
    if quotas:
        parts = tuple((torch.as_tensor(list(indices)), count) for indices, count in quotas)
        return Plan(sum(count for _, count in quotas), parts, together=getattr(source, "together", 0))
    if balance != "none":
        return Plan(len(source), tuple((indices, None) for indices in _groups(source, balance)))
    if neighbours is not None:
        rows = _rows(source, neighbours, missing=missing)
        return Plan(len(source), neighbours=nearest(rows, k=4 * cluster, log=log), cluster=cluster)
    return Plan(len(source))


def epoch_order(plan: Plan, *, seed: int, epoch: int) -> Tensor:
    """(plan.size,) int64 indices of the source.

    A part drawn more often than it is large shows whole rounds of itself and a random rest; one drawn less often shows
    another random selection each epoch. Equal shares differ by one at most; which get one more is drawn anew too.
    """
    rng = seeded(seed, epoch, "order")
    if plan.neighbours is not None:
        return _walk(plan.neighbours, plan.cluster, rng)
    if not plan.parts:
        return torch.randperm(plan.size, generator=rng)
    base, more = divmod(plan.size, len(plan.parts))
    extra = set(torch.randperm(len(plan.parts), generator=rng)[:more].tolist())
    drawn = []
    for k, (indices, count) in enumerate(plan.parts):
        count = base + (k in extra) if count is None else count
        rounds, rest = divmod(count, len(indices))
        part = torch.cat([*[indices] * rounds, indices[torch.randperm(len(indices), generator=rng)[:rest]]])
        drawn.append(part[torch.randperm(len(part), generator=rng)] if plan.together else part)
    order = torch.cat(drawn).view(-1, plan.together or 1)
    return order[torch.randperm(len(order), generator=rng)].flatten()


def nearest(embeddings: Tensor, *, k: int, block: int = 1024, log: RunLog | None = None) -> Tensor:
    """(n, D) with zero rows for unknown samples -> (n, min(k, n - 1)) int32: the others by cosine, ties by index.

    Rounded to integers so small that sums of products are exact in fp32 in any order: every rank and machine finds the
    same. Takes n x n x D multiplications.
    """
    n, width = embeddings.shape
    k = min(k, n - 1)
    steps = min(127, int((2**23 / max(1, width)) ** 0.5))  # width * steps**2 < 2**24, all integers in fp32
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    peak = unit.abs().amax().clamp(min=1e-12)
    whole = (unit / peak * steps).round().float()
    known = embeddings.abs().sum(1) > 0
    column, found = torch.arange(n), []
    with (log or RunLog()).progress("neighbours", n) as bar:
        for start in range(0, n, block):
            rows = slice(start, start + block)
            score = (whole[rows] @ whole.T).long() * n + (n - 1 - column)
            score[:, ~known] = torch.iinfo(torch.int64).min
            score[torch.arange(len(score)), column[rows]] = torch.iinfo(torch.int64).min
            best, which = score.topk(k, dim=1)
            which[(best == torch.iinfo(torch.int64).min) | ~known[rows, None]] = -1
            found.append(which.int())
            bar.advance(len(which))
    return torch.cat(found)


def _walk(neighbours: Tensor, cluster: int, rng: Generator) -> Tensor:
    """Every sample once: a random sample still free takes its nearest free neighbours along; the clusters shuffled."""
    n = len(neighbours)
    free, clusters = bytearray(b"\1") * n, list[list[int]]()
    near = neighbours.numpy()
    for first in torch.randperm(n, generator=rng).tolist():
        if not free[first]:
            continue
        members = [first]
        free[first] = 0
        for other in near[first].tolist():
            if len(members) == cluster or other < 0:
                break
            if free[other]:
                free[other] = 0
                members.append(other)
        clusters.append(members)
    order = torch.randperm(len(clusters), generator=rng).tolist()
    return torch.tensor([index for c in order for index in clusters[c]])


def _groups(source: Source, balance: Balance) -> list[Tensor]:
    """Indices by label or group; ``InputError`` unless every readable sample has one and there are two or more."""
    found = defaultdict[int | str, list[int]](list)
    for index in range(len(source)):
        try:
            entry = entry_of(source, index)
        except BadSample:
            continue
        value = entry.label if balance == "class" else entry.group or None
        if value is None:
            raise InputError(f"{source.name}: {entry.id} has no {balance}, which data.balance {balance} needs")
        found[value].append(index)
    if len(found) < 2:
        had = f"{len(found)} {'class' if balance == 'class' else 'group'}"
        raise InputError(f"{source.name} has {had}; data.balance {balance} needs two or more, set it to none")
    return [torch.tensor(found[value]) for value in sorted(found, key=str)]


def _rows(source: Source, path: Path, *, missing: float) -> Tensor:
    """(n, D) embeddings in the order of ``source`` from ``path``, zeros for samples that it lacks."""
    ids, embeddings = read_embeddings(path)
    row = {name: k for k, name in enumerate(ids)}
    found, unknown = torch.zeros(len(source), embeddings.shape[1]), list[str]()
    for index in range(len(source)):
        try:
            name = entry_of(source, index).id
        except BadSample as error:
            name = error.sample_id
        if name in row:
            found[index] = embeddings[row[name]]
        else:
            unknown.append(name)
    if len(unknown) > missing * len(source):
        raise InputError(
            f"{path}: no embedding of {len(unknown)} of {len(source)} samples of {source.name}, such as {unknown[0]}; "
            "write it again with clipgraft embed"
        )
    return found


def read_embeddings(path: Path) -> tuple[list[str], Tensor]:
    """Ids and (n, D) fp32 of a safetensors file with a tensor "embeddings".

    The ids are a JSON list: as UTF-8 bytes in a tensor "ids_json" (what ``clipgraft embed`` writes), in the metadata
    under "ids", or in the file beside it with the ending .json, alone or under "ids".
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            if "embeddings" not in names:
                raise InputError(f"{path} holds no tensor 'embeddings'; write it with clipgraft embed")
            embeddings = file.get_tensor("embeddings").float()
            text = metadata.get("ids")
            if "ids_json" in names:
                text = file.get_tensor("ids_json").numpy().tobytes().decode()
        if text is None:
            text = path.with_suffix(".json").read_text("utf-8")
        ids = parse_json(text)
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"{path}: embeddings with ids can't be read ({reason}); write it with clipgraft embed"
        ) from None
    ids = ids.get("ids") if isinstance(ids, dict) else ids
    if not isinstance(ids, list) or embeddings.ndim != 2 or len(ids) != len(embeddings):
        raise InputError(f"{path}: expected one id per row of embeddings (n, D); write it again with clipgraft embed")
    return [str(name) for name in ids], embeddings


def seeded(seed: int, epoch: int, what: int | str) -> Generator:
    """Its own generator for each (seed, epoch, sample); torch's CPU engine reads 32 bits of a seed."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=4).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big"))
