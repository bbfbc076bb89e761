import pytest

from dsd_serve.errors import InputError
from dsd_serve.labels import all_classes, resolve, search

ALL = range(1000)


@pytest.mark.parametrize("text", ["207", "n02099601", "golden retriever", "Golden Retriever", " golden-retriever "])
def test_a_class_has_many_names(text):
    assert resolve(text, ALL).index == 207


def test_every_class_is_found_by_index_and_wnid():
    for c in all_classes():
        assert resolve(str(c.index), ALL) == resolve(c.wnid, ALL) == c


def test_an_untrained_class_is_named_and_what_is_known_listed():
    with pytest.raises(InputError, match=r"tiger shark, which this model was not trained on; it knows 207"):
        resolve("3", [207])


@pytest.mark.parametrize("text", ["retriever", "crane"])
def test_an_ambiguous_name_lists_its_candidates(text):
    with pytest.raises(InputError, match="ambiguous"):
        resolve(text, ALL)


def test_part_of_a_name_is_enough_when_only_one_trained_class_has_it():
    assert resolve("retriever", [1, 207]).index == 207


@pytest.mark.parametrize("text", ["1000", "-1", "", "  ", "n00000000", "x" * 5000, "207.0", "💥"])
def test_what_names_no_class_is_an_error(text):
    with pytest.raises(InputError, match="class"):
        resolve(text, [1, 207])


def test_a_misspelling_gets_a_suggestion():
    with pytest.raises(InputError, match=r"did you mean 207 \(Golden Retriever\)"):
        resolve("golden retreiver", ALL)


def test_search_finds_words_in_any_case():
    assert [c.index for c in search("RETRIEVER gold")] == [207]
    assert [c.index for c in search("", [3, 5])] == [3, 5]
    assert search("no such thing") == []
