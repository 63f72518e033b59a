"""Every family of decoders that transformers has, tiny and random: exact, or refused by name (docs/families.yaml)."""

from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf
from pairwise import slow
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import polykv
from polykv.attention.cascade import attend_in_place
from polykv.config import REPO
from polykv.errors import PolyKVError
from polykv.evaluation.capacity import Architecture
from polykv.geometry import Geometry
from polykv.greedy import greedy
from polykv.handoff.card import CacheCard
from polykv.handoff.replay import replay
from polykv.pool import SharedKVPool, prefill
from polykv.recurrent import STATES
from polykv.supported import check_model

FAMILIES = OmegaConf.to_container(OmegaConf.load(REPO / "docs" / "families.yaml"))
READABLE = FAMILIES["exact"] | FAMILIES["decoded"]
REFUSED = [name for names in FAMILIES["refused"].values() for name in names]
UNBUILT = {  # transformers builds no config of them without these
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "model_type": "gemma4_text"}
    }
}  # fmt: skip
TOLERANCE = 2e-6  # of the largest logit, fp32
N_PREFIX, N_TOKENS = 15, 24
SHORT, LONG = 2, 9  # tokens of the two agents' queries


def model_of(name):
    family = READABLE[name]
    config = AutoConfig.for_model(family.get("of", name), **family["config"])
    # The usual scale gives nearly flat logits, and norms of 1 and biases of 0 hide what is done with them.
    for part in (config, config.get_text_config(decoder=True)):
        part.initializer_range = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Family:
    """A family's model, a text's plain pass, and the cache of the text's first tokens."""

    def __init__(self, name):
        self.name, self.about, self.model = name, READABLE[name], model_of(name)
        self.in_place = name in FAMILIES["exact"]
        self.geometry = Geometry.of(self.model.config)
        self.windowed = any(self.geometry.windows)
        self.stateful = len(self.geometry.attending) < self.geometry.n_layers
        self.ids_BT = torch.randint(1, 96, (1, N_TOKENS))
        self.plain = self.logits(self.ids_BT)[:, N_PREFIX:]
        self.cache = prefill(self.model, self.ids_BT[:, :N_PREFIX])

    def logits(self, ids_BT):
        return self.model(input_ids=ids_BT, use_cache=False).logits

    def rest(self, cache, in_place=False):
        with attend_in_place(self.model) if in_place else nullcontext():
            rest_BT = self.ids_BT[:, N_PREFIX:]
            return self.model(input_ids=rest_BT, past_key_values=cache).logits

    def pool(self, recipe):
        return SharedKVPool.from_cache(self.cache, polykv.load_recipe(recipe), backend="torch")

    def card(self, tokenizer):
        ids_T = self.ids_BT[0, :N_PREFIX]
        card = CacheCard.seal(self.cache, ids_T, self.model, tokenizer, policy="full")
        return CacheCard.from_bytes(card.to_bytes(), self.model, tokenizer)

    def answers(self, cache, lengths=(SHORT, LONG)):
        """Two agents whose queries differ: (logits of each step, plain logits of the same tokens)."""
        prefix_T, rest_T = self.ids_BT[0, :N_PREFIX], self.ids_BT[0, N_PREFIX:]
        steps = []
        hook = self.model.register_forward_hook(lambda *args: steps.append(args[2].logits[:, -1]))
        queries = [rest_T[: lengths[0]], rest_T[-lengths[1] :]]
        answers = greedy(self.model, cache, queries, 3)
        hook.remove()
        for row, (query_T, answer_T) in enumerate(zip(queries, answers, strict=True)):
            for step, logits in enumerate(steps[: len(answer_T)]):
                said = torch.cat([prefix_T, query_T, answer_T[:step]])
                yield logits[row], self.logits(said[None])[0, -1]


def assert_same(logits, expected):
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()


MIXTURES = [name for name, about in READABLE.items() if "mixture" in about["what"]]


@pytest.mark.parametrize(
    "name", ["mixtral", "beam", *slow(*sorted({*MIXTURES} - {"mixtral", "beam"}))]
)
def test_capacity_counts_the_experts_that_a_token_uses(name):
    config = AutoConfig.for_model(READABLE[name].get("of", name), **READABLE[name]["config"])
    model = AutoModelForCausalLM.from_config(config)
    model(torch.tensor([[3]])).logits.square().sum().backward()
    routed = {part: p for part, p in model.named_parameters() if ".experts." in part}
    if not routed:  # of these few layers none has any
        with pytest.raises(PolyKVError, match="experts"):
            Architecture.of(config, "float32")
        return
    found = Architecture.of(config, "float32")
    assert found.n_parameters == model.num_parameters()
    # Only the experts that the token chose have a gradient.
    used = [p[p.grad.flatten(1).any(1)].numel() for p in routed.values()]
    assert found.n_used(1) - found.n_multiplied == sum(used) < found.n_used(2) - found.n_multiplied
    every = sum(p.numel() for p in routed.values())
    assert found.n_used(10_000) - found.n_multiplied == pytest.approx(every)


