"""Which image has which class, seed and index."""

from hypothesis import given
from hypothesis import strategies as st

from dsd_serve.labels import ImageClass
from dsd_serve.params import SamplingParams
from dsd_serve.shell.sample_set import SampleSet

CLASSES = tuple(ImageClass(index, "", str(index)) for index in (1, 207, 950))


@given(per_class=st.integers(1, 20), more=st.integers(1, 20), index=st.integers(0, 10**6))
def test_every_class_has_its_number_and_a_larger_set_begins_with_a_smaller_one(per_class, more, index):
    params = SamplingParams(seed=3, index=index)
    small, large = (SampleSet(CLASSES, count, params) for count in (per_class, per_class + more))
    samples = [small.sample(number) for number in range(len(small))]
    labels = [sample.label for sample in samples]
    assert [labels.count(label) for label in (1, 207, 950)] == [per_class] * 3
    assert [sample.params.index for sample in samples] == list(range(index, index + len(small)))
    assert samples == [large.sample(number) for number in range(len(small))]


@given(per_class=st.integers(1, 20), index=st.integers(0, 10**6), skip=st.integers(0, 59))
def test_an_image_depends_on_its_index_alone(per_class, index, skip):
    one = SampleSet(CLASSES, per_class, SamplingParams(index=index + skip)).sample(0)
    other = SampleSet(CLASSES, 20, SamplingParams(index=index)).sample(skip)
    assert (one.target, one.params, one.name) == (other.target, other.params, other.name)


def test_a_model_without_classes_has_the_label_0():
    sample = SampleSet((None,), 5, SamplingParams(seed=7)).sample(4)
    assert (sample.name, sample.task.label) == ("0-7-000004", 0)
