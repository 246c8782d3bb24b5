"What is asked of a training run: recognised, refused where it cannot be done, never at the cost of what is there."

import json
import os
from pathlib import Path

import pytest
from transformers import T5Config, T5ForConditionalGeneration

import ranks
from faithful_distill.files import BadInput
from faithful_distill.records import read_records
from faithful_distill.student.answers import answer
from faithful_distill.student.model import load_student
from faithful_distill.training.folder import run_key, weights_key
from faithful_distill.training.launch import launch, train_seeds
from faithful_distill.training.settings import Settings
from faithful_distill.training.sizing import count_parameters, dry_run
from faithful_distill.training.zero import deepspeed_config, session_config
from test_training import at_step, train


def test_a_rationale_that_moves_from_training_to_dev_makes_another_run():
    all_of_them = ranks.rationales()
    splits = [(all_of_them[:n], all_of_them[n:] or None) for n in (5, 7, len(all_of_them))]
    keys = {run_key(Settings(), train, dev, "w") for train, dev in [*splits, (all_of_them, all_of_them)]}
    assert len(keys) == 4


def test_equal_numbers_are_the_same_run():
    "However they are written: 3 epochs are 3.0, and a path is its text."
    a, b = Settings(epochs=3, deepspeed=Path("own.json")), Settings(epochs=3.0, deepspeed="own.json")
    assert run_key(a, ranks.rationales(), None, "w") == run_key(b, ranks.rationales(), None, "w")


