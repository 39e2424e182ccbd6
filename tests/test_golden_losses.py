"""The first steps of small models are what they were. A change here is a change of what a model computes."""

from __future__ import annotations

import json

import pytest

from golden import FOLDER, MODELS, losses_of


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_what_they_were(name: str) -> None:
    known = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert known["model"] == MODELS[name].model_dump(mode="json")
    # Other CPUs add in another order.
    assert losses_of(name) == pytest.approx(known["losses"], rel=1e-4)
    assert known["losses"][-1] < 0.85 * known["losses"][0]
