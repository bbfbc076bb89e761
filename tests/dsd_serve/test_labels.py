import time

import pytest

from dsd_serve import labels
from dsd_serve.errors import InputError
from dsd_serve.labels import ImageClass, all_classes, resolve, search

ALL = range(1000)


@pytest.mark.parametrize("text", ["207", "n02099601", "golden retriever", "Golden Retriever", " golden-retriever "])
def test_a_class_is_found_under_each_of_its_names(text):
    assert resolve(text, ALL).index == 207


def test_every_class_is_found_by_index_and_wnid():
    for c in all_classes():
        assert resolve(str(c.index), ALL) == resolve(c.wnid, ALL) == c


def test_an_untrained_class_is_named_and_the_trained_ones_listed():
    with pytest.raises(InputError, match=r"tiger shark, which this model was not trained on; it knows 207"):
        resolve("3", [207])


@pytest.mark.parametrize("text", ["retriever", "crane"])
def test_an_ambiguous_name_lists_its_candidates(text):
    with pytest.raises(InputError, match="ambiguous"):
        resolve(text, ALL)


def test_part_of_a_name_is_enough_if_it_is_unambiguous():
    assert resolve("retriever", [1, 207]).index == 207


@pytest.mark.parametrize(
    "text",
    ["1000", "-1", "", "  ", "n00000000", "x" * 5000, "207.0", "💥", "金毛犬", "２０７", "²⁰⁷", "٢٠٧", "???", "\u200b"],
)
def test_an_unknown_class_is_an_error(text):
    with pytest.raises(InputError, match="class"):
        resolve(text, [1, 207])


def test_a_misspelling_gets_a_suggestion():
    with pytest.raises(InputError, match=r"did you mean 207 \(Golden Retriever\)"):
        resolve("golden retreiver", ALL)


def test_search_finds_words_in_any_case():
    assert [c.index for c in search("RETRIEVER gold")] == [207]
    assert [c.index for c in search("", [3, 5])] == [3, 5]
    assert search("no such thing") == []


@pytest.mark.parametrize("text", ["金", "２０７", "²", "???", "💥", "\u200b", " ", "x" * 201])
def test_a_query_without_a_word_finds_nothing(text):
    assert search(text) == search(text, [1, 207]) == []


@pytest.mark.parametrize(
    "text",
    ["GOLDEN\tretriever", "ｇｏｌｄｅｎ retriever", "gol\u00adden retriever", "gólden rétriever", "golden_retriever"],
)
def test_spelling_variants_of_a_name_are_found(text):
    assert resolve(text, ALL).index == 207


@pytest.fixture
def own_names(monkeypatch):
    """Replace the classes by those of a custom model; returns their table."""

    def use(*names):
        table = tuple(ImageClass(index, f"own{index}", name) for index, name in enumerate(names))
        monkeypatch.setattr(labels, "all_classes", lambda: table)
        clear()

    def clear():
        for cached in (labels.spellings, labels.by_code, labels.by_name):
            cached.cache_clear()

    yield use
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize(
    ("names", "text", "index"),
    [
        (["Café", "Tea"], "cafe", 0),
        (["Café", "Cafe"], "café", 0),
        (["Café", "Cafe"], "CAFE", 1),
        (["Cafe\u0301", "Tea"], "Caf\u00e9", 0),
        (["Straße", "Gasse"], "STRASSE", 0),
        (["金毛犬", "金鱼"], "金毛犬", 0),
        (["金毛犬", "金鱼"], "金毛", 0),
        (["かき", "がき"], "がき", 1),
        (["कि", "का"], "का", 1),
        (["ёлка", "дуб"], "елка", 0),
        (["강아지", "고양이"], "고양이", 1),
        (["C", "C++", "C#"], "c", 0),
        (["C", "C++", "C#"], "C++", 1),
        (["one", "two", "1"], "1", 1),
        (["zero", "one", "two", "²"], "²", 3),
        (["dog", "dog house"], "dog", 0),
    ],
)
def test_names_may_be_in_any_script(own_names, names, text, index):
    own_names(*names)
    assert resolve(text, range(len(names))).index == index


def test_names_that_differ_only_in_accents_are_ambiguous_without_them(own_names):
    own_names("Café", "Cafè", "Tea")
    with pytest.raises(InputError, match=r"ambiguous: it may mean 0 \(Café\), 1 \(Cafè\)"):
        resolve("cafe", range(3))


def test_sentences_name_the_parameter_and_stay_short():
    for text in ("x" * 1_000_000, "\U000e0001" * 200, "金" * 200, "goldem " * 28):
        with pytest.raises(InputError, match=r"^from\.class ") as caught:
            resolve(text, ALL, "from.class")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text", ["a " * 40_000, "golden " * 100_000, "a " * 100, "s c b p t r " * 16, "\ufdfa" * 200], ids=range(5)
)
def test_every_text_is_resolved_quickly(text):
    labels.spellings(), labels.by_name()
    began = time.process_time()
    with pytest.raises(InputError):
        resolve(text, ALL)
    search(text)
    assert time.process_time() - began < 0.5  # it takes milliseconds; the first of these once took half a minute
