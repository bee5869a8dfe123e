"""Which "no" branch belongs to a model: that of the run at work, or of the export that it came from."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from clipgraft.encoders.base import Encoder
from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.spec import runhook
from clipgraft_anomaly.clipn.branch import NoBranch

if TYPE_CHECKING:
    from clipgraft.runner import Run
    from clipgraft.stage import StageResult

_branch: ContextVar[NoBranch | None] = ContextVar("branch", default=None)
NAME = "the recipe's no branch"


class RunsBranch:
    """Lifecycle hook: the branch that a stage left is the run's from then on, also when the run is resumed."""

    @runhook
    def on_run_start(self, run: Run) -> None:
        """Take up what stages left that ended in an earlier process."""
        _branch.set(None)
        for folder in sorted((run.path / "stages").glob("[0-9][0-9]-*")):
            if run.finished(name := folder.name[3:]):
                self._take(run.left_by(name))

    @runhook
    def on_stage_end(self, result: StageResult) -> None:
        """Take up what the stage left."""
        self._take(result)

    @runhook
    def on_run_end(self, run: Run) -> None:
        """The next run starts without."""
        _branch.set(None)

    def _take(self, result: StageResult) -> None:
        for module in result.components.values():
            if isinstance(module, NoBranch):
                _branch.set(module)


def switch_on(run: Run) -> None:
    """Let the evaluators of ``run`` see the branch that it makes; once is enough, twice is no error."""
    if NAME not in run.hooks.names("on_run_start"):
        run.hooks.register(RunsBranch(), NAME)


def branch_in(folder: Path, *, registry: Registry) -> NoBranch | None:
    """The branch in a run or export; None when there is none."""
    from clipgraft.checkpoint import MANIFEST, read_component, read_manifest

    folder = folder / "export" if (folder / "export" / MANIFEST).is_file() else folder
    if not (folder / MANIFEST).is_file():
        return None
    records = [c for c in read_manifest(folder)["components"] if c["use"] == "anomaly/clipn"]
    if not records:
        return None
    branch: NoBranch = registry.build("head", records[-1]["use"], records[-1]["config"])
    branch.load_state_dict(read_component(folder, records[-1]["name"]))
    return branch.requires_grad_(False).eval()


def branch_for(encoder: Encoder, *, registry: Registry, given: str | None = None) -> NoBranch | None:
    """The branch in ``given``, else of the run at work, else of the export that ``encoder`` came from; maybe none.

    It is on the encoder's device and fits it.
    """
    if given is not None:
        branch = branch_in(Path(given), registry=registry)
        if branch is None:
            raise InputError(f"{given} holds no branch that says no; give a run or export of clipgraft run clipn")
    else:
        branch = _branch.get() or branch_in(Path(encoder.data.origin.uri), registry=registry)
    if branch is None:
        return None
    mine, text = branch.fits, encoder.text
    for what, has, needs in (
        ("text width", 0 if text is None else text.width, mine.text_width),
        ("joint embedding", encoder.image.embed_dim, mine.embed_dim),
    ):
        if has != needs:
            raise InputError(
                f"this no branch was trained for {mine.architecture or 'another model'} ({what} {needs}), the model "
                f"has {what} {has}; give the model it was trained for"
            )
    return branch.to(next(encoder.parameters()).device)
