"""What codecs and measurements make of fixed input is what outputs.json says, or their version was raised."""

import json

import outputs
import pytest
import torch

KEPT = json.loads(outputs.PLACE.read_text())
NAMES = outputs.names()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_output_changes_with_its_version_alone(name):
    version, place, make = NAMES[name]
    if name not in KEPT:
        pytest.skip(f"{name} is new: python tests/outputs.py records its output")
    if said := outputs.complaint(version, place, make(), KEPT[name]):
        pytest.fail(f"{name}: {said}")


@pytest.mark.parametrize("cls", outputs.codec_classes(), ids=lambda cls: cls.__name__)
def test_every_codec_declares_a_version_of_its_own(cls):
    assert "version" in vars(cls)


def test_a_codec_that_rounds_otherwise_is_told_to_raise_its_version(monkeypatch):
    name = json.dumps({"_target_": "polykv.codecs.uniform.Uniform"})
    version, place, make = NAMES[name]
    assert outputs.complaint(version, place, make(), KEPT[name]) is None
    monkeypatch.setattr(torch.Tensor, "round_", torch.Tensor.floor_)
    said = outputs.complaint(version, place, make(), KEPT[name])
    assert "polykv.codecs.uniform.Uniform.version" in said and f" {version + 1}" in said


def test_decoding_counts_and_rounding_of_another_machine_does_not():
    kept = outputs.output([torch.tensor([1.0, 2.0]), torch.tensor([3, 4])])
    assert outputs.same(kept, outputs.output([torch.tensor([1.0, 2.00001]), torch.tensor([3, 4])]))
    for other in ([1.0, 2.01], [2.0, 1.0]):
        assert not outputs.same(kept, outputs.output([torch.tensor(other), torch.tensor([3, 4])]))
    assert not outputs.same(kept, outputs.output([torch.tensor([1.0, 2.0]), torch.tensor([3, 5])]))
