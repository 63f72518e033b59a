"""Is the right answer in a reply? Verdicts that a reader would give."""

import pytest

from polykv.evaluation.answers import begins, contains
from polykv.reference.text import matches


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
        ("1 851 tokens", "1,851"),
        ("3.50 km", "3.5"),
        ("half of it, 3/4 of that", "0.75"),
        ("from −5 degrees", "-5"),
        ("the 1202 alarm", "1202"),
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
        ("1,851", "1"),
        ("3.5 km", "3"),
        ("3,5 km", "3"),
        ("-5 degrees", "5"),
        ("10^3", "103"),
        ("Pad 39A", "39"),
        ("July 16 1969", "16 July"),
        ("Saturn", "Saturn V"),
        ("anything", ""),
        ("anything", " . "),
        ("", ""),
    ],
)
def test_it_is_not(reply, answer):
    assert not contains(reply, answer)


@pytest.mark.parametrize("is_right", (begins, matches))
@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Saturn V rocket", "a Saturn V rocket"),
        ("a Saturn V rocket", "Saturn V rocket"),
        ("A Saturn V rocket, I think.", "a Saturn V rocket"),
        ("1,851 tokens", "1851"),
        ("3.5 km", "3.5"),
        ("Eagle.", "Eagle"),
    ],
)
def test_a_reply_begins_with_it(is_right, reply, answer):
    assert is_right(reply, answer)


@pytest.mark.parametrize("is_right", (begins, matches))
@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("1,851 tokens", "1"),
        ("3.5 km", "3"),
        ("12:30", "12"),
        ("Saturn Vs", "Saturn V"),
        ("the rocket was a Saturn V", "Saturn V"),
        ("Saturn", "Saturn V"),
        ("anything", ""),
        ("", "Eagle"),
    ],
)
def test_a_reply_does_not_begin_with_it(is_right, reply, answer):
    assert not is_right(reply, answer)


def test_a_marked_answer_is_right_by_its_first_mark_whatever_the_steps():
    assert matches("so #### 1,080 and #### 3", "1000 + 80. #### 1080")
    assert matches("#### 7.0", "#### 7") and not matches("#### 7.5", "#### 7")
    assert not matches("it is 7", "#### 7")
