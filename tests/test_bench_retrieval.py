"""The costs of looking up are measured on what they are named after, in turns, by one command."""

import itertools
import json

import pytest
import torch

from config import ResidualConfig
from newllm.errors import UserError
from newllm.flags import parse_args
from scripts import bench_retrieval as bench


@pytest.fixture
def config(tiny_settings, monkeypatch):
    """A tiny network, texts and stores."""
    small = dict(VOCABULARY=60, PLACES=400, TURNS=2, TOKENS=3, SAMPLES=4, LENGTHS=(20, 300), SIZES=(100, 300))
    for name, value in (small | dict(SHORT=5, LOOKUPS=4)).items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "call_apart", lambda function, *arguments: function(*arguments))
    return ResidualConfig(**tiny_settings | dict(retrieval="ngram,cache,knn", retrieval_window=32))


def options(*argv):
    return parse_args(ResidualConfig, argv, extra=bench.flags)[1]


def test_every_part_gives_its_figures(config, capsys):
    """As JSON and as tables; a state does not grow with the text."""
    bench.main(config, options("--json"))
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["generation", "long", "evaluation", "places"]
    assert [row["text_so_far"] for row in found["generation"]] == [5, 32]
    assert [row["text_so_far"] for row in found["long"]] == [20, 300]
    assert found["long"][1]["state_mb"] < 4 * found["long"][0]["state_mb"]
    assert [row["places"] for row in found["places"]] == [100, 300]
    for row in itertools.chain(*found.values()):
        assert all(value > 0 for name, value in row.items() if name != "network")
    bench.main(config, options("--parts=places"))
    assert capsys.readouterr().out.startswith("places | mean_ms | most_frequent_ms | store_mb")


def test_a_speed_is_the_median_over_turns(config, monkeypatch):
    """With and without in turns: 2 and 4 seconds a token, then 3 and 6, are half the speed each time."""
    seconds = iter([2, 4, 3, 6] * 2)
    monkeypatch.setattr(bench.Made, "seconds_a_token", lambda *given: next(seconds))
    for row in bench.generation(config, False):
        assert row["speed_kept"] == 0.5 and row["without_tok_s"] == pytest.approx(1 / 2.5)


def test_what_is_timed_looks_up_as_a_run_does(config):
    """The store has every place; ids are as frequent as words are."""
    made = bench.Made(config)
    assert len(made.retrieval.store.following) >= 400 and made.retrieval.experts == ["ngram", "cache", "knn"]
    assert bench.zipf(60).sum().item() == pytest.approx(1) and bench.zipf(60).argmax() == 0
    past = bench.long_past(made, 300)
    assert past.length.item() == 300 and torch.equal(past.ids[0], made.text(300)[-32:])


def test_bad_input_is_a_sentence(config, tiny_settings):
    with pytest.raises(UserError, match="parts are generation, long, evaluation, places"):
        options("--parts=speed")
    with pytest.raises(UserError, match="costs nothing"):
        bench.main(ResidualConfig(**tiny_settings), options("--parts=generation"))
