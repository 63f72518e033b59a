"""Finished parts of cells: read again, refused where damaged or foreign, and a stopped relay that goes on from them."""

import time
from itertools import compress

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from experiments import relays, sweep
from experiments.session import Session
from polykv import cellfile
from polykv.config import CONF
from polykv.parts import SECONDS, Parts
from polykv.results import Store, StoreError

VALUES = {"kl": np.float32([0.1, np.nan]), "ids": np.arange(3), "same": np.array([True, False])}


def never():
    raise AssertionError("made again")


def made_now(found):
    return all(found[name] is values for name, values in VALUES.items())


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_saved_part_is_read_as_it_was_made(tmp_path):
    parts = Parts(tmp_path, "a", {"cell": "a"})
    made = parts.kept("one", lambda: VALUES)
    found = Parts(tmp_path, "a", {"cell": "a"}).kept("one", never)
    assert found.keys() == made.keys() == {*VALUES, SECONDS}
    for name, values in made.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    parts.remove()
    assert not files(tmp_path)


def test_a_part_knows_how_long_it_took_to_make(tmp_path):
    def slowly():
        time.sleep(0.05)
        return VALUES

    made = Parts(tmp_path, "a").kept("one", slowly)
    assert 0.05 <= made[SECONDS] == Parts(tmp_path, "a").kept("one", never)[SECONDS]


def test_without_a_folder_nothing_is_saved():
    assert made_now(Parts().kept("one", lambda: VALUES))
    assert made_now(Parts().shared("b", {"x": 1}).kept("one", lambda: VALUES))


def test_a_part_that_differs_in_any_byte_or_is_cut_is_made_again(tmp_path, capsys):
    parts = Parts(tmp_path, "a")
    parts.kept("one", lambda: VALUES)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    damaged = [
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (0, 40, -9)
    ]
    for content in (b"", whole[:10], whole[:-1], *damaged):
        path.write_bytes(content)
        assert made_now(parts.kept("one", lambda: VALUES))
        assert f"{path} is damaged" in capsys.readouterr().err
        parts.kept("one", never)


def test_a_part_of_other_settings_or_of_another_machine_is_made_again(
    tmp_path, capsys, monkeypatch
):
    Parts(tmp_path, "a", {"cell": "a"}).kept("one", lambda: VALUES)
    other = Parts(tmp_path, "a", {"cell": "b"})
    assert made_now(other.kept("one", lambda: VALUES))
    assert "made with another cell;" in capsys.readouterr().err
    monkeypatch.setattr("polykv.parts.provenance", lambda: {"commit": "x", "created_at": "now"})
    assert made_now(other.kept("one", lambda: VALUES))
    assert "made with another commit, machine, python, versions;" in capsys.readouterr().err
    monkeypatch.setattr("polykv.parts.provenance", lambda: {"commit": "x", "created_at": "later"})
    other.kept("one", never)


def test_shared_parts_have_a_folder_for_each_need(tmp_path):
    cells = [Parts(tmp_path, name, {"cell": name}) for name in ("a", "b")]
    cells[0].shared("fp16", {"seed": 0}).kept("one", lambda: VALUES)
    cells[0].remove()
    cells[1].shared("fp16", {"seed": 0}).kept("one", never)
    with pytest.raises(AssertionError, match="made again"):
        cells[1].shared("fp16", {"seed": 1}).kept("one", never)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "parts").write_text("")
    with pytest.raises(StoreError, match=r"cannot (read|write).*parts"):
        Parts(tmp_path, "a").kept("one", lambda: VALUES)


def cell_in(folder, policy):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [
            "experiment=handoff_accuracy", "n_problems=3", "batch=2", "n_hops=1", "relay.n_facts=8", "device=cpu",
            "relay.max_new_tokens=4", "budget_bits=4", f"policy={policy}", f"results_dir={folder}",
        ])  # fmt: skip
    return sweep.prepare(cfg)


def untimed(columns):
    keep = [unit != "min" for unit in columns["unit"]]
    return {name: list(compress(values, keep)) for name, values in columns.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", ["play", "force"])
def test_a_relay_that_was_stopped_goes_on_and_has_the_same_rows(stopped_at, tmp_path, monkeypatch):
    whole, resumed = (cell_in(tmp_path / name, "uniform") for name in ("whole", "resumed"))
    assert sweep.run_cell(whole).status == "done"
    calls = {"play": 0, "force": 0}
    last = 4  # play: the second batch of the policy; force: the replay of the second problem

    def counted(name, limit):
        own = getattr(relays, name)

        def call(*given, **named):
            calls[name] += 1
            if calls[name] == limit:
                raise RuntimeError("stopped")
            return own(*given, **named)

        return call

    def run(limit):
        calls.update(play=0, force=0)
        with monkeypatch.context() as patch:
            patch.setattr("experiments.session.of_process", Session)  # nothing from the run before
            for name in calls:
                patch.setattr(relays, name, counted(name, limit if name == stopped_at else None))
            return sweep.run_cell(resumed)

    assert "stopped" in run(last).reason
    assert files(tmp_path / "resumed" / "parts")
    assert run(None).status == "done"
    assert calls == {"play": {"play": 1, "force": 6}, "force": {"play": 0, "force": 4}}[stopped_at]
    one, other = (
        cellfile.read(Store(tmp_path / name).path("handoff_accuracy", whole.identity))
        for name in ("whole", "resumed")
    )
    assert untimed(one.rows) == untimed(other.rows) and one.answers == other.answers
    minutes = [
        x for x, unit in zip(other.rows["value"], other.rows["unit"], strict=True) if unit == "min"
    ]
    assert len(minutes) == 2 and min(minutes) > 0
    (left,) = (tmp_path / "resumed" / "parts").iterdir()
    assert left.name.startswith("fp16_relays")
