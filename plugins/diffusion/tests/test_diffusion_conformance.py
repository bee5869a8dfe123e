"""What every plugin keeps: the conformance suite; its runs are slow."""

import pytest

from clipgraft.testing.conformance import Declarations, Runs


class TestDiffusionDeclares(Declarations):
    plugin = "diffusion"


@pytest.mark.slow
class TestDiffusionRuns(Runs):
    plugin = "diffusion"
