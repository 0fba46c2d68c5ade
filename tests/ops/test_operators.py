"""Test what the factory of operators derives from the description of a family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from roads import dense_inputs, packed_inputs, padded, varlen

import flashcore
from flashcore.backends import gradients, packed
from flashcore.ops import dense
from flashcore.ops import padded as padded_ops
from flashcore.ops import varlen as varlen_ops
from flashcore.problem.options import Options

FAMILIES = {"dense": dense, "padded": padded_ops, "packed": varlen_ops}
ROADS = {
    "dense": (flashcore.attention, dense_inputs),
    "padded": (padded, dense_inputs),
    "packed": (varlen, packed_inputs),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_schema_has_all_options_and_the_backend(name: str, direction: str) -> None:
    operators = FAMILIES[name].OPERATORS
    names = [x.name for x in getattr(operators, direction)._schema.arguments]
    first = names.index(Options._fields[0])
    assert tuple(names[first : first + len(Options._fields)]) == Options._fields
    assert names[-1] == "backend"
    assert [x for x in names if x in operators.family.inputs] == list(operators.family.inputs)


@pytest.mark.parametrize("name", ROADS)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_backend_reaches_the_choice_of_gradient_code(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    choose = gradients.choose_backward

    def spy(*arguments: Any, backend: str = "not given", **options: Any) -> Any:
        seen.add(backend)
        return choose(*arguments, backend=backend, **options)

    for module in (gradients, packed):
        monkeypatch.setattr(module, "choose_backward", spy)
    road, inputs = ROADS[name]
    q, k, v = inputs(torch.float32, requires_grad=True)
    road(q, k, v, backend=backend).sum().backward()
    assert seen == {backend}
