from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dsd_serve.config import PRESETS
from dsd_serve.errors import CheckpointError
from dsd_serve.labels import table_of
from tests.support.models import OWN, PLAIN
from training.evaluation.evaluator import Evaluator, ImageSet, common_classes, imagenet_labels
from training.evaluation.main import named_classes

WITH_WNIDS = replace(OWN, class_wnids=("n02123394", "n02099601", "n07930864"))


def subject(config, name="model"):
    classes = {c.index: c for c in table_of(config).trained} or {config.null_label: None}
    return SimpleNamespace(name=name, classes=classes)


def images(*labels):
    return SimpleNamespace(labels=np.array(labels))


class Classifier:
    """Finds every image correct whose label is golden retriever's, and keeps what it was asked."""

    def log_probabilities(self, features):
        return np.full((len(features), 1000), np.log(1e-3))

    def correct(self, features, labels, among):
        self.among = sorted(among)
        return labels == 207


def evaluator(classes, subjects):
    rng = np.random.default_rng(0)
    shown = ImageSet("real", np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 1]), rng.random((4, 1280)))
    return Evaluator(8, classes, shown, shown, Classifier(), imagenet=imagenet_labels(classes, subjects))


def test_top1_is_measured_where_wnids_name_imagenet():
    subjects = [subject(WITH_WNIDS)]
    measured = evaluator((0, 1, 2), subjects)
    numbers = measured.real(4)
    assert numbers["top1_lite0"] == 0.5
    assert measured.classifier.among == [207, 283, 968]
    assert named_classes(measured, subjects) == {"class_names": ["Grandma's cat", "金毛犬", "Café"]}


@pytest.mark.parametrize("config", [OWN, PLAIN, replace(OWN, class_wnids=("", "n02099601", "n07930864"))])
def test_top1_is_left_out_with_a_sentence_elsewhere(config):
    subjects = [subject(config)]
    classes = tuple(subjects[0].classes)
    measured = evaluator(classes, subjects)
    assert "top1_lite0" not in measured.real(4)
    assert named_classes(measured, subjects)["left_out"].startswith("top1_lite0 is left out: the classifier has")


def test_labels_of_imagenet_are_their_own():
    classes = (1, 207)
    assert imagenet_labels(classes, [subject(replace(PRESETS["demo"], classes=classes))]) == {1: 1, 207: 207}
    assert imagenet_labels(classes, []) == {1: 1, 207: 207}
    assert imagenet_labels((5000,), []) is None


def test_models_are_compared_on_the_classes_that_both_have():
    assert common_classes([subject(OWN), subject(replace(OWN, classes=(1, 2)))], [images(0, 1, 2)]) == (1, 2)
    with pytest.raises(CheckpointError, match="0 is Grandma's cat in one and 金毛犬 in two"):
        other = replace(OWN, class_names=("金毛犬", "Grandma's cat", "Café"))
        common_classes([subject(OWN, "one"), subject(other, "two")], [images(0, 1)])
    assert common_classes([subject(PLAIN)], [images(207, 950)]) == (0,)
    with pytest.raises(CheckpointError, match="a model without classes compares only with another one"):
        common_classes([subject(PLAIN), subject(OWN)], [images(0)])


def test_the_probe_is_left_out_where_there_are_too_few_images(caplog):
    one = evaluator([0, 1, 2], [subject(WITH_WNIDS)])
    assert one.probe(subject(WITH_WNIDS), np.zeros((4, 4, 3), np.float32)) == {}
    assert "the accuracy of a linear probe is left out: a linear probe needs" in caplog.text
