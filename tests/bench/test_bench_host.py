"""bench-host times every road, each beside the road of its bar."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from flashcore.bench import host_roads
from flashcore.cli import app


def test_every_road_is_timed(monkeypatch):
    counts = []
    monkeypatch.setattr("flashcore.bench.host._CALLS", 2)
    monkeypatch.setattr(host_roads, "CALLS", 2 * host_roads.LAYERS)
    monkeypatch.setattr(
        "flashcore.bench.host._latency_us", lambda call, device: counts.append(call()) or 1.0
    )
    result = CliRunner().invoke(app, ["bench-host", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert counts  # latency was asked for
    roads = {row["road"]: row for row in json.loads(result.stdout)["roads"]}
    assert len(roads) >= 23
    assert not [row for row in roads.values() if "skipped" in row]
    barred = [row for row in roads.values() if row.get("bar")]
    assert len(barred) == 22
    for row in barred:
        assert row["ratio"] == row["us"] / roads[row["than"]]["us"]


def test_a_layer_of_many_counts_as_one(monkeypatch):
    q, k, v = (torch.zeros(1, 1, 4, 8) for _ in range(3))
    rows = host_roads.run(q, k, v, 1, lambda call, count: 48.0)
    of_layers = [row["us"] for row in rows if "layers" in row["road"]]
    assert of_layers == [48.0 / host_roads.LAYERS] * 2
