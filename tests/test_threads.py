"""Threads that read one model by different read modes; a pool is made of one layer at a time."""

import threading
import weakref
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import TEXT, tiny_model

import polykv
from polykv.attention.cascade import NAME, attend_in_place, read_unshared
from polykv.errors import PolyKVError
from polykv.evaluation.continuation import score_rest
from polykv.pool import SharedKVPool, prefill


@contextmanager
def in_another_thread(context):
    """`context` is entered there, and left when this one is."""
    entered, leave, failed = threading.Event(), threading.Event(), []

    def hold():
        try:
            with context:
                entered.set()
                leave.wait(10)
        except PolyKVError as error:
            failed.append(error)
            entered.set()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    try:
        yield failed
    finally:
        leave.set()
        thread.join(10)


@pytest.mark.parametrize("ending", [False, True], ids=["begins", "ends"])
def test_a_switch_in_the_middle_of_a_pass_changes_nothing_for_sdpa(ending):
    """Another thread's reading in place begins, or ends, between two layers of this thread's pass."""
    model, other = tiny_model("llama"), ExitStack()
    ids = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = score_rest(model, prefill(model, ids[:, :40]), ids[:, 40:])
    cache, switched = prefill(model, ids[:, :40]), []

    def begin():
        other.enter_context(in_another_thread(attend_in_place(model)))

    def switch(*_):
        before = model.config._attn_implementation
        other.close() if ending else begin()
        switched.append((before, model.config._attn_implementation))

    if ending:
        begin()
    hook = model.model.layers[1].register_forward_pre_hook(switch)
    with other, read_unshared(model):
        got = score_rest(model, cache, ids[:, 40:])
    hook.remove()
    assert switched == [(NAME, "sdpa") if ending else ("sdpa", NAME)]
    assert torch.equal(got, expected)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_of_another_attention_is_read_one_way_at_a_time(tokenizer):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    pool = SharedKVPool.from_text(model, tokenizer, TEXT[:100], polykv.load_recipe("polykv"))
    expected = {
        reader: pool.ask(model, tokenizer, ["A"], 4, reader)
        for reader in ("dequantize", "in_place")
    }
    busy = "attends with eager, .*; .*attn_implementation=sdpa"
    with in_another_thread(attend_in_place(model)):
        assert model.config._attn_implementation == NAME
        with pytest.raises(PolyKVError, match=busy):
            pool.ask(model, tokenizer, ["A"], 4, "dequantize")
        assert pool.ask(model, tokenizer, ["A"], 4, "in_place") == expected["in_place"]
        with attend_in_place(model):  # what this thread holds itself, nobody takes away
            assert pool.ask(model, tokenizer, ["A"], 4, "dequantize") == expected["dequantize"]
    assert model.config._attn_implementation == "eager"
    with read_unshared(model):
        with in_another_thread(attend_in_place(model)) as failed:
            assert len(failed) == 1 and "attends with eager" in str(failed[0])
        with pytest.raises(PolyKVError, match=busy):
            pool.ask(model, tokenizer, ["A"], 4, "in_place")
    assert pool.ask(model, tokenizer, ["A"], 4, "in_place") == expected["in_place"]
    assert model.config._attn_implementation == "eager"


def test_threads_that_enter_and_leave_restore_the_model_once():
    model, gate = tiny_model("llama"), threading.Barrier(16)
    seen = []

    def come_and_go():
        gate.wait()
        for _ in range(50):
            with attend_in_place(model):
                seen.append(model.config._attn_implementation)

    threads = [threading.Thread(target=come_and_go) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [NAME] * (16 * 50)
    assert model.config._attn_implementation == "sdpa"


def test_only_one_layer_is_there_at_full_size():
    alive, most = 0, 0

    class Counted(torch.Tensor):
        pass

    def made():
        nonlocal alive, most
        layer = tuple(torch.randn(1, 2, 50, 64).as_subclass(Counted) for _ in "kv")
        alive += 1
        most = max(most, alive)

        def gone():
            nonlocal alive
            alive -= 1

        weakref.finalize(layer[0], gone)
        return layer

    SharedKVPool.from_layers((made() for _ in range(5)), polykv.load_recipe("int8_token"), 5)
    assert most == 1