def test_weights_differ_wherever_in_a_file_they_differ(tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=2000,
            d_model=512,
            d_kv=64,
            d_ff=1024,
            num_layers=1,
            num_heads=8,
            decoder_start_token_id=0,
        )
    )  # a file of several MiB
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    for name, p in model.named_parameters():
        if ".q." in name:
            p.data += 1
    model.save_pretrained(tmp_path / "other")
    one, same, other = (weights_key(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other


@pytest.mark.parametrize(
    "given",
    [
        dict(patience=2),
        dict(patience=0, metric="loss"),
        dict(warmup=3),
        dict(warmup=-0.1),
        dict(label_smoothing=-1),
        dict(label_smoothing=float("nan")),
        dict(max_steps=0),
        dict(max_steps=-3),
        dict(save_every=-1),
        dict(evaluate_every=-2),
        dict(lr="a"),
        dict(lr=0),
        dict(lr=float("inf")),
        dict(batch_size=2.5),
        dict(batch_size=True),
        dict(max_source=0),
        dict(seed=-1),
        dict(alpha_cf=1.0),
        dict(alpha_cf=-0.1),
        dict(epochs=0),
        dict(clip=-1),
        dict(weight_decay=-1),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(given):
    with pytest.raises(BadInput, match=f"field '{next(iter(given))}'"):
        Settings(**given)


@pytest.mark.parametrize(
    "given, match",
    [
        (dict(recompute="false"), "field 'recompute': must be a valid boolean .got 'false'."),
        (dict(answer_only=0), "field 'answer_only': must be a valid boolean"),
        (dict(epochs="3"), "field 'epochs': must be a valid number"),
        (
            dict(schedule="exp"),
            "field 'schedule': must be one of 'linear', 'constant' or 'cosine' .got 'exp'.",
        ),
        (dict(precision="fp16"), "field 'precision': must be one of 'fp32' or 'bf16'"),
        (dict(deepspeed=2), "field 'deepspeed': must be a valid string or be a valid dictionary .got 2."),
        (dict(lora="r=8"), "field 'lora': must be a valid dictionary"),
        (dict(report_to=3), "field 'report_to': must be a valid list"),
        (dict(report_to=[3]), "field 'report_to': is not a reporter"),
        (dict(max_step=3), "field 'max_step': is not a setting. Did you mean 'max_steps'?"),
        (dict(lr="a", seed=-1), "field 'lr'"),
    ],
)
def test_a_value_of_another_type_is_not_converted_but_refused(given, match):
    with pytest.raises(BadInput, match=match):
        Settings(**given)


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Settings().lr = 1.0


@pytest.mark.parametrize(
    "written, match",
    [
        ("[]", "not a DeepSpeed configuration"),
        ('{"zero_optimization": 2}', "not a DeepSpeed configuration"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("{", "broken JSON"),
    ],
)
def test_a_file_that_is_no_deepspeed_configuration_is_refused(tmp_path, written, match):
    path = tmp_path / "own.json"
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(BadInput, match=match):
        deepspeed_config(path)


def test_settings_decide_in_a_configuration_of_ones_own(tmp_path):
    for section in ("optimizer", "scheduler"):
        with pytest.raises(BadInput, match=f"section '{section}', which would replace the settings"):
            train(tmp_path / section, deepspeed={section: {"type": "SGD"}})
    with pytest.raises(BadInput, match="gradient_clipping, which conflicts with settings.clip"):
        train(tmp_path / "mismatch", deepspeed=dict(gradient_clipping=3.0), clip=1.0)
    short = [
        train(
            tmp_path / f"clip{clip}",
            deepspeed=dict(zero_optimization=dict(stage=2, overlap_comm=False)),
            clip=clip,
            optimizer="adafactor",
            lr=0.1,
        )
        for clip in (1e-4, 1e9)
    ]
    a, b = ([row["loss"] for row in run.history] for run in short)
    assert a[0] == b[0] and a != b
    bare = train(
        tmp_path / "bare", deepspeed=dict(zero_optimization=dict(stage=3)), max_steps=2
    )  # gathered in the end, though the configuration does not ask for it
    assert (
        load_student(bare.out)
        and session_config(Settings(deepspeed=dict(zero_optimization=dict(stage=3))), 1)["zero_optimization"][
            "stage3_gather_16bit_weights_on_model_save"
        ]
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(choices=None),
        dict(choices="abcde"),
        dict(choices=[1, 2, 3, 4, 5]),
        dict(rationale=None),
        dict(rationale=5),
        dict(question=5),
        dict(target="0"),
        dict(answer="0"),
        dict(role="silver"),
    ],
)
def test_a_rationale_of_the_wrong_kind_is_refused_with_its_line(tmp_path, change):
    [field], broken = change, {**ranks.records()[1], **change}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (ranks.records()[0], broken)))
    with pytest.raises(BadInput, match=f"records.jsonl:2: field '{field}'"):
        read_records(path)
    with pytest.raises(BadInput, match=f"field '{field}'"):
        read_records([broken])


def test_rationales_in_a_list_are_checked_as_a_file_is(tmp_path):
    with pytest.raises(BadInput, match="field 'question': is missing"):
        train(tmp_path / "out", records=[dict(id=1)])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "lora",
    [
        dict(use_dora=True),
        dict(target_modules=["q", "shared"]),
        dict(modules_to_save=["lm_head"]),
        dict(lora_bias=True),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_and_cost_nothing(tmp_path, lora):
    pytest.importorskip("peft")
    lora = {**dict(r=2, target_modules=["q", "v"]), **lora}
    with pytest.raises(BadInput, match="cannot be merged"):
        train(tmp_path / "out", lora=lora)
    with pytest.raises(BadInput, match="cannot be merged"):
        count_parameters(ranks.base(), lora)
    assert not list((tmp_path / "out").iterdir())


def test_a_dry_run_refuses_wrong_adapters(tmp_path):
    with pytest.raises(BadInput, match="peft refuses it"):
        dry_run(ranks.base(), ranks.records(), lora=dict(rank=8))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(deepspeed="zero9"),
        dict(lora=dict(rank=8)),
        dict(accumulation=3),
        dict(deepspeed=dict(gradient_clipping=3.0)),
        dict(max_target=2),
    ],
)
def test_nothing_is_overwritten_before_everything_else_is_in_order(tmp_path, wrong):
    out = train(tmp_path / "out", max_steps=2).out
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(BadInput):
        train(out, overwrite=True, **wrong)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_only_the_first_rank_discards_what_is_there(tmp_path, monkeypatch):
    """A run on more ranks is to overwrite a folder that another still trains into.

    Its first rank is refused, and the others have nothing to remove.
    """
    from faithful_distill.training import zero

    seen = []

    def second(model):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(
            zero,
            "deepspeed_session",
            lambda: (_ for _ in ()).throw(InterruptedError("waits for the first rank")),
        )
        with pytest.raises(InterruptedError):
            train(tmp_path / "out", overwrite=True)
        monkeypatch.undo()
        seen.append((tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir())

    train(tmp_path / "out", save_every=2, callbacks=[at_step(3, second)])
    assert seen == [True]


def test_a_student_keeps_the_lengths_it_was_trained_with(tmp_path):
    result = train(tmp_path / "out", max_steps=1, max_source=40, max_target=50)
    assert (result.student.max_source, result.student.max_target) == (40, 50)
    asked = load_student(result.out, max_target=60)
    assert (asked.max_source, asked.max_target) == (40, 60)


def test_a_student_with_few_positions_never_leaves_them():
    student = ranks.base("gpt2", n_positions=64)
    student = type(student)(student.model, student.tokenizer, student.name)
    assert student.max_source + student.max_target == 64
    record = dict(ranks.records()[0], choices=["a dam", "wood straw wax sand earth " * 3, "a nest"])
    asked = [{k: record[k] for k in ("id", "question", "choices", "answer")}] * 2
    answers = answer(student, asked, [None, "it gathers wood " * 30], max_new_tokens=500)
    assert all(a.truncated for a in answers) and len(answers[0].scores) == 3


def test_seeds_are_named_once(tmp_path):
    with pytest.raises(BadInput, match="conflicts with seeds"):
        train_seeds(ranks.base(), ranks.records(), out=tmp_path, seeds=2, seed=3)


def test_a_metric_that_dev_cannot_give_is_refused_at_once(tmp_path):
    gold = [r for r in ranks.records() if r["role"] == "gold"]
    with pytest.raises(BadInput, match="needs counterfactual dev rationales"):
        train(tmp_path / "out", dev=gold, metric="loss_counterfactual")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="starts processes from cold: set FAITHFUL_DISTILL_SLOW=1",
)
def test_processes_that_take_too_long_are_all_stopped(tmp_path, capfd, monkeypatch):
    import time

    monkeypatch.setenv("FAITHFUL_DISTILL_PROGRESS", "1")
    base = ranks.base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    call = dict(out=tmp_path / "out", max_steps=100000, batch_size=2, log_every=1, save_every=50)
    with pytest.raises(BadInput, match="field 'timeout'"):
        launch(1, tmp_path / "base", ranks.records(), timeout=40, **call)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    time.sleep(2)
    assert lines and (tmp_path / "out" / "metrics.jsonl").read_text() == lines
    assert "training" in capfd.readouterr().err  # its bar was seen
    done = launch(1, tmp_path / "base", ranks.records(), overwrite=True, **{**call, "max_steps": 3})
    assert done.steps == 3
