"""What every plugin keeps: the conformance suite."""

from clipgraft.testing.conformance import Declarations


class TestDataDeclares(Declarations):
    plugin = "data"