# Of each way to place positions, share heads and keep a cache one; the others in `make test-all`.
FEW = {
    "llama, odd head_dim",
    "biogpt",
    "cohere",
    "exaone_moe",
    "gemma",
    "glm",
    "gpt_bigcode",
    "gpt_neox",
    "hrm_text",
}
FEW |= {name for place, name in enumerate(FAMILIES["decoded"]) if place % 5 == 0}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in READABLE]
)
def test_a_family_reads_pools_and_cards_as_its_own_cache(name, tokenizer):
    family = Family(name)
    pool, turbo = family.pool("full"), family.pool("polykv")
    both = [pool]
    unequal = len({(one.n_kv_heads, one.head_dim) for one in family.geometry.attending}) > 1
    if unequal:
        with pytest.raises(PolyKVError, match="layers differ"):
            family.card(tokenizer)
    else:
        both.append(family.card(tokenizer))
    for one in both:
        assert_same(family.rest(one.dequantize()), family.plain)
        if family.in_place:
            assert_same(family.rest(one.reader(1), in_place=True), family.plain)
    if family.in_place:
        assert_same(family.rest(turbo.reader(1), in_place=True), family.rest(turbo.dequantize()))
    assert (family.rest(turbo.dequantize()) - family.plain).abs().max() > 1e-4  # the cache is read

    if family.windowed or family.stateful or family.about.get("padded") == "refused":
        with pytest.raises(PolyKVError, match=family.model.config.model_type):
            list(family.answers(pool.dequantize(2)))
    else:
        for logits, expected in family.answers(pool.dequantize(2)):
            assert_same(logits, expected)
    if family.in_place:
        lengths = (SHORT, SHORT if family.stateful else LONG)
        with attend_in_place(family.model):
            steps = list(family.answers(pool.reader(2), lengths))
        for logits, expected in steps:
            assert_same(logits, expected)
    else:
        refused = f"{family.model.config.model_type}.*{family.about['why']}"
        with pytest.raises(PolyKVError, match=refused), attend_in_place(family.model):
            pass
        with pytest.raises(PolyKVError, match=refused):
            replay(family.model, family.cache, family.ids_BT[0, :N_PREFIX], 0)

    if family.stateful:
        for logits, expected in family.answers(pool.dequantize(2), (SHORT, SHORT)):
            assert_same(logits, expected)
        with (
            attend_in_place(family.model),
            pytest.raises(PolyKVError, match=family.model.config.model_type),
        ):
            list(family.answers(pool.reader(2)))

    kept = tuple(
        (layer.keys.shape[1], layer.keys.shape[3])
        for layer in family.cache.layers
        if type(layer) not in STATES
    )
    assert tuple((one.n_kv_heads, one.head_dim) for one in family.geometry.attending) == kept
    assert pool.state_bytes == family.geometry.state_bytes(torch.float32)
    assert pool.state_bytes == sum(map(state_bytes, family.cache.layers))


def state_bytes(layer):
    """Bytes of a cache layer's states, as transformers names them."""
    states = [getattr(layer, f"{kind}_states", {}).values() for kind in ("conv", "recurrent")]
    return sum(x.nbytes for of_kind in states for x in of_kind if x is not None)


# Tiny models of families that are refused since several tokens after a cached state give other logits.
INEXACT = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"attention_window_size": 8},
}


@pytest.mark.parametrize("name", ["jamba", *slow("bamba", "recurrent_gemma")])
def test_what_is_refused_as_inexact_is_inexact_in_transformers(name):
    options = FAMILIES["shared"]["gqa"] | {"num_hidden_layers": 3} | INEXACT[name]
    config = AutoConfig.for_model(name, **options)
    with pytest.raises(PolyKVError, match=f"{name} has layers of linear attention.*exactly"):
        check_model(config)
    config.initializer_range = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids_BT = torch.randint(1, 96, (1, N_TOKENS))
    plain = model(ids_BT, use_cache=False).logits[:, N_PREFIX:]
    cache = DynamicCache(config=config)
    model(ids_BT[:, :N_PREFIX], past_key_values=cache)
    continued = model(ids_BT[:, N_PREFIX:], past_key_values=cache).logits
    assert (continued - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("name", [*REFUSED[::6], *slow(*sorted({*REFUSED} - {*REFUSED[::6]}))])
def test_a_family_is_refused_by_name(name):
    config = AutoConfig.for_model(name, **UNBUILT.get(name, {}))
    config = config.get_text_config(decoder=True) if name == "emu3" else config
    with pytest.raises(PolyKVError, match=name):
        check_model(config)


def test_the_list_holds_every_family_that_transformers_has():
    listed = {family.get("of", name) for name, family in READABLE.items()} | {*REFUSED}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - listed == set()
    assert len(READABLE) >= 40 and not {*READABLE} & {*REFUSED}
