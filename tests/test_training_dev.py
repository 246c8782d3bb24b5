"Training with dev data: which student is kept, what is saved and logged, and what the card says."

import json

import pytest

import ranks
from test_training import train


class Die(Exception):
    pass


def stops_at(n):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == n:
                raise Die

    return Stop()


def kept_by(saved):
    from transformers import TrainerCallback

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **_):
            saved.append(state.global_step)

    return Saved()


@pytest.mark.parametrize(
    "more",
    [
        dict(metric="loss", dev=True),
        dict(dev=True),
        dict(metric="loss", dev=True, evaluate_every=3, save_every=2),
    ],
)
def test_a_resumed_run_leaves_the_log_of_one_that_never_stopped(tmp_path, more):
    "With lines of several steps and evaluations by epoch: a checkpoint falls between two lines."
    settings = dict(
        more, dev=ranks.records(), max_steps=None, epochs=5, batch_size=3, log_every=100, warmup=0
    )
    if "save_every" not in settings:
        settings["save_every"] = 2
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(Die):
        train(tmp_path / "stopped", callbacks=[stops_at(9)], **settings)
    again = train(tmp_path / "stopped", **settings)
    assert (again.out / "metrics.jsonl").read_text() == (whole.out / "metrics.jsonl").read_text()
    assert (again.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    assert again.metrics == whole.metrics


def test_checkpoints_between_evaluations(tmp_path):
    saved = []
    train(
        tmp_path / "out",
        dev=ranks.records(),
        metric="loss",
        evaluate_every=4,
        save_every=3,
        max_steps=8,
        callbacks=[kept_by(saved)],
    )
    assert saved == [3, 4, 6, 8]


def test_the_clock_saves_beside_a_metric(tmp_path, monkeypatch):
    from faithful_distill.training.trainer import AutoSave

    monkeypatch.setattr(AutoSave, "due", lambda self, device="cpu": True)
    saved = []
    train(
        tmp_path / "out",
        dev=ranks.records(),
        metric="loss",
        evaluate_every=4,
        max_steps=6,
        callbacks=[kept_by(saved)],
    )
    assert saved == [1, 2, 3, 4, 5, 6]


def test_a_run_that_stops_early_logs_its_last_steps_and_its_card_names_the_step_kept(tmp_path):
    wrong = ranks.other_answers()  # must get worse once the right ones are known
    result = train(
        tmp_path / "out",
        dev=wrong,
        metric="loss_counterfactual",
        patience=2,
        evaluate_every=2,
        max_steps=60,
        lr=0.02,
        log_every=100,
    )
    note, card = json.loads((result.out / "student.json").read_text()), (result.out / "README.md").read_text()
    assert note["best_step"] < note["steps"] == result.steps < 60
    assert f"for {note['steps']} steps (the student of step {note['best_step']} was kept) on" in card
    assert [row["step"] for row in result.history if "loss" in row][-1] == note["steps"]


def test_dev_accuracy_allows_answers_as_long_as_those_learned(tmp_path, monkeypatch):
    from faithful_distill.training import dev

    asked, answer = [], dev.answer

    def noted(*args, **more):
        asked.append(more["max_new_tokens"])
        return answer(*args, **more)

    monkeypatch.setattr(dev, "answer", noted)
    result = train(
        tmp_path / "out",
        dev=ranks.records(),
        metric="accuracy",
        max_steps=2,
        evaluate_every=1,
        max_target=48,
    )
    assert asked == [48, 48] and 0 <= result.metrics["eval_accuracy"] <= 1


def test_steps_per_second_are_those_of_this_call(tmp_path):
    with pytest.raises(Die):
        train(tmp_path / "out", save_every=2, max_steps=6, callbacks=[stops_at(5)])
    result = train(tmp_path / "out", save_every=2, max_steps=6)
    times = json.loads((result.out / "times.json").read_text())
    assert times["steps_per_second"] * times["seconds"] == pytest.approx(2)
