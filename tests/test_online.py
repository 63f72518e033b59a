"""Protocol online: what is written is quantized, what is read is what was written, and its cells are others."""

import pytest
import torch
from conftest import checked_cell, rows_of, tiny_model
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from polykv.codecs.q8_0 import Q8_0
from polykv.documents import Document
from polykv.errors import PolyKVError
from polykv.evaluation import online
from polykv.prefill import prefill
from polykv.recipe import EXACT, load_recipe

N_TOKENS, N_PREFIX = 150, 100
FP16 = 0.05  # what a cache in fp16 moves a log-probability of this model


@pytest.fixture(scope="module")
def document():
    ids_BT = torch.randint(1, 300, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    return Document("random", ids_BT, N_PREFIX, ())


def forward(model, document):
    """Log-probabilities of one plain forward of transformers."""
    with torch.no_grad():
        logits = model(document.ids_BT).logits
    return logits[0, N_PREFIX:-1].float().log_softmax(-1)


@pytest.mark.parametrize(
    ("architecture", "chunk"),
    [("llama", chunk) for chunk in (17, 64, N_PREFIX, N_TOKENS, 4 * N_TOKENS)]
    + [("gpt2", 64), ("gpt_neox", 64)],
)
def test_an_uncompressed_cache_is_a_plain_forward_in_any_chunks(architecture, chunk, document):
    model = tiny_model(architecture)
    scored, pool = online.score(model, document, load_recipe("full"), chunk)
    assert torch.allclose(scored, forward(model, document), atol=1e-4, rtol=0)
    assert pool.n_tokens == N_TOKENS and pool.stored_ratio == 0.5  # fp32


def by_hand(model, ids_BT, chunk, coded):
    """Log-probabilities at every token from a loop of its own: `coded(layer, x)` is what attention reads of a write."""
    layers = model.model.layers
    kept = [([], []) for _ in layers]
    found = []
    for start in range(0, ids_BT.shape[1], chunk):
        part = ids_BT[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1])[None]
        x = model.model.embed_tokens(part)
        cos, sin = model.model.rotary_emb(x, positions)
        for layer, (keys, values) in zip(layers, kept, strict=True):
            own, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(y).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
            keys.append(coded(k))
            values.append(coded(v))
            k, v = (torch.cat(all_, 2).repeat_interleave(2, 1) for all_ in (keys, values))
            scores = q @ k.mT * own.head_dim**-0.5
            later = torch.arange(k.shape[2])[None] > positions[0][:, None]
            read = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
            x = x + own.o_proj(read.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        found.append(model.lm_head(model.model.norm(x))[0].log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("chunk", [16, 64, N_TOKENS])
@torch.no_grad()
def test_q8_0_equals_a_loop_that_quantizes_what_it_writes(llama, document, chunk):
    codec = Q8_0()

    def coded(x):
        return codec.decode(codec.encode(x))

    expected = by_hand(llama, document.ids_BT, chunk, coded)[N_PREFIX:-1]
    scored, _ = online.score(llama, document, load_recipe("q8_0"), chunk)
    assert torch.allclose(scored, expected, atol=1e-4, rtol=0)
    # The exact prefix and exact own tokens of protocol paper give other numbers.
    assert not torch.allclose(scored, forward(llama, document), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["polykv", "waterfill_4", "turboquant_4bit"])
def test_later_chunks_keep_the_statistics_and_codes_of_the_first(llama, document, name):
    chunk, recipe = 64, load_recipe(name)
    first = Document("first", document.ids_BT[:, :chunk], chunk - 1, ())
    _, alone = online.score(llama, first, recipe, chunk)
    _, whole = online.score(llama, document, recipe, chunk)
    for layer in range(whole.n_layers):
        for one, other in zip(alone.decode_layer(layer), whole.decode_layer(layer), strict=True):
            assert torch.allclose(one, other[:, :, :chunk], atol=1e-5)
    # One set of statistics, however many chunks: as many bytes as in a pool that is compressed at once.
    cache = prefill(llama, document.ids_BT)
    pool = online.SharedKVPool.from_cache(cache, recipe, backend="torch")
    assert whole.stored_bytes == pool.stored_bytes


def test_recent_tokens_are_exact_until_they_leave_the_window(llama, document):
    """KIVI: groups of 32 tokens, the last 128 exact; a document no longer than that is not quantized at all."""
    recipe = load_recipe("kivi_2bit")
    short = Document("short", document.ids_BT[:, :128], N_PREFIX, ())
    scored, _ = online.score(llama, short, recipe, 32)
    assert torch.allclose(scored, forward(llama, short), atol=FP16, rtol=0)
    _, pool = online.score(llama, document, recipe, 50)
    cache = DynamicCache()
    llama(document.ids_BT, past_key_values=cache)
    exact = EXACT.decode(EXACT.encode(cache.layers[0].keys))
    gap = (pool.decode_layer(0)[0] - exact).abs().amax((0, 1, 3))
    left = N_TOKENS - 128
    assert gap[:left].min() > 1e-2 and gap[left:].max() < 4e-3  # rounding next to a step of fp16


def test_sinks_and_exempt_layers_stay_exact(llama, document):
    recipe = load_recipe("polykv_sinks4_token")
    short = Document("short", document.ids_BT[:, :20], 12, ())
    exact = EXACT.decode(EXACT.encode(prefill(llama, short.ids_BT).layers[0].keys))
    for chunk in (1, 3, 20):  # sinks written in one chunk or in several
        _, pool = online.score(llama, short, recipe, chunk)
        gap = (pool.decode_layer(0)[0] - exact).abs().amax((0, 1, 3))
        assert gap[:4].max() < 4e-3 < gap[4:].min()
    # vLLM's preset exempts every layer of a model of four.
    scored, _ = online.score(llama, document, load_recipe("vllm_4bit_nc"), 64)
    assert torch.allclose(scored, forward(llama, document), atol=FP16, rtol=0)


def test_what_cannot_be_encoded_names_layer_side_and_token(document):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.fill_(torch.nan)
    with pytest.raises(PolyKVError, match="layer 2: values: .*token 0"):
        online.score(model, document, load_recipe("q8_0"), 64)


def local(checkpoint, *overrides):
    return ["experiment=recipe_frontier", "model=local", f"model.path={checkpoint}", "document=file",
            f"document.path={checkpoint}/text.txt", "context=60", "n_documents=2", "device=cpu",
            *overrides]  # fmt: skip


ONLINE = ("protocol=online", "chunk=16")


def test_rows_name_the_protocol_and_differ(checkpoint):
    def kl(*overrides):
        rows = list(rows_of(*local(checkpoint, *overrides)))
        assert {row["protocol"] for row in rows} == {
            "online" if ONLINE[0] in overrides else "paper"
        }
        rows = [r for r in rows if r["metric"] == "kl" and r.get("sample") is not None]
        return [r["value"] for r in rows if r.get("block") is None]

    assert kl("recipe=full", *ONLINE) == [0, 0]
    one, other = kl("recipe=q4_0", *ONLINE), kl("recipe=q4_0")
    assert len(one) == len(other) == 2 and all(a != b for a, b in zip(one, other, strict=True))


def test_the_paper_s_cells_keep_their_identity_and_the_chunk_is_part_of_the_other(checkpoint):
    def cell(*overrides):
        study, settled = checked_cell(*local(checkpoint, "recipe=q4_0", *overrides))
        return study.identity(settled), settled

    paper, settled = cell()
    assert not {"protocol", "chunk"} & set(settled) and "evaluation.online" not in settled.versions
    assert cell("protocol=paper", "chunk=16")[0] == paper
    (one, chunked), (other, _) = cell(*ONLINE), cell("protocol=online", "chunk=32")
    assert len({paper, one, other}) == 3 and "evaluation.online" in chunked.versions


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["protocol=onlin"], "no protocol named 'onlin'"),
        (["protocol=online", "chunk=0"], "chunk=0"),
        (["protocol=online", "reader=in_place"], "reader=in_place"),
        (["protocol=online", "backend=cpu"], "backend=cpu"),
        (["protocol=online", "answers=1"], "use answers=0"),
        (["protocol=online", "resident=true"], "use resident=false"),
    ],
)
def test_what_a_cache_that_grows_cannot_do_is_refused(checkpoint, overrides, said):
    with pytest.raises(PolyKVError) as refused:
        checked_cell(*local(checkpoint, "recipe=q4_0", *overrides))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_outside_references_are_refused(checkpoint):
    overrides = ["experiment=outside_references", *local(checkpoint, "outside=fp8")[1:]]
    with pytest.raises(PolyKVError, match="use protocol=paper"):
        checked_cell(*overrides, "+protocol=online", "+chunk=16")


def test_a_preset_without_a_chunk_asks_for_one(checkpoint):
    overrides = ["experiment=agent_scaling", *local(checkpoint, "recipe=q4_0")[1:]]
    with pytest.raises(PolyKVError, match="chunk=None"):
        checked_cell(*overrides, "+protocol=online")
