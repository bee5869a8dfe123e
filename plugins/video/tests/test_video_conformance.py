"""What every plugin keeps: the conformance suite; its runs are slow."""

import pytest

from clipgraft.testing.conformance import Declarations, Runs


class TestVideoDeclares(Declarations):
    plugin = "video"


@pytest.mark.slow
class TestVideoRuns(Runs):
    plugin = "video"
