"""What every plugin keeps: the conformance suite; its runs are slow."""

import pytest

from clipgraft.testing.conformance import Declarations, Runs


class TestAnomalyDeclares(Declarations):
    plugin = "anomaly"


@pytest.mark.slow
class TestAnomalyRuns(Runs):
    plugin = "anomaly"
