"""Loading models: whatever is wrong with a folder or a name is one `BadInput`, and no mistyped folder is asked of the hub."""

import json
import shutil
import socket

import pytest
from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.faithfulness.readers import load_base
from faithful_distill.files import BadInput, shipped
from faithful_distill.models import check_dtype, check_name
from faithful_distill.student.model import load_student
from faithful_distill.teacher.loading import load_teacher

LOADERS = {"teacher": load_teacher, "student": load_student, "base": load_base}
OTHER = "other sizes"


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def bytes_of(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def config(**values):
    def change(folder):
        read = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({k: v for k, v in read.items() if v != "gone"}))

    return change


def index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


FAULTS = {
    "weights_garbage": (bytes_of("model.safetensors", b"garbage" * 999), "model.safetensors is damaged"),
    "weights_empty": (bytes_of("model.safetensors", b""), "model.safetensors is damaged"),
    "weights_cut": (cut, "model.safetensors is damaged"),
    "weights_gone": (removed("model.safetensors"), "no file named model.safetensors"),
    "index_without_map": (index("{}"), "weight_map"),
    "index_of_missing_files": (
        index('{"metadata": {}, "weight_map": {"a": "m1.safetensors"}}'),
        "m1.safetensors",
    ),
    "width": (config(hidden_size=64, d_model=64), OTHER),
    "vocabulary": (config(vocab_size=10), OTHER),
    "heads": (config(num_attention_heads=7, num_heads=7), ""),
    "width_zero": (config(hidden_size=0, d_model=0), ""),
    "width_text": (config(hidden_size="big", d_model="big"), "expected int"),
    "fewer_layers": (
        config(num_hidden_layers=1, num_layers=1, num_decoder_layers=1),
        "config.json has no layer for",
    ),
    "negative_layers": (config(num_hidden_layers=-3, num_layers=-3), "config.json has no layer for"),
    "more_layers": (config(num_hidden_layers=9, num_layers=9), "lacks weights"),
    "layers_null": (config(num_hidden_layers=None, num_layers=None), "expected int"),
    "dtype": (config(dtype="float99"), "float99"),
    "type_list": (config(model_type=["t5"]), "config.json"),
    "type_unknown": (config(model_type="frobnicate"), "frobnicate"),
    "type_gone": (config(model_type="gone"), "model_type"),
    "own_code": (config(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "custom code"),
    "config_list": (bytes_of("config.json", b"[1]"), "model_type"),
    "config_broken": (bytes_of("config.json", b'{"a"'), "config"),
    "config_not_utf8": (bytes_of("config.json", b"\xff\xfe\x00"), "config"),
    "config_gone": (removed("config.json"), "config"),
    "tokenizer_empty_object": (bytes_of("tokenizer.json", b"{}"), "tokenizer cannot be used"),
    "tokenizer_list": (bytes_of("tokenizer.json", b"[]"), "tokenizer cannot be used"),
    "tokenizer_broken": (bytes_of("tokenizer.json", b"nope"), "tokenizer cannot be used"),
    "tokenizer_gone": (removed("tokenizer.json", "tokenizer_config.json"), "knows no word"),
    "tokenizer_settings_list": (bytes_of("tokenizer_config.json", b"[]"), "tokenizer cannot be used"),
    "generation_list": (bytes_of("generation_config.json", b"[]"), "cannot be used"),
}


@pytest.mark.parametrize("field", LOADERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_line_with_field_and_folder(tmp_path, fault, field):
    change, words = FAULTS[fault]
    folder = tmp_path / fault
    shutil.copytree(shipped("data", "models", "teacher" if field == "teacher" else "student"), folder)
    change(folder)
    with pytest.raises(BadInput) as error:
        LOADERS[field](folder)
    line = str(error.value)
    assert words in line and f"field '{field}'" in line and error.value.value == str(folder), line
    assert error.value.remedy and "\n" not in line


@pytest.mark.parametrize(
    "change", [config(decoder_start_token_id=None), config(decoder_start_token_id="gone")]
)
def test_a_student_that_does_not_say_where_outputs_start_is_refused(tmp_path, change):
    folder = tmp_path / "student"
    shutil.copytree(shipped("data", "models", "student"), folder)
    change(folder)
    with pytest.raises(BadInput, match="no decoder_start_token_id"):
        load_student(folder)


@pytest.mark.parametrize(
    "name", ["float99", "int8", "uint8", "bool", "float8_e4m3fn", "", "manual_seed", "complex64", 32]
)
def test_what_is_no_precision_of_weights_is_refused(name):
    for load in (load_teacher, load_student):
        kind = "teacher" if load is load_teacher else "student"
        with pytest.raises(BadInput, match="field 'dtype': must be one of auto"):
            load(shipped("data", "models", kind), dtype=name)
    assert str(check_dtype("float16")) == "torch.float16"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


MISTYPED = [
    "models/techer",
    "modls",
    "/nowhere/x",
    "./x",
    "../x",
    "~/x",
    "a/b/c",
    "models/",
    "x/",
    "a\\b",
    "a b",
    "a\0b",
]


@pytest.mark.parametrize("name", [*MISTYPED, "x" * 5000, "notes.txt", "", "  ", None, 7, b"models"])
def test_a_mistyped_folder_is_refused_at_once(tmp_path, monkeypatch, no_network, name):
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    for field, load in LOADERS.items():
        with pytest.raises(BadInput) as error:
            load(name)
        assert f"field '{field}'" in str(error.value) and "hub" in error.value.remedy
    assert "Did you mean 'models/teacher'?" in str(
        pytest.raises(BadInput, check_name, "models/techer", "x").value
    )


def test_what_may_be_a_hub_name_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    for name in ("gpt2", "google/flan-t5-small", "EleutherAI/gpt-neox-20b", "t5-small"):
        assert check_name(name, "student") == name


@pytest.mark.parametrize(
    "call",
    [
        ["rationales", "--data", "world", "--limit", "1", "--teacher", ""],
        ["train", "--rationales", "r.jsonl", "--student", ""],
        ["train", "--rationales", "r.jsonl", "--student", "", "--dry-run"],
        ["evaluate", "--data", "world", "--limit", "1", "--student", ""],
        ["score", "r.jsonl", "--simulator", ""],
        ["score", "r.jsonl", "--model", ""],
    ],
    ids=lambda call: " ".join(call[:1] + call[-2:]),
)
def test_an_unset_variable_is_no_embedded_model(tmp_path, monkeypatch, call):
    row = dict(id="1", question="Who?", choices=["me", "you"], answer=0, rationale="It is me.")
    monkeypatch.chdir(tmp_path)
    rows = [row | dict(gold=0, prediction=0), row | dict(target=1, rationale="It is you.")]
    rows = rows if call[0] == "train" else rows[:1]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = CliRunner().invoke(main, [*call, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "is empty" in done.output, done.output


def test_a_half_precision_checkpoint_is_loaded_in_what_is_fast_here(tmp_path, monkeypatch):
    "Only where the precision was left open, and only on a CPU."
    import torch
    from faithful_distill import models

    teacher = load_teacher(shipped("data", "models", "teacher"))
    teacher.model.to(torch.bfloat16).save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_teacher(tmp_path).model.dtype == torch.float32
    assert load_teacher(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert teacher.provenance()["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.chosen_dtype("auto") == "auto"
    assert models.chosen_dtype("auto", quantised=True) == torch.bfloat16


def test_a_wheel_writes_nothing_outside_the_folder_of_its_model(tmp_path):
    import importlib
    import zipfile

    unpack = importlib.import_module("faithful_distill.lab.pretrained")._unpack
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as z:
        z.writestr("toy/model/config.json", "{}")
        z.writestr("toy/model/../../../evil.txt", "evil")
    with pytest.raises(BadInput, match="would be written outside its folder"):
        unpack(tmp_path / "toy.whl", "toy/model", tmp_path / "a" / "out")
    assert not list(tmp_path.rglob("evil.txt"))
