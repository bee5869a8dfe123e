"""What every plugin keeps: the conformance suite; its runs are slow."""

import pytest

from clipgraft.testing.conformance import Declarations, Runs


class TestMergingDeclares(Declarations):
    plugin = "merging"


@pytest.mark.slow
class TestMergingRuns(Runs):
    plugin = "merging"
