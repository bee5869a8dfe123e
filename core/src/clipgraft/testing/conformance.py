"""The conformance suite: eleven checks that every plugin passes, whatever it does.

    pytest --pyargs clipgraft.testing.conformance --clipgraft-plugin NAME

needs no file at all. In a plugin's own tests a subclass says the same:

    from clipgraft.testing.conformance import Conformance

    class TestConformance(Conformance):
        plugin = "NAME"

``Declarations`` are the checks that train nothing, ``Runs`` the others: each recipe for a few steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest

from clipgraft.errors import InputError
from clipgraft.registry import Registry
from clipgraft.testing.subject import NotApplicable, Subject, Violation

if TYPE_CHECKING:
    from clipgraft.testing.trial import Trial

Record = Callable[[str, object], None]
_registries: dict[Subject, Registry] = {}


@contextmanager
def _told() -> Iterator[None]:
    """A violation is one line of a failed test, what can't be checked a skipped one."""
    reason = violation = None
    try:
        yield
    except NotApplicable as error:
        reason = str(error)
    except Violation as error:
        violation = str(error)
    if reason is not None:  # out here, so that pytest doesn't tell the cause of the cause
        pytest.skip(reason)
    if violation is not None:
        pytest.fail(violation, pytrace=False)


def _registry(subject: Subject) -> Registry:
    """Discovered once per plugin."""
    if subject not in _registries:
        _registries[subject] = subject.registry()
    return _registries[subject]


def _asked(check: type, metafunc: pytest.Metafunc) -> list[Subject]:
    """The plugin of a subclass, or those that the command line names."""
    given = getattr(check, "plugin", "")
    names = [given] if given else metafunc.config.getoption("--clipgraft-plugin", None) or []
    if not names:
        raise pytest.UsageError("name the plugin to check: --clipgraft-plugin NAME")
    return [Subject.of(name) for name in names]


class Declarations:
    """What a plugin says about itself; seconds."""

    plugin: ClassVar[str] = ""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per plugin."""
        if "subject" in metafunc.fixturenames:
            subjects = _asked(type(self), metafunc)
            metafunc.parametrize("subject", subjects, ids=[s.name for s in subjects], scope="class")

    def test_the_manifest_imports_nothing_heavy(self, subject: Subject) -> None:
        """Manifest and hooks run where only the standard library, pluggy and clipgraft can be imported."""
        from clipgraft.testing.declared import manifest_is_light

        with _told():
            manifest_is_light(subject)

    def test_targets_and_configs_resolve(self, subject: Subject, record_property: Record) -> None:
        """Everything that it offers can be imported and is what its kind says; claims name recipes that exist."""
        from clipgraft.testing.declared import targets_resolve

        with _told():
            record_property("left out", targets_resolve(subject, _registry(subject)))

    def test_defaults_are_valid_and_unknown_keys_fail(self, subject: Subject) -> None:
        """In every block of every config."""
        from clipgraft.testing.declared import configs_are_strict

        with _told():
            configs_are_strict(subject, _registry(subject))

    def test_configs_survive_yaml(self, subject: Subject, record_property: Record) -> None:
        """Every preset loads, and loads again from what is written down; so do the defaults of other components."""
        from clipgraft.testing.declared import presets_survive_yaml

        with _told():
            record_property("left out", presets_survive_yaml(subject, _registry(subject)))

    def test_help_lists_the_command(self, subject: Subject) -> None:
        """The root's help and the group's own, without a heavy import."""
        from clipgraft.testing.declared import help_lists_the_command

        with _told():
            help_lists_the_command(subject, _registry(subject))

    def test_no_other_plugin_is_imported(self, subject: Subject) -> None:
        """In no file, in no way."""
        from clipgraft.testing.declared import imports_no_other_plugin

        with _told():
            imports_no_other_plugin(subject)


@dataclass
class Prepared:
    """A recipe of a plugin, or why there is none to run; the folder is made when the first test asks for it."""

    subject: Subject
    recipe: str
    problem: str = ""
    made: Trial | None = None

    def trial(self, folders: pytest.TempPathFactory) -> Trial:
        """The same one for every test."""
        from clipgraft.testing.trial import Trial

        if self.problem:
            raise Violation(self.problem)
        if not self.recipe:
            raise NotApplicable(f"{self.subject.name} offers no recipe")
        if self.made is None:
            folder = folders.mktemp(re.sub(r"\W+", "-", self.recipe))
            self.made = Trial(self.subject, self.recipe, folder, _registry(self.subject))
        return self.made


class Runs:
    """What a plugin's recipes do; some ten seconds for each."""

    plugin: ClassVar[str] = ""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per recipe, which share their runs."""
        if "prepared" not in metafunc.fixturenames:
            return
        found: list[Prepared] = []
        for subject in _asked(type(self), metafunc):
            try:
                recipes = [r.name for r in subject.offers(_registry(subject)) if r.kind == "recipe"]
            except (InputError, Violation) as error:  # told by every test instead of ending the collection
                found.append(Prepared(subject, "", str(error)))
                continue
            found += [Prepared(subject, name) for name in recipes or [""]]
        metafunc.parametrize("prepared", found, ids=[p.recipe or p.subject.name for p in found], scope="class")

    def test_stages_train_what_they_declare(self, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Finite loss, gradients exactly where declared, frozen tensors bitwise unchanged."""
        from clipgraft.testing.trial import trains_as_declared

        with _told():
            trains_as_declared(prepared.trial(tmp_path_factory))

    def test_the_same_under_bf16(self, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> None:
        """As above, under autocast."""
        from clipgraft.testing.trial import trains_under_bf16

        with _told():
            trains_under_bf16(prepared.trial(tmp_path_factory))

    def test_four_steps_are_two_and_a_resume_and_two(
        self, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Weights, losses and export, bit for bit."""
        from clipgraft.testing.trial import resumes_exactly

        with _told():
            resumes_exactly(prepared.trial(tmp_path_factory))

    def test_two_ranks_have_the_gradient_of_one_process(
        self, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Equal on both, and that of the whole batch."""
        from clipgraft.testing.two_ranks import ranks_agree

        with _told():
            ranks_agree(prepared.trial(tmp_path_factory))

    def test_the_export_opens_where_it_says(self, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> None:
        """L0 and L1 in open_clip without the plugin, L2 here, with the features of the model that was trained."""
        from clipgraft.testing.opened import exports_as_it_says

        with _told():
            exports_as_it_says(prepared.trial(tmp_path_factory))


class Conformance(Declarations, Runs):
    """All eleven checks of one plugin: set ``plugin`` in a subclass whose name starts with ``Test``."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Both kinds."""
        Declarations.pytest_generate_tests(self, metafunc)
        Runs.pytest_generate_tests(self, metafunc)


class TestConformance(Conformance):
    """The plugins of ``--clipgraft-plugin``."""
