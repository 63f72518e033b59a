"""Linear layers by oneDNN: as PyTorch's own to rounding (to the bit in bfloat16), and only where they belong."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_model
from torch import nn

from polykv import linear
from polykv.handoff import fingerprint
from polykv.linear import OneDnnLinear, PackedLinear, with_onednn

CLASSES = {torch.float32: OneDnnLinear, torch.bfloat16: PackedLinear}
HAS_BFLOAT16 = linear._gains()[1]
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 in this processor"),
    ),
]


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """As on AMD's processors; bfloat16 only if this one has it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(linear, "_gains", lambda: (True, HAS_BFLOAT16))


def both(n_in, n_out, bias, dtype=torch.float32):
    plain = nn.Linear(n_in, n_out, bias, dtype=dtype)
    own = nn.Sequential(nn.Linear(n_in, n_out, bias, dtype=dtype))
    own[0].load_state_dict(plain.state_dict())
    with_onednn(own)
    assert type(own[0]) is CLASSES[dtype]
    return plain, own[0]


def packed(plain):
    holder = nn.Sequential(copy.deepcopy(plain).requires_grad_(False))
    with_onednn(holder)
    assert type(holder[0]) is PackedLinear
    return holder[0]


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 17, 48), (190, 48), (48,), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_products_are_pytorchs_to_rounding(shape, bias, dtype):
    plain, own = both(48, 80, bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    assert own(x).shape == plain(x).shape
    if dtype == torch.bfloat16:  # PyTorch has another way for a single row
        assert torch.equal(own(x), plain(x.view(-1, 48)).view(own(x).shape))
        return
    torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)
    exact = nn.functional.linear(
        x.double(), plain.weight.double(), plain.bias.double() if bias else None
    )
    torch.testing.assert_close(own(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_rows_may_be_views(dtype):
    plain, own = both(48, 80, True, dtype)
    x = torch.randn(4, 9, 96, dtype=dtype)
    for view in (x[..., ::2], x[:, -1:, :48], x[..., :48].transpose(0, 1)):
        torch.testing.assert_close(own(view), plain(view.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 in this processor")
def test_a_packed_weight_is_kept_once_and_comes_back():
    plain, own = both(48, 80, True, torch.bfloat16)
    assert own.weight.is_mkldnn and own.weight.numel() == plain.weight.numel()
    assert torch.equal(own.weight.to_dense(), plain.weight)
    assert all(map(torch.equal, own.state_dict().values(), plain.state_dict().values()))
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    asked = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    grads = [
        torch.autograd.grad(layer(one).square().sum(), one)[0]
        for layer, one in zip((plain, own), asked, strict=True)
    ]
    assert torch.equal(*grads)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(packed(plain)))):
        assert type(other) is nn.Linear and torch.equal(other.weight, plain.weight)
    given = packed(plain)
    given.load_state_dict({name: 2 * tensor for name, tensor in plain.state_dict().items()})
    assert torch.equal(given.weight, 2 * plain.weight)
    moved = packed(plain).to(torch.float32)
    assert type(moved) is nn.Linear and torch.equal(moved.weight, plain.weight.float())


@pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 in this processor")
def test_a_shared_table_stays_and_a_fingerprint_is_of_the_weights():
    plain, own = (tiny_model("llama", tie_word_embeddings=True).bfloat16() for _ in range(2))
    own.load_state_dict(plain.state_dict())
    with_onednn(own)
    assert type(own.lm_head) is nn.Linear
    assert own.lm_head.weight is own.get_input_embeddings().weight
    assert own.num_parameters() == plain.num_parameters()
    assert fingerprint.of_model(own) == fingerprint.of_model(plain)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(own(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_alone_can_be_trained(dtype):
    _, own = both(48, 80, True, dtype)
    own.requires_grad_(False).bias.requires_grad_()
    own(torch.randn(5, 48, dtype=dtype)).sum().backward()
    assert torch.equal(own.bias.grad, torch.full_like(own.bias, 5))


def test_gradients_are_recorded():
    plain, own = both(48, 80, True)
    x = torch.randn(5, 48, requires_grad=True)
    one, other = (
        torch.autograd.grad(layer(x).square().sum(), [x, layer.weight]) for layer in (plain, own)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_a_subclass_is_left_alone_and_a_model_generates_the_same():
    class Other(nn.Linear):
        pass

    holder = nn.Sequential(Other(4, 4))
    with_onednn(holder)
    assert type(holder[0]) is Other
    plain, own = tiny_model("llama"), tiny_model("llama")
    own.load_state_dict(plain.state_dict())
    with_onednn(own)
    n_linear = sum(isinstance(module, nn.Linear) for module in plain.modules())
    assert n_linear == sum(type(module) is OneDnnLinear for module in own.modules()) > 4
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    texts = [
        model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (plain, own)
    ]
    assert torch.equal(*texts)
