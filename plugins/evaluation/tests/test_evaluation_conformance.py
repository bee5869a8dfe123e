"""What every plugin keeps: the conformance suite."""

from clipgraft.testing.conformance import Declarations


class TestEvaluationDeclares(Declarations):
    plugin = "evaluation"
