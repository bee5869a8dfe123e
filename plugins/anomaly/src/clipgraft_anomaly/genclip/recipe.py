"""GenCLIP's recipe, a reconstruction (arXiv 2504.14919; no official code was available): one stage, ``branches``."""

from __future__ import annotations

from clipgraft.data.base import Source
from clipgraft.errors import ClipgraftError, InputError
from clipgraft.evaluation.progress import LateBar
from clipgraft.log import RunLog
from clipgraft.recipe import StagePlan
from clipgraft.runner import Run
from clipgraft_anomaly.current_head import switch_on
from clipgraft_anomaly.detector import Fits
from clipgraft_anomaly.feature_store import kept_features
from clipgraft_anomaly.genclip.config import GenClipRunConfig
from clipgraft_anomaly.genclip.name_filter import NameFilter
from clipgraft_anomaly.genclip.prompts import GenClip
from clipgraft_anomaly.genclip.stage import BranchesStage, produce
from clipgraft_anomaly.genclip.vision import LayeredReader
from clipgraft_anomaly.inspection import check_labels, name_of, names_of
from clipgraft_anomaly.layouts import PartFiles
from clipgraft_anomaly.reading import Reader
from clipgraft_anomaly.same_data import DataRecord


class GenClipRecipe:
    """One stage, ``branches``."""

    def __init__(self, config: GenClipRunConfig) -> None:
        self.config = config

    def plan(self) -> list[StagePlan]:
        """The stage."""
        return [StagePlan("branches", self._branches)]

    def check(self, run: Run) -> list[str]:
        """A tower, prompts, names and data that fit each other, seen before any work."""
        switch_on(run)
        problems = []
        for attempt in (
            lambda: self.config.read.resolved(run.encoder),
            lambda: self.config.prompt.resolved(run.encoder),
            lambda: self._data_fit(run),
            self._learns,
        ):
            try:
                attempt()
            except (ClipgraftError, ValueError) as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))

    def _learns(self) -> None:
        if not self.config.loss.vision and not self.config.loss.query:
            raise InputError("loss.vision and loss.query are both 0, so nothing would be learnt; set one above 0")

    def _data_fit(self, run: Run) -> None:
        """Two classes, and every name that the filter keeps makes prompts that the text tower takes."""
        source = run.train_source()
        check_labels(source)
        if self.config.prompt.named == "none":
            return
        prompt, encoder = self.config.prompt.resolved(run.encoder), run.encoder
        check = NameFilter(encoder, self.config.filter)
        for name in names_of(source):
            needs = prompt.ids(encoder, [check(name).name]).shape[-1] + prompt.query + 1
            length = encoder.text.context_length if encoder.text is not None else 0
            if needs > length:
                raise InputError(
                    f"prompt.query {prompt.query}: prompts about {name!r} take {needs} tokens, this text tower has "
                    f"{length}; lower prompt.query"
                )

    def _branches(self, run: Run) -> BranchesStage:
        c, encoder = self.config, run.encoder.requires_grad_(False).eval()
        read, prompt, source = c.read.resolved(encoder), c.prompt.resolved(encoder), run.train_source()
        reader = Reader(encoder, read)
        features = produce(LayeredReader(reader, pooling=prompt.pooling))
        store = kept_features(
            run, source, reader, features, c.cache, stage="branches", method="genclip", pooling=prompt.pooling
        )
        check = NameFilter(encoder, c.filter, log=run.log.info)
        told = [check(name) for name in names_of_rows(source, store.rows, log=run.log)]
        trained = DataRecord.of(c.data.from_, source, log=run.log)
        head = GenClip(
            prompt=prompt, read=read, blend=c.blend, filter=c.filter, fits=Fits.of(encoder), trained=trained
        ).to(run.device)
        return BranchesStage(
            "branches",
            train=c.train,
            store=store,
            encoder=encoder,
            head=head,
            grid=reader.grid,
            told=told,
            loss=c.loss,
        )


def names_of_rows(source: Source, rows: list[int], *, log: RunLog) -> list[str]:
    """The object's name for pictures at ``rows``, without reading files where the source lists them."""
    if isinstance(source, PartFiles):
        return [source.rows[row].object for row in rows]
    if len(known := names_of(source)) == 1:
        return [known[0]] * len(rows)
    found = []
    with LateBar(log, f"asking {source.name} for the parts' names", len(rows)) as bar:
        for row in rows:
            found.append(name_of(source, source[row]))
            bar.advance(1)
    return found
