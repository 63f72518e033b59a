"""Linear layers by oneDNN: as PyTorch's own to rounding, with gradients PyTorch's own, and only where they belong."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from polykv import linear
from polykv.linear import OneDnnLinear, with_onednn


@pytest.fixture(autouse=True)
def on_amd(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(linear, "_gains", lambda: True)


def both(n_in, n_out, bias, dtype=torch.float32):
    plain = nn.Linear(n_in, n_out, bias, dtype=dtype)
    own = nn.Sequential(nn.Linear(n_in, n_out, bias, dtype=dtype))
    own[0].load_state_dict(plain.state_dict())
    with_onednn(own)
    assert type(own[0]) is OneDnnLinear
    return plain, own[0]


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 17, 48), (190, 48), (48,), (0, 48), (2, 0, 48)])
@torch.no_grad()
def test_products_are_pytorchs_to_rounding(shape, bias):
    plain, own = both(48, 80, bias)
    x = torch.randn(shape)
    assert own(x).shape == plain(x).shape
    torch.testing.assert_close(own(x), plain(x), rtol=1e-5, atol=1e-5)
    exact = nn.functional.linear(
        x.double(), plain.weight.double(), plain.bias.double() if bias else None
    )
    torch.testing.assert_close(own(x).double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_may_be_views_or_have_another_dtype():
    plain, own = both(48, 80, True)
    x = torch.randn(4, 9, 96)
    for view in (x[..., ::2], x[:, -1:, :48], x[..., :48].transpose(0, 1)):
        torch.testing.assert_close(own(view), plain(view), rtol=1e-5, atol=1e-5)
    plain, own = both(48, 80, True, torch.bfloat16)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert torch.equal(own(x), plain(x))


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
