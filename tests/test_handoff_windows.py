"""Cards of models with sliding windows: exact, to the byte, and refused where they do not fit."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from conftest import TEXT, checked_cell, rows_of
from pairwise import slow
from test_sliding import MIXED, N_NEW, W, generated, ids_of, logits, model_of

from polykv.attention.cascade import attend_in_place
from polykv.errors import PolyKVError
from polykv.greedy import greedy
from polykv.handoff import cardfile
from polykv.handoff.card import CacheCard
from polykv.handoff.cardfile import CardError
from polykv.handoff.policy import load_policy
from polykv.prefill import prefill

HEADS, DIM = 2, 8
WINDOWS = {"gemma3_text": (W, None, W), "mistral": (W, W, W)}  # of the layers
LENGTHS = (W - 1, W + 1, *slow(3, W, 2 * W, 40))


class Tokenizer:
    """What a card needs of a tokenizer: its fingerprint."""

    special_tokens_map: dict = {}

    def get_vocab(self):
        return {}


TOKENIZER = Tokenizer()


@pytest.fixture(scope="module", params=WINDOWS)
def model(request):
    return model_of(request.param)


def sealed(model, ids_T, policy="uniform", **options):
    cache = prefill(model, ids_T[None])
    return CacheCard.seal(cache, ids_T, model, TOKENIZER, policy, **options)


def reopened(card, model):
    return CacheCard.from_bytes(card.to_bytes(), model, TOKENIZER)


def n_kept(model, n_tokens):
    """Tokens that each layer keeps."""
    return [
        n_tokens if window is None else min(n_tokens, W - 1)
        for window in WINDOWS[model.config.model_type]
    ]


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_an_fp16_card_says_what_plain_generate_says(model, n_tokens):
    prefix_T, queries = ids_of(n_tokens), [ids_of(length, seed=length) for length in (1, 3)]
    card = reopened(sealed(model, prefix_T, "full"), model)
    expected = [generated(model, torch.cat([prefix_T, query_T])) for query_T in queries]
    found = [greedy(model, card.dequantize(), [one], N_NEW)[0].tolist() for one in queries]
    assert found == expected
    with attend_in_place(model):
        together = greedy(model, card.reader(2), queries, N_NEW)
    assert [one.tolist() for one in together] == expected


@pytest.mark.parametrize("policy", ["random", *slow("uniform", "sinks_recent")])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_both_readers_read_a_cards_windows_alike(policy, n_tokens, model):
    """Policies mix bits, so that tokens lie in a card in another order than in the text."""
    policy = replace(load_policy("uniform"), importance=() if policy == "uniform" else (policy,))
    ids_T = ids_of(n_tokens + W)
    card = sealed(model, ids_T[:n_tokens], policy, budget_bits=4.5)
    again, rest_T = reopened(card, model), ids_T[n_tokens:]
    for one, other in zip(card.decode(), again.decode(), strict=True):
        assert all(map(torch.equal, one, other))
    assert [k_BHTD.shape[2] for k_BHTD, _ in again.decode()] == n_kept(model, n_tokens)
    assert again.nominal_bits <= 4.5 or n_tokens <= 4
    dequantized = logits(model, again.dequantize(), rest_T)
    with attend_in_place(model):
        in_place = logits(model, again.reader(1), rest_T)
    torch.testing.assert_close(in_place, dequantized, rtol=0, atol=2e-5)
    if n_tokens > 4:
        assert (
            dequantized - logits(model, prefill(model, ids_T[None, :n_tokens]), rest_T)
        ).abs().max() > 1e-4


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_stored_bytes_by_hand(model, n_tokens):
    """Uniform 4 bits: 4 exact tokens, the others with 4-bit codes and one scale of a vector; maps and channels."""
    card = sealed(model, ids_of(n_tokens))
    expected, windows = 4 * n_tokens, WINDOWS[model.config.model_type]  # ids
    for window in set(windows):
        kept = n_kept(model, n_tokens)[windows.index(window)]
        n_heads = HEADS * windows.count(window)
        exact = min(max(4 - (n_tokens - kept), 0), kept)
        values = 2 * DIM * exact + (DIM // 2 + 2) * (kept - exact)
        expected += 2 * (n_heads * values + ceil(3 * kept / 8))
        expected += 2 * 2 * n_heads * DIM if kept > exact else 0  # mean and spread of keys
    assert card.nbytes == expected
    assert card.mean_bits == 8 * card.nbytes / (2 * HEADS * DIM * sum(n_kept(model, n_tokens)))


@pytest.mark.parametrize("n_first", [5, W, *slow(W + 5)])
@pytest.mark.parametrize("n_more", [2, *slow(W, 2 * W)])
@pytest.mark.parametrize("policy", ["full", "uniform"])
def test_append_drops_what_has_left_the_windows(policy, n_first, n_more, model):
    ids_T = ids_of(n_first + n_more)
    card = sealed(model, ids_T[:n_first], policy)
    cache = prefill(model, ids_T[None])
    longer = reopened(card.append(cache, ids_T, model, TOKENIZER, policy), model)
    assert longer.metadata.n_left == max(n_first + n_more - (W - 1), 0)
    assert card.metadata.n_left == max(n_first - (W - 1), 0)
    assert longer.metadata.hop == 2 and longer.metadata.parent == card.digest
    before = card.decode()
    for index, (keys, values) in enumerate(longer.decode()):
        kept = n_kept(model, n_first + n_more)[index]
        assert keys.shape[2] == values.shape[2] == kept
        # What was packed before, and is still there, has not changed.
        shared = n_first - (n_first + n_more - kept)
        for old, new in zip(before[index], (keys, values), strict=True):
            assert shared <= 0 or torch.equal(old[:, :, -shared:], new[:, :, :shared])
    if policy == "full":
        query_T = ids_of(3, seed=5)
        expected = generated(model, torch.cat([ids_T, query_T]))
        assert greedy(model, longer.dequantize(), [query_T], N_NEW)[0].tolist() == expected


def test_a_receiver_with_another_window_refuses():
    sender, receiver = (model_of("gemma3_text", sliding_window=window) for window in (W, 6))
    whole = model_of("gemma3_text", layer_types=["full_attention"] * 3)
    content = sealed(sender, ids_of(20)).to_bytes()
    for other, window in ((receiver, 6), (whole, None)):
        with pytest.raises(
            CardError, match=f"layer 0 of the card .*window of {W} .*one of {window}"
        ):
            CacheCard.from_bytes(content, other, TOKENIZER)
    with pytest.raises(CardError, match="layer 0 of the card .*window of None .*one of 8"):
        CacheCard.from_bytes(sealed(whole, ids_of(20)).to_bytes(), sender, TOKENIZER)


@pytest.mark.parametrize(
    "change",
    [
        {"n_left": 0},
        {"n_left": 12},
        {"windows": None},
        {"windows": [W, None]},
        {"windows": [W, None, True]},
        {"windows": "8"},
        {"payload": "waterfill"},
        {"n_tokens": 21},
    ],
)
def test_forged_windows_are_refused(change):
    model = model_of("gemma3_text")
    assert model.config.layer_types == MIXED["layer_types"]
    fields, tensors, _ = cardfile.loads(sealed(model, ids_of(20)).to_bytes())
    with pytest.raises(CardError):
        CacheCard.from_bytes(cardfile.dumps(fields | change, tensors), model, TOKENIZER)
    for name in ("window.key.map", "full.value.16.values"):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(CardError, match="missing"):
            CacheCard.from_bytes(cardfile.dumps(fields, left), model, TOKENIZER)


@pytest.mark.parametrize("policy", ["waterfill", "topology", "attention_window", "value_norm"])
def test_what_windows_do_not_have_is_refused_by_name(policy):
    model = model_of("gemma3_text")
    try:
        policy = load_policy(policy)
    except PolyKVError:
        policy = replace(load_policy("uniform"), name=policy, importance=(policy,))
    with pytest.raises(
        PolyKVError, match=f"{policy.name}.*gemma3_text has sliding windows.*uniform"
    ):
        sealed(model, ids_of(20), policy)


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("gemma")
    gemma = model_of("gemma3_text", vocab_size=300, max_position_embeddings=4096)
    gemma.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT * 4)
    return folder


@pytest.mark.parametrize(
    ("study", "message"),
    [
        pytest.param(
            "agent_scaling reader=dequantize",
            "reader=dequantize pads .*gemma3_text.*use reader=in_place",
            marks=pytest.mark.slow,
        ),
        ("protocols protocol=online", "protocol=online takes models .*sliding windows"),
        pytest.param(
            "handoff_accuracy policy=uniform",
            "study handoff_accuracy takes models .*sliding windows",
            marks=pytest.mark.slow,
        ),
        ("handoff_ttft policies=[topology]", "policy 'topology' has signal .*use policy uniform"),
        (
            "handoff_ttft policies=[waterfill]",
            "policy 'waterfill' has store codecs.*use policy uniform",
        ),
    ],
)
def test_studies_refuse_windows_before_any_work(study, message, gemma_folder):
    name, *more = study.split()
    about = ("model=local", f"model.path={gemma_folder}", "device=cpu", "backend=torch")
    if not name.startswith("handoff_accuracy"):
        about = (*about, "document=file", f"document.path={gemma_folder}/text.txt", "context=64")
    with pytest.raises(PolyKVError, match=message):
        checked_cell(f"experiment={name}", *about, *more)


@pytest.mark.slow
def test_cards_of_windows_are_timed_and_scored(gemma_folder):
    rows = rows_of(
        "experiment=handoff_ttft", "model=local", f"model.path={gemma_folder}", "device=cpu",
        "document=file", f"document.path={gemma_folder}/text.txt", "context=64", "policies=[full,uniform]",
        "turn_tokens=4", "scored_tokens=16", "n_documents=2", "repeats=10", "transports=[file]",
    )  # fmt: skip
    kl = {
        (row["policy"], row["reader"]): row["value"]
        for row in rows
        if row["metric"] == "kl" and row.get("sample") == 0 and row.get("block") is None
    }
    assert kl["full", "dequantize"] == 0 and abs(kl["full", "in_place"]) < 1e-6
    assert kl["uniform", "dequantize"] == pytest.approx(kl["uniform", "in_place"], rel=1e-3)
    assert kl["uniform", "dequantize"] > 1e-6
