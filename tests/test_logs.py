"""What is written into the log is what is read from it."""

from __future__ import annotations

from caft_plugin.logs import CAFTLog, HeadsEvaluation, MEAPLog


def test_a_log_is_read_as_it_was_written():
    log = CAFTLog(
        next_token_loss=2.0, head_losses={1: 3.0, 3: 4.0, 12: 5.0}, gamma=0.5, aux_loss=0.25
    )
    entries = log.entries()
    assert entries["caft/loss_head_12"] == 5.0 and "caft/loss_head_2" not in entries
    assert CAFTLog.read({"loss": 2.25, "epoch": 1.0, **entries}) == log
    assert CAFTLog.read({"loss": 2.25}) is None


def test_an_evaluation_is_read_as_it_was_written():
    evaluation = HeadsEvaluation({1: 3.0, 2: 4.0}, {1: 0.5, 2: 0.25}, 1.625, 8)
    losses = {"eval_caft/loss_head_1": 3.0, "eval_caft/loss_head_2": 4.0}
    assert evaluation.entries("eval") == {**losses, "eval_caft/tokens_per_pass": 1.625}
    entries = evaluation.entries("test", details=True)
    assert HeadsEvaluation.read({"test_loss": 1.0, **entries}, "test") == evaluation
    assert HeadsEvaluation.read(entries, "eval") == HeadsEvaluation({}, {})


def test_heads_are_read_in_their_order():
    entries = HeadsEvaluation({k: float(k) for k in range(1, 13)}, {}).entries("eval")
    assert list(HeadsEvaluation.read(entries, "eval").losses) == list(range(1, 13))


def test_no_share_is_logged_where_no_token_could_be_masked():
    assert MEAPLog(None, 0.0, 2.0).entries() == {
        "meap/examples_masked": 0.0,
        "meap/examples_too_long": 2.0,
    }
    assert MEAPLog(0.1, 1.0, 0.0).entries()["meap/masked_fraction"] == 0.1
