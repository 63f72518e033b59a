"""Is the right answer in a reply? Verdicts that a reader would give."""

import pytest

from polykv.evaluation.answers import contains


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("It was launched on 16 July 1969.", "16 July 1969"),
        ("The rocket was a Saturn V, I think.", "the Saturn V"),
        ("KENNEDY's goal", "Kennedy"),
        ("about 1,851 tokens", "1851"),
        ("about 1851 tokens", "1,851"),
        ("It lit at 9:32 local time.", "9:32"),
        ("a thirty-storey\n building", "thirty storey"),
        ("in 1969-1970", "1970"),
        ("The answer is 7.", "7"),
        ("A", "A"),
        ("Straße", "STRASSE"),
        ("“Eagle”", "Eagle"),
    ],
)
def test_it_is(reply, answer):
    assert contains(reply, answer)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("", "Eagle"),
        ("The Eagles", "Eagle"),
        ("2.5 metres", "5"),
        ("at 9:05", "5"),
        ("1,851", "851"),
        ("July 16 1969", "16 July"),
        ("Saturn", "Saturn V"),
        ("anything", ""),
        ("anything", " . "),
        ("", ""),
    ],
)
def test_it_is_not(reply, answer):
    assert not contains(reply, answer)
