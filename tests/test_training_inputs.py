"What is asked of a training run: recognised, refused where it cannot be done, never at the cost of what is there."

import json
import os
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import ranks
from faithful_distill.files import BadInput
from faithful_distill.hashes import weights_hash
from faithful_distill.records import read_records
from faithful_distill.student.answers import answer
from faithful_distill.student.model import Student, load_student, tiny_student
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


def test_an_edited_deepspeed_file_is_another_run(tmp_path):
    file, keys = tmp_path / "own.json", set()
    for stage in (0, 1, 0):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        keys.add(run_key(Settings(deepspeed=file), ranks.rationales(), None, "w"))
    assert len(keys) == 2


def test_a_model_is_its_weights_its_configuration_and_its_tokenizer(tmp_path):
    texts = ["fish live in water"]
    student, key = tiny_student(texts), weights_key(tiny_student(texts))
    assert weights_key(student) == key
    for part in (student.model, student.tokenizer):
        part.save_pretrained(tmp_path / "saved")
    loaded = Student(
        T5ForConditionalGeneration.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    assert weights_key(loaded) == key, "wherever it came from"
    student.model.config.dropout_rate += 0.1
    assert weights_key(student) != key
    loaded.tokenizer.add_tokens(["whale"])
    assert weights_key(loaded) != key


@pytest.mark.parametrize("name", ["chat_template.jinja", "spiece.model", "added_tokens.json"])
def test_each_file_that_decides_an_output_is_in_the_key_of_a_folder(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    before = weights_hash(tmp_path)
    (tmp_path / name).write_text("a")
    there = weights_hash(tmp_path)
    (tmp_path / name).write_text("b")
    assert len({before, there, weights_hash(tmp_path)}) == 3


def test_a_file_of_weights_is_its_bytes(tmp_path):
    keys = []
    for content in ("a", "b", "a"):
        (tmp_path / "m.gguf").write_text(content)
        keys.append(weights_key(tmp_path / "m.gguf"))
    assert keys[0] == keys[2] != keys[1]


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
        dict(label_smoothing=1),
        dict(seed=2**32),
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
        (dict(lora=8), "field 'lora': must be a valid dictionary"),
        (dict(lora="r"), "field 'lora': must be a dict, or name=value in a text .got 'r'."),
        (dict(learning_rate=1), "field 'learning_rate': is not a setting. Did you mean 'lr'?"),
        (dict(num_train_epochs=1), "Did you mean 'epochs'?"),
        (dict(per_device_train_batch_size=1), "Did you mean 'batch_size'?"),
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
        ('{"zero_optimization": {"stage": 9}}', "ZeRO stage that does not exist .got 9."),
        ('{"zero_optimization": {"stage": "two"}}', "ZeRO stage that does not exist .got 'two'."),
        ('{"zero_optimization": {"stage": true}}', "ZeRO stage that does not exist"),
        ('{"zero_optimization": {"stage": null}}', "ZeRO stage that does not exist"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("{", "broken JSON"),
        (
            '{"zero_optimisation": {"stage": 2}}',
            "deepspeed.zero_optimisation.*Did you mean 'zero_optimization'",
        ),
        ('{"bf16": {}, "bf16": {}}', "own.json: field 'bf16': occurs twice"),
    ],
)
def test_a_file_that_is_no_deepspeed_configuration_is_refused(tmp_path, written, match):
    path = tmp_path / "own.json"
    path.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(BadInput, match=match):
        deepspeed_config(path)


@pytest.mark.parametrize(
    "section, precision",
    [
        (dict(fp16=dict(enabled=True)), None),
        (dict(fp16=True), None),
        (dict(amp=dict(enabled=True)), "fp32"),
        (dict(bf16=dict(enabled=True)), "fp32"),
        (dict(bf16=dict(enabled=False)), "bf16"),
        (dict(bf16=True), "bf16"),
    ],
)
def test_the_settings_decide_the_precision(section, precision):
    with pytest.raises(BadInput, match=r"enabled, which conflicts with settings.precision"):
        session_config(Settings(deepspeed=section, precision=precision), 1)
    for fine in (
        dict(bf16=dict(enabled=True)),
        dict(bf16=dict(enabled="auto"), fp16=dict(enabled=False)),
        {},
    ):
        assert session_config(Settings(deepspeed=fine, precision="bf16"), 1)


def test_adapters_are_read_from_a_text_as_from_the_command_line():
    given = Settings(lora="r=8,lora_dropout=1e-1,use_rslora=false,rank_pattern=none,target_modules=q+v").lora
    assert given == dict(
        r=8, lora_dropout=0.1, use_rslora=False, rank_pattern=None, target_modules=["q", "v"]
    )
    assert Settings(lora=dict(use_rslora="False", r="8")).lora == dict(use_rslora=False, r=8)
    for bias in ("bias=none", dict(bias="none"), dict(bias=None)):  # a word of peft's, not nothing
        assert Settings(lora=bias).lora == dict(bias="none")


def test_a_seed_that_is_wrong_stops_all_before_the_first_is_trained(tmp_path):
    with pytest.raises(BadInput, match="field 'seed'"):
        train_seeds(ranks.base(), ranks.records(), out=tmp_path / "out", seeds=[0, 2**32], max_steps=1)
    assert not (tmp_path / "out").exists()


def write_lines(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


@pytest.mark.parametrize(
    "given, missing", [({}, "RANK"), ({"RANK": "0"}, "LOCAL_RANK"), ({"RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR")]
)  # fmt: skip
def test_half_of_a_launchers_variables_are_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, given, missing
):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.ranks import rank_variables

    for name in rank_variables:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **given}.items():
        monkeypatch.setenv(name, value)
    records = tmp_path / "r.jsonl"
    records.write_text('{"question": "Which?", "choices": ["a", "b"], "answer": 0, "rationale": "It is."}\n')
    done = CliRunner().invoke(main, ["train", "--rationales", str(records), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and not (tmp_path / "out").exists(), done.output
    assert f"field '{missing}': is not set, but WORLD_SIZE says 2 processes" in done.output


def test_records_of_one_id_are_about_one_question(tmp_path):
    records = ranks.records()
    for change in (dict(question="Other ?"), dict(choices=["a dam", "x", "y", "z", "u"])):
        wrong = write_lines(tmp_path / "r.jsonl", [*records[:2], dict(records[2], **change), *records[3:]])
        with pytest.raises(BadInput, match="r.jsonl:3: field 'id': is that of another question.* in line 2"):
            train(tmp_path / "out", records=wrong)
    with pytest.raises(BadInput, match="line 3: field 'id'"):
        train(tmp_path / "out", records=read_records(tmp_path / "r.jsonl"))


def test_records_that_are_there_twice_are_counted(tmp_path, caplog):
    records = ranks.records()
    train(tmp_path / "once", records=records, max_steps=1)
    assert "twice" not in caplog.text
    train(tmp_path / "twice", records=[*records, records[0], records[3]], max_steps=1)
    assert "2 are there twice (lines 1 and 10 first)" in caplog.text


def test_words_that_a_student_lacks_are_counted_and_choices_that_they_make_equal_are_refused(
    tmp_path, caplog
):
    records = ranks.records()
    train(tmp_path / "known", records=records, max_steps=1)
    assert "unknown" not in caplog.text
    new = [dict(r, rationale="zyx " + r["rationale"]) for r in records]
    train(tmp_path / "new", records=new, max_steps=1)
    assert re.search(r"% of the rationale tokens \(9 of \d+\) are unknown to the tokenizer of", caplog.text)
    zyx = [dict(r, id=r["id"] + "2", choices=["a zyx", "a qed", *r["choices"][2:]]) for r in records]
    with pytest.raises(
        BadInput, match="choices 'a zyx' and 'a qed' of question 'beaver2' are the same tokens"
    ):
        train(tmp_path / "equal", records=[*records, *zyx])


def test_publishing_without_a_network_is_one_line_and_keeps_the_student(tmp_path, monkeypatch):
    import huggingface_hub
    from faithful_distill.training.card import push_to_hub

    class Hub:
        def create_repo(self, *_, **__):
            raise ConnectionError("[Errno -3] Temporary failure\nin name resolution")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = train(tmp_path / "out", max_steps=1).out
    with pytest.raises(BadInput, match="field 'push_to_hub': could not be uploaded.*is whole in") as e:
        push_to_hub(out, "me/student")
    assert "\n" not in str(e.value) and load_student(out)


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
        dict(answer="an egg"),
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
    with pytest.raises(BadInput, match="field 'question': row 1: is missing"):
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
        monkeypatch.setenv("WORLD_SIZE", "2")
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
