"""The registry: built-in entries, and entries of other packages, imported on lookup."""

from __future__ import annotations

import sys

import pytest
from fake_packages import install

from nipq_search.cost import COSTS
from nipq_search.errors import UserError
from nipq_search.quant import QUANTIZERS
from nipq_search.registry import Plugin, RegistrationError, Registry
from nipq_search.report import FIGURES
from nipq_search.search.strategies.samplers import SAMPLERS
from nipq_search.search.strategies.strategies import STRATEGIES
from nipq_search.tasks import TASKS

GROUP = "nipq_search.test_words"
WORDS = "good = 'a word'\nalso = 'another'\nwrong = 7\n"


def is_a_word(name, value):
    return None if isinstance(value, str) else "not a word"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An import path on which packages can be installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_words")]:
        del sys.modules[name]


@pytest.fixture
def registry():
    """A registry of words with one built-in entry."""
    found = Registry("word", group=GROUP, check=is_a_word, hint="; see a dictionary")
    found.register("own", "own word")
    return found


def offer(site, package="fake-words", version="1.2", module="fake_words", source=WORDS, **names):
    points = {GROUP: {name: f"{module}:{target}" for name, target in names.items()}}
    install(site, package, version, points=points, modules={module: source})


def test_it_is_a_mapping(registry):
    registry.register("other", "word")
    assert dict(registry) == {"own": "own word", "other": "word"}
    assert list(registry) == list(registry.keys()) == ["own", "other"]
    assert len(registry) == 2 and "own" in registry and "none" not in registry
    assert registry.get("own") == "own word" and registry.get("none", "x") == "x"
    assert {**registry} == dict(registry.items())


def test_a_name_is_taken_once_and_values_are_checked(registry):
    with pytest.raises(RegistrationError, match="^word 'own' is already registered$"):
        registry.register("own", "own word")
    with pytest.raises(RegistrationError, match="^word 'seven': not a word$"):
        registry.register("seven", 7)


def test_temporary_entries_go_again(registry):
    with pytest.raises(ZeroDivisionError):
        with registry.temporarily("own", "changed"), registry.temporarily("new", "word"):
            assert dict(registry) == {"own": "changed", "new": "word"}
            raise ZeroDivisionError
    assert dict(registry) == {"own": "own word"}


def test_unknown_names_suggest_the_nearest_one(site, registry):
    offer(site, good="good")
    with pytest.raises(UserError, match=r"^unknown word 'owm' \(did you mean 'own'\?\); see a d"):
        registry["owm"]
    with pytest.raises(UserError, match=r"did you mean 'good'\?"):
        registry["goood"]
    with pytest.raises(UserError, match=r"^some.key: unknown word 'xyz' \(known: good, own\)"):
        registry.lookup("xyz", "some.key")
    assert "fake_words" not in sys.modules


def test_plugins_are_listed_without_an_import_and_imported_when_looked_up(site, registry):
    offer(site, good="good", also="also")
    assert registry.names() == ["also", "good", "own"]
    assert "good" in registry and list(registry) == ["own"]
    plugin = Plugin(name="good", package="fake-words", version="1.2", target="fake_words:good")
    assert registry.plugin("good") == plugin and str(plugin) == "fake-words 1.2"
    assert registry.plugin("own") is None
    assert registry.clashes() == []
    assert "fake_words" not in sys.modules
    assert registry["good"] == "a word" and registry.lookup("good", "key") == "a word"
    assert "fake_words" in sys.modules
    assert list(registry) == ["own", "good"] and len(registry) == 2


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("import no_such_module\n", "good", r"cannot be loaded \(ModuleNotFoundError: No module"),
        ("raise SystemExit('no')\n", "good", r"cannot be loaded \(SystemExit: no\)"),
        ("", "good", r"cannot be loaded \(AttributeError: module 'fake_words' has no attr"),
        (WORDS, "wrong", "not a word"),
    ],
)
def test_a_broken_plugin_is_named_when_it_is_looked_up(site, registry, source, target, reason):
    offer(site, source=source, broken=target)
    assert "broken" in registry and "broken" in registry.names() and registry["own"]
    with pytest.raises(UserError, match=reason) as caught:
        registry["broken"]
    message = str(caught.value)
    assert message.startswith(f"word 'broken' of fake-words 1.2 (entry point fake_words:{target})")
    assert message.endswith("; update or uninstall fake-words") and "\n" not in message


def test_own_names_win(site, registry):
    offer(site, own="good")
    assert registry["own"] == "own word" and registry.plugin("own") is None
    assert "fake_words" not in sys.modules
    (clash,) = registry.clashes()
    assert clash == "word 'own' of fake-words 1.2 is ignored: nipq_search has its own"


def test_two_packages_with_one_name_are_an_error_for_those_who_use_it(site, registry):
    offer(site, good="good", also="also")
    offer(site, "more-words", "3", "fake_words_more", good="good")
    for use in (registry.__getitem__, registry.plugin):
        with pytest.raises(UserError, match="word 'good' is provided by") as caught:
            use("good")
        assert "fake-words 1.2" in str(caught.value) and "more-words 3" in str(caught.value)
        assert "uninstall all but one" in str(caught.value)
    assert "good" in registry and registry["also"] == "another"
    (clash,) = registry.clashes()
    assert "fake-words 1.2" in clash and "more-words 3" in clash


def test_a_registry_without_a_group_has_no_plugins(site):
    offer(site, good="good")
    alone = Registry("word")
    assert alone.plugins() == [] and "good" not in alone
    with pytest.raises(UserError, match="^unknown word 'good'$"):
        alone["good"]


@pytest.mark.parametrize(
    "registry", [QUANTIZERS, COSTS, TASKS, STRATEGIES, SAMPLERS, FIGURES], ids=lambda r: r.kind
)
def test_every_family_refuses_a_taken_name_alike(registry):
    assert len(registry) == len(dict(registry)) >= 3
    for name, value in registry.items():
        taken = f"{registry.kind} '{name}' is already registered"
        with pytest.raises(RegistrationError, match=taken):
            registry.register(name, value)
    with pytest.raises(UserError, match=f"^unknown {registry.kind} 'no_such_name'"):
        registry["no_such_name"]


@pytest.mark.parametrize(
    ("registry", "problem"),
    [
        (QUANTIZERS, "not a subclass of nipq_search.quant.FakeQuantizer"),
        (COSTS, "not a nipq_search.cost.Cost"),
        (TASKS, "not a class or function that builds a task"),
        (STRATEGIES, "not a subclass of .*Strategy"),
        (SAMPLERS, "not a .*SamplerFactory"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_every_family_checks_what_a_plugin_offers(site, registry, problem):
    points = {registry.group: {"fake_entry": "fake_words:wrong"}}
    install(site, "fake-words", points=points, modules={"fake_words": WORDS})
    with pytest.raises(
        UserError, match=f"{registry.kind} 'fake_entry' of fake-words 1.0 .*{problem}"
    ):
        registry["fake_entry"]


def test_a_cost_is_offered_under_its_own_name(site):
    source = "from nipq_search.cost import COSTS\ncost = COSTS['bops']\n"
    points = {COSTS.group: {"fake_bops": "fake_words:cost"}}
    install(site, "fake-words", points=points, modules={"fake_words": source})
    with pytest.raises(UserError, match="its name is 'bops'; update or uninstall"):
        COSTS["fake_bops"]
