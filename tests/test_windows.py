"""Windows of tokens: articles are never begun in the middle, and no more of a text is tokenised than needed."""

import pytest
import torch
from gguf_files import write as write_gguf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polykv import gguf, shipped, windows
from polykv.errors import PolyKVError
from reference_model.tokenizer import build_tokenizer

LENGTHS = (40, 5, 60, 10, 45, 50)
ARTICLES = [
    f" \n = Title {n} = \n \n "
    + " \n ".join(["word"] * length)
    + f" \n = {n} and <unk> k = \n no title \n \n = = Part = = \n \n end \n"
    for n, length in enumerate(LENGTHS)
]
WIKITEXT = "".join(ARTICLES)


def texts(tokenizer, found):
    return [tokenizer.decode(ids_BT[0]) for ids_BT in found]


def lengths(tokenizer):
    return [windows.encode(tokenizer, article.strip()).shape[1] for article in ARTICLES]


def test_wikitext2_has_the_articles_that_are_published():
    # 60 in the test split: Merity et al. 2016, arXiv 1609.07843, table 1.
    titles = [found.group().strip() for found in windows.TITLE.finditer(shipped.read("wikitext2"))]
    assert len(titles) == 60 and "= Du Fu =" in titles
    assert not any("k =" in title or "= =" in title for title in titles)


def test_long_articles_are_taken_one_a_window_in_order(tokenizer):
    context = sorted(lengths(tokenizer))[2]  # four of six are long enough
    found = windows.of_articles(tokenizer, WIKITEXT, context, 4)
    assert [ids_BT.shape for ids_BT in found] == [(1, context)] * 4
    starts = [text.split(" =")[0] for text in texts(tokenizer, found)]
    assert starts == [f"= Title {n}" for n in (0, 2, 4, 5)]
    for ids_BT, n in zip(found, (0, 2, 4, 5), strict=True):
        whole = windows.encode(tokenizer, ARTICLES[n].strip())
        assert torch.equal(ids_BT, whole[:, :context])
    fewer = windows.of_articles(tokenizer, WIKITEXT, context, 2)
    assert texts(tokenizer, fewer) == texts(tokenizer, found)[:2]


def test_where_they_are_too_few_windows_run_on_and_share_nothing(tokenizer):
    context = sorted(lengths(tokenizer))[2]
    found = texts(tokenizer, windows.of_articles(tokenizer, WIKITEXT, context, 5))
    # The second article is too short alone and runs on into the third, so does the fourth.
    assert [text.split(" =")[0] for text in found] == [f"= Title {n}" for n in (0, 1, 3, 5)]
    assert "Title 2" in found[1]
    longest = max(lengths(tokenizer)) + 1
    found = texts(tokenizer, windows.of_articles(tokenizer, WIKITEXT, longest, 16))
    assert 0 < len(found) < 6 and all(text.startswith("= Title") for text in found)
    titles = [word for text in found for word in text.split("= Title ")[1:]]
    assert len({title.split(" =")[0] for title in titles}) == len(titles)


def test_a_text_that_is_too_short_or_no_wikitext(tokenizer):
    assert windows.of_articles(tokenizer, WIKITEXT, 100_000, 3) == []
    with pytest.raises(PolyKVError, match="document=file"):
        windows.of_articles(tokenizer, "no title\n = = Part = = \n", 10, 3)


class Counting:
    """A tokenizer that knows how much it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.n_characters = tokenizer, 0

    def __call__(self, text, **options):
        self.n_characters += len(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("n_tokens", (1, 100, 999, 5000))
def test_the_beginning_of_a_text_is_tokenised_as_in_the_whole(n_tokens, tokenizer):
    text, counting = shipped.read("wikitext2")[:200_000], Counting(tokenizer)
    found = windows.first_tokens(counting, text, n_tokens)
    assert torch.equal(found, windows.encode(tokenizer, text)[:, :n_tokens])
    assert counting.n_characters < 20 * (n_tokens + windows.MARGIN) + windows.APART < len(text)


@pytest.mark.parametrize("unit", ("word", "1234567", "読めない文字列", "a, ", " \n", "é\u2028"))
def test_of_a_long_line_little_is_tokenised_whatever_it_holds(unit, tokenizer):
    text, counting = unit * (2_000_000 // len(unit)), Counting(tokenizer)
    found = windows.first_tokens(counting, text, 200)
    assert found.shape == (1, 200) and counting.n_characters < 20_000
    assert torch.equal(found, windows.encode(tokenizer, text[:40_000])[:, :200])


PIECES = st.text("ab e,.\n\t12345é読文\u2028'-_😀ّ", min_size=1, max_size=12)
REPEATED = st.tuples(PIECES, st.sampled_from((1, 1, 2, 40, 400))).map(
    lambda part: part[0] * part[1]
)
TEXTS = st.lists(REPEATED, min_size=1, max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizers_by_name(tokenizer, llama, tmp_path_factory):
    """Of the tests, of the package, of a GGUF file, and two that no border stops: of merges alone, and one that
    counts the digits of a number from its end.
    """
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    found = {"tests": tokenizer, "shipped": build_tokenizer()}
    found["gguf"] = gguf.load_tokenizer(write_gguf(path, llama, tokenizer))
    for name, split in (("merges", None), ("digits", r"\d{1,3}(?=(?:\d{3})*(?!\d))|\D+")):
        bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*parts, bytes_])
        found[name] = PreTrainedTokenizerFast(tokenizer_object=bpe)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ("tests", "shipped", "gguf", "merges", "digits"))
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, n_tokens=st.sampled_from((1, 7, 60, 300)))
@example(text="12 " + "1234567" * 3000, n_tokens=60)
def test_the_beginning_of_any_text_is_tokenised_as_in_the_whole(
    tokenizers_by_name, name, text, n_tokens
):
    tokenizer = tokenizers_by_name[name]
    whole = windows.encode(tokenizer, text)[:, :n_tokens]
    assert torch.equal(windows.first_tokens(tokenizer, text, n_tokens), whole)


@pytest.mark.parametrize("text", ("a " * 60, "", " " * 50_000))
def test_texts_of_few_tokens_are_read_whole(text, tokenizer):
    found = windows.first_tokens(tokenizer, text, 500)
    assert torch.equal(found, windows.encode(tokenizer, text)[:, :500])


def test_tokens_longer_than_expected_are_found_too(tokenizer):
    # A token a word of 40 characters: five times what is read at first.
    class Words:
        def __call__(self, text, **options):
            return type("Ids", (), {"input_ids": torch.arange(len(text.split()))[None]})

    text = " ".join(["w" * 40] * 2000)
    assert windows.first_tokens(Words(), text, 300).shape == (1, 300)


def test_consecutive_windows_are_as_many_as_fit(tokenizer):
    text = "A quantized cache is smaller than a full cache . " * 40
    ids_BT = windows.encode(tokenizer, text)
    context = ids_BT.shape[1] // 3 - 1
    for limit, n in ((2, 2), (3, 3), (16, 3)):
        found = windows.consecutive(tokenizer, text, context, limit)
        assert torch.equal(torch.cat(found, dim=1), ids_BT[:, : n * context]) and len(found) == n
    assert windows.consecutive(tokenizer, text, ids_BT.shape[1] + 1, 16) == []
    (whole,) = windows.consecutive(tokenizer, text, None, 16)
    assert torch.equal(whole, ids_BT)
