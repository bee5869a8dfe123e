"""What every plugin keeps: the conformance suite; its runs are slow."""

import pytest

from clipgraft.testing.conformance import Declarations, Runs


class TestLlmDeclares(Declarations):
    plugin = "llm"


@pytest.mark.slow
class TestLlmRuns(Runs):
    plugin = "llm"
