"""Decode drift against an independent computation on a tiny model, and its study from a cell to findings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT, checked_cell
from transformers import DynamicCache

from analysis import decode_drift as shown
from analysis.load import load
from analysis.style import Picture
from experiments.decode_drift import STUDY
from experiments.session import Session
from polykv.codecs.int8 import Int8
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.codecs.uniform import Uniform
from polykv.errors import PolyKVError
from polykv.evaluation import prompts
from polykv.evaluation.decode_drift import MODES, drift, log_probs, reply_of, write_replies
from polykv.pool import SharedKVPool
from polykv.recipe import Exempt, Recipe, load_recipe
from polykv.results import Rows, Store

N_PROMPT, N_REPLY, PAGE = 41, 24, 6
Q4_CODECS = Uniform(4), Uniform(4)
Q4 = Recipe("q4", *Q4_CODECS)


def ids(tokenizer, start, n_tokens):
    return torch.tensor(tokenizer(TEXT[start:]).input_ids[:n_tokens])


@pytest.fixture(scope="module")
def reply(llama, tokenizer):
    (found,) = write_replies(llama, [ids(tokenizer, 0, N_PROMPT)], N_REPLY, stops=())
    return found


def divergence(model, reply, recipe, page=PAGE):
    return drift(model, reply, log_probs(model, reply, load_recipe("full")), recipe, page)


def test_the_reply_is_the_models_own_greedy_one(llama, tokenizer, reply):
    prompt_BT = ids(tokenizer, 0, N_PROMPT)[None]
    whole_BT = llama.generate(
        prompt_BT, do_sample=False, max_new_tokens=N_REPLY, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(reply.ids_BT, whole_BT)
    assert reply.pool.n_tokens == N_PROMPT - 1 and reply.n_tokens == N_REPLY


def test_replies_in_a_batch_are_those_written_alone(llama, tokenizer):
    texts = [ids(tokenizer, 0, N_PROMPT), ids(tokenizer, 100, 17)]
    together = write_replies(llama, texts, N_REPLY, stops=())
    for text, found in zip(texts, together, strict=True):
        (alone,) = write_replies(llama, [text], N_REPLY, stops=())
        assert torch.equal(found.ids_BT, alone.ids_BT)


def test_a_reply_ends_at_a_stop(llama, tokenizer, reply):
    stop = int(reply.rest_BT[0, 5])
    first = reply.rest_BT[0, 1:].tolist().index(stop)
    (ended,) = write_replies(llama, [ids(tokenizer, 0, N_PROMPT)], N_REPLY, stops=[stop])
    assert ended.n_tokens == first + 1


@pytest.mark.parametrize("page", [None, PAGE])
def test_the_uncompressed_cache_gives_the_plain_models_probabilities(llama, reply, page):
    logits_BTV = llama(reply.ids_BT[:, :-1]).logits
    expected_TV = logits_BTV[0, N_PROMPT - 1 :].log_softmax(-1)
    found_TV = log_probs(llama, reply, load_recipe("full"), page)
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-4, rtol=1e-4)


def test_the_full_recipe_has_no_divergence(llama, reply):
    for found in divergence(llama, reply, load_recipe("full")).values():
        assert found.kl.max() < 1e-6 and found.others["same_top1"].all()


def by_hand(model, reply, key, value, page):
    """Log-probabilities, one token at a time, with codecs that know each token alone."""
    cache = DynamicCache(
        (key.decode(key.encode(k)), value.decode(value.encode(v)))
        for k, v in (reply.pool.decode_layer(layer) for layer in range(reply.pool.n_layers))
    )
    found = []
    for place in range(reply.n_tokens):
        logits_BTV = model(reply.rest_BT[:, place : place + 1], past_key_values=cache).logits
        found.append(logits_BTV[0, -1].log_softmax(-1))
        if page and (place + 1) % page == 0:
            for layer in cache.layers:
                for name, codec in (("keys", key), ("values", value)):
                    x = getattr(layer, name)
                    new = codec.decode(codec.encode(x[:, :, -page:]))
                    setattr(layer, name, torch.cat([x[:, :, :-page], new], dim=2))
    return torch.stack(found)


@pytest.mark.parametrize("page", [None, PAGE, 5])  # 5: the last page is not full
def test_divergence_is_that_of_an_independent_computation(llama, reply, page):
    codecs = Uniform(3), TurboQuantMSE(2)
    found = divergence(llama, reply, Recipe("mine", *codecs), page or PAGE)
    found = found["pages" if page else "exact"]
    full_TV = by_hand(llama, reply, *[load_recipe("full").key] * 2, None)
    other_TV = by_hand(llama, reply, *codecs, page)
    kl_T = torch.nn.functional.kl_div(other_TV, full_TV, reduction="none", log_target=True).sum(-1)
    assert kl_T.mean() > 1e-3
    torch.testing.assert_close(torch.tensor(found.kl), kl_T, atol=1e-4, rtol=1e-3)


def test_the_first_page_does_not_know_that_it_will_be_quantized(llama, reply):
    found = divergence(llama, reply, Q4)
    exact, pages = (found[mode].kl for mode in MODES)
    assert exact[:PAGE] == pytest.approx(pages[:PAGE], rel=1e-3, abs=1e-7)
    assert abs(exact[PAGE:] / pages[PAGE:] - 1).min() > 1e-3


def test_new_tokens_take_the_statistics_of_the_prompt(llama, reply):
    """Int8 per tensor has one scale: that of the prompt, beyond which values are cut."""
    recipe = Recipe("int8", Int8(), Int8())
    scales = [
        x.abs().max() / 127
        for layer in range(reply.pool.n_layers)
        for x in reply.pool.decode_layer(layer)
    ]
    cut = []

    cache = reply.pool.under(recipe).dequantize()
    llama(reply.rest_BT[:, :PAGE], past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            x, scale = getattr(layer, name), scales[len(cut)]
            new = (x[:, :, -PAGE:] / scale).round().clamp(-127, 127) * scale
            cut.append(bool((new - x[:, :, -PAGE:]).abs().max() > scale))
            setattr(layer, name, torch.cat([x[:, :, :-PAGE], new], dim=2))
    assert any(cut)  # so that the page's own scale would give other values
    rest_BT = reply.rest_BT[:, PAGE : 2 * PAGE]
    expected_TV = llama(rest_BT, past_key_values=cache).logits[0].log_softmax(-1)
    found_TV = log_probs(llama, reply, recipe, PAGE)[PAGE : 2 * PAGE]
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-4, rtol=1e-4)


def test_another_prompts_values_are_seen(llama, tokenizer, reply):
    other = reply_of(llama, ids(tokenizer, 60, N_PROMPT), reply.rest_BT[0, 1:])
    layers = [
        (reply.pool.decode_layer(layer)[0], other.pool.decode_layer(layer)[1])
        for layer in range(reply.pool.n_layers)
    ]
    damaged = replace(reply, pool=SharedKVPool.from_layers(layers, load_recipe("full")))
    full_TV = log_probs(llama, reply, load_recipe("full"))
    wrong, right = (drift(llama, one, full_TV, Q4, PAGE) for one in (damaged, reply))
    for mode in MODES:
        assert wrong[mode].kl.mean() > 10 * right[mode].kl.mean()


def test_recent_tokens_are_quantized_once_they_are_old(llama, reply):
    found = divergence(llama, reply, Recipe("r", *Q4_CODECS, Exempt(recent=PAGE)))
    apart = abs(found["pages"].kl / found["exact"].kl - 1) > 1e-3
    # The first page pushes prompt tokens out of the window, which the second one reads.
    assert not apart[:PAGE].any() and apart[PAGE:].all()
    for exempt in (Exempt(recent=N_PROMPT + N_REPLY), Exempt(first_layers=4)):
        found = divergence(llama, reply, Recipe("r", *Q4_CODECS, exempt))
        assert max(one.kl.max() for one in found.values()) < 1e-3  # fp16


# Prompts and settings


def test_prompts_of_a_file_are_its_lines(tmp_path, tokenizer):
    (tmp_path / "mine.txt").write_text("One .\n\nTwo .\n")
    path = str(tmp_path / "mine.txt")
    assert prompts.load(path, 2) == ["One .", "Two ."] and prompts.label(path) == "file mine.txt"
    found = prompts.ids_of(tokenizer, "Two .", "plain", "Q: {question}\nA:")
    assert tokenizer.decode(found) == "Q: Two .\nA:"
    with pytest.raises(PolyKVError, match="n_prompts=3"):
        prompts.load(path, 3)


def local(checkpoint, *overrides):
    text = checkpoint / "prompts.txt"
    text.write_text("\n".join(TEXT[start : start + 120] for start in range(0, 90, 10)))
    return ["experiment=decode_drift", "model=local", f"model.path={checkpoint}", f"prompts={text}",
            "n_prompts=9", "max_new_tokens=32", "page_tokens=8", "device=cpu", *overrides]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("reader=in_place", "in_place"),
        ("page_tokens=0", "page_tokens=0"),
        ("ignore_end=2", "ignore_end"),
        ("n_prompts=10", "n_prompts=10"),
        ("prompts=/nowhere.txt", "/nowhere.txt"),
        ("max_new_tokens=250", "256"),
        ("weights=random", "random weights"),
    ],
)
def test_bad_input_is_refused(checkpoint, override, named):
    with pytest.raises(PolyKVError, match=named) as refused:
        checked_cell(*local(checkpoint, override))
    assert "\n" not in str(refused.value)


def test_other_prompts_are_another_cell(checkpoint):
    study, cfg = checked_cell(*local(checkpoint))
    before = study.identity(cfg)
    with (checkpoint / "prompts.txt").open("a") as file:
        file.write("\nOne more .")
    study, cfg = checked_cell(
        *(one for one in local(checkpoint, "n_prompts=8") if one != "n_prompts=9")
    )
    assert study.identity(cfg) != before


@pytest.fixture(scope="module")
def measured(tmp_path_factory, checkpoint):
    """The rows of two cells, written and read again."""
    root, session = tmp_path_factory.mktemp("drift"), Session()
    for recipe in ("uniform_2bit", "full"):
        study, cfg = checked_cell(*local(checkpoint, f"recipe={recipe}"))
        Store(root).write(study.declaration(), recipe, {}, study.run(cfg, session))
    return load(root).rows


def test_a_cell_has_each_reply_whole_and_in_blocks(measured):
    kl = measured[(measured["metric"] == "kl") & (measured["recipe"] == "uniform_2bit")]
    whole = kl[kl["block"].isna()].set_index(["mode", "sample"])["value"]
    blocks = kl[kl["block"].notna()]
    assert len(whole) == 2 * 9 and (whole > 0).all()
    assert blocks.groupby(["mode", "sample"])["position"].apply(list).map(len).eq(16).all()
    means = blocks.groupby(["mode", "sample"])["value"].mean()
    assert means.to_numpy() == pytest.approx(whole.loc[means.index].to_numpy(), rel=1e-6)
    assert measured.loc[measured["recipe"] == "full", "value"].notna().all()


def test_tables_and_figure_are_of_what_was_measured(measured):
    found = {(line["recipe"], line["mode"]): line for line in shown.table(measured).rows}
    assert set(found) == {(r, m) for r in ("uniform_2bit", "full") for m in ("exact", "pages of 8")}
    assert found["full", "exact"]["kl"].value == 0
    assert found["full", "pages of 8"]["slope"].value is None
    assert found["uniform_2bit", "exact"]["kl"].value > 1e-4
    assert isinstance(shown.figure(measured), Picture)


# What the analysis makes of replies whose slopes are known

TRUE = {"steady": 0.0, "rising": 0.2, "falling": -0.2}  # of the mean, per 100 tokens


def made_up(root, n_prompts=12, certain=0.0):
    """KL with these slopes, and noise; `certain`: slope of a surprisal that all KL are proportional to."""
    rng = np.random.default_rng(0)
    middle = 16 * np.arange(16) + 7.5 - 127.5
    for document in ("gsm8k", "writing"):
        texts = [f"{document}{n}" for n in range(n_prompts // 2)]
        surprisal = rng.lognormal(0, 0.3, (len(texts), 16)) * (1 + certain * middle / 100)
        for recipe, slope in TRUE.items():
            rows = Rows(STUDY.columns, model="m", weights="w", document=document, recipe=recipe,
                        dtype="float32", device="cpu", seed=0, reader="dequantize")  # fmt: skip
            scale = rng.lognormal(-5, 1, len(texts))
            for sample, text in enumerate(texts):
                about = {"sample": sample, "text": text}
                kl = scale[sample] * (1 + slope * middle / 100) * rng.lognormal(0, 0.1, 16)
                kl *= surprisal[sample] if certain else 1
                modes = (
                    ("", "nll_full", surprisal[sample]),
                    ("exact", "kl", kl),
                    ("pages", "kl", 2 * kl),
                )
                for mode, metric, values in modes:
                    place = about | ({"mode": mode} if mode else {})
                    place |= {"page_tokens": 32} if mode == "pages" else {}
                    rows.add(metric, values.mean(), "nats", n=256, **place)
                    for block, value in enumerate(values):
                        at = {"block": block, "position": 16 * block}
                        rows.add(metric, value, "nats", n=16, **at, **place)
                    if metric == "kl":
                        rows.add("same_top1", 0.9, "rate", n=256, **place)
            Store(root).write(STUDY.declaration(), f"{recipe}{document}", {}, rows)
    return load(root).rows


@pytest.mark.slow
def test_slopes_are_found_again(tmp_path):
    rows = made_up(tmp_path)
    lines = shown.table(rows).rows
    assert len({line["section"] for line in lines}) == 3  # either set of prompts, and both
    for line in [line for line in lines if "gsm8k and writing" in line["section"]]:
        truth = 100 * TRUE[line["recipe"]]
        assert line["slope"].value == pytest.approx(truth, abs=4)
        assert line["slope"].high - line["slope"].low < 8
        if line["mode"] == "pages of 32":
            assert line["times"].value == pytest.approx(2)
            assert line["last"].value / line["first"].value == pytest.approx(
                (1 + TRUE[line["recipe"]] * 0.96) / (1 - TRUE[line["recipe"]] * 0.96), rel=0.1
            )


def test_findings_name_the_recipes_that_drift(tmp_path):
    ((heading, said),) = shown.findings(made_up(tmp_path)).items()
    assert "gsm8k and writing" in heading
    for line in said[:2]:
        rises, rest = line.split("falls for")
        falls, open_ = rest.split("no slope for")
        assert "rising" in rises and "falling" in falls and "steady" in open_
        assert "12 prompts" in line and "256 tokens" in line


@pytest.mark.slow
def test_a_text_that_becomes_certain_is_told_from_drift(tmp_path):
    rows = made_up(tmp_path, certain=-0.4)
    (line,) = [
        line for line in shown.table(rows).rows
        if (line["recipe"], line["mode"]) == ("steady", "exact") and " and " in line["section"]
    ]  # fmt: skip
    assert line["slope"].high < -10 and line["held"].low < 0 < line["held"].high


def test_one_prompt_has_no_slope(tmp_path):
    rows = made_up(tmp_path, n_prompts=2)
    lines = shown.table(rows[rows["document"] == "gsm8k"]).rows
    assert all(line["slope"].value is None and line["kl"].value > 0 for line in lines)
    assert shown.findings(rows[rows["document"] == "gsm8k"]) == {}
