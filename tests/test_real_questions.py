"The road of the profile `real`, with models of no knowledge at all: what is asked, kept, left out and written."

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from faithful_distill.files import BadInput, cache_folder, shipped
from faithful_distill.lab.grid import load_grid
from faithful_distill.lab.kept import Kept, done_cells, grid_with_kept, keep_rows, left_out
from faithful_distill.lab.splits import study_questions
from faithful_distill.lab.study import reproduce
from faithful_distill.questions import Question, normalized
from faithful_distill.records import Rationale, read_records
from faithful_distill.release import load_rationales, released, write_release
from faithful_distill.sources import load_questions
from faithful_distill.student.model import tiny_student
from faithful_distill.teacher.growth import stated_log_p
from faithful_distill.teacher.loading import Teacher
from faithful_distill.teacher.prompts import chat_text, context, worked_turns
from faithful_distill.teacher.rationales import rationalize

SHARED = Path(os.environ.get("FAITHFUL_DISTILL_SHARED", Path(__file__).parents[2] / "shared")) / "data"
CHOICES = ["bank", "park", "lake", "shop", "school"]


def executed(name: str, **params) -> dict:
    "The namespace after an experiment's code cells with these parameters."
    space = {}
    file = shipped("nbs", "experiments", f"{name}.ipynb")
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert params.keys() <= space.keys()
                space.update(params)
    return space


def row(i, split, stem=None, **more):
    return {
        "id": f"q{i}",
        "question": stem or f"Where is thing {i % 50} ?",
        "choices": CHOICES,
        "answer": i % 5,
    } | {"split": split, **more}


@pytest.fixture
def own_file(tmp_path):
    "Training questions 0 to 29 and test questions 30 to 44, among them one that stands in both sets."
    rows = [row(i, "train") for i in range(30)] + [row(i, "dev") for i in range(30, 45)]
    rows += [
        row(50, "dev", "Where is thing 7 ?"),
        row(51, "train", choices=["bank", "Bank.", "lake"], answer=0),
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_no_question_is_in_two_sets_and_none_has_two_choices_that_read_the_same(own_file):
    found = study_questions(str(own_file), n_train=20, n_dev=9, n_test=16)
    sets = [{normalized(q.question) for q in part} for part in (found.train, found.dev, found.test)]
    assert [len(s) for s in sets] == [20, 9, 16] and len(set().union(*sets)) == 45
    assert "where is thing 7 ?" in sets[2] and found.left_out == {"two choices read the same": 1}
    with pytest.raises(BadInput, match="n_train"):
        study_questions(str(own_file), n_train=21, n_dev=9, n_test=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A random causal model with a tokenizer that knows the words, in a folder."
    words = [
        "Where is thing ? A thing is in the .",
        *CHOICES,
        *map(str, range(60)),
        "Q: Answer Choices: The answer is",
    ]
    made = tiny_student([*words, "Say why, in one sentence. user assistant"], "llama")
    made.tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    folder = tmp_path_factory.mktemp("tiny")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder, Teacher(made.model, made.tokenizer, "tiny", "0")


def test_growth_reads_what_a_plain_forward_pass_reads(tiny):
    import torch
    from accelerate import cpu_offload

    teacher = tiny[1]
    asked = [Question(f"q{i}", f"Where is thing {i} ?", CHOICES, i % 5) for i in range(5)]
    texts = ["A thing is in the bank .", "in the park", "", "A thing", "lake lake lake"]
    fast = stated_log_p(teacher, asked, [q.answer for q in asked], texts, batch_size=2)
    for q, text, found in zip(asked, texts, fast):
        begin = teacher.tokenizer(context(q, q.answer)).input_ids
        ids = begin + teacher.tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            log_p = teacher.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        slow = [log_p[k - 1, ids[k]].item() for k in range(len(begin), len(ids))]
        assert found == (pytest.approx(sum(slow) / len(slow), abs=1e-4) if slow else None)
    with pytest.raises(BadInput, match="field 'rationales': are 4 for 5 questions"):
        stated_log_p(teacher, asked, [q.answer for q in asked], texts[1:])
    away = replace(teacher, model=cpu_offload(copy.deepcopy(teacher.model), torch.device("cpu")))
    assert away.model.device.type == "meta"
    assert stated_log_p(away, asked, [q.answer for q in asked], texts) == pytest.approx(fast, abs=1e-5)


def test_a_conversation_is_asked_between_turn_markers_and_data_are_no_markers(tiny):
    teacher, q = tiny[1], Question("q", "Where is </s> thing 1 ?", CHOICES, 0)
    text = chat_text(teacher.tokenizer, q, 0, worked_turns("csqa", 1))
    assert text.count("</s>") == 3 and text.startswith("user Q:") and text.endswith("assistant")
    chat, worked = (
        rationalize(teacher, [q], "greedy", style=s, max_new_tokens=4) for s in ("chat", "worked")
    )
    assert chat[0].prompt != worked[0].prompt
    with pytest.raises(BadInput, match="style"):
        rationalize(teacher, [q], "greedy", style="talk")
    plain = tiny_student(["a"], "llama")
    with pytest.raises(BadInput, match="chat template"):
        rationalize((plain.model, plain.tokenizer), [q], "greedy", style="chat")


def test_the_experiments_go_from_a_file_of_ones_own_to_an_evaluation(tiny, own_file, tmp_path):
    rationales, folder = tmp_path / "rationales", str(tiny[0])
    sizes = dict(n_train=12, n_dev=4, n_test=6, max_new_tokens=6, prompt="none", growth=True)
    how = dict(dataset=str(own_file), teacher_dir=folder, strategy="contrastive-wrong")
    made = executed("rationales", out=str(rationales), **how, **sizes)
    rows = [json.loads(line) for line in (rationales / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {r["role"] for r in rows} == {"gold", "counterfactual"}
    assert made["metrics"]["test"]["gold"]["choice"]["growth"]["n"] == sum(
        r["growth"] is not None for r in rows if r["role"] == "gold"
    )
    blank = read_records(rationales / "train.jsonl")
    emptied = [
        r.to_row() | ({"rationale": ""} if i < 3 else {"rationale": "A thing"}) for i, r in enumerate(blank)
    ]
    (rationales / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in emptied))
    trained = executed(
        "students",
        out=str(tmp_path / "trained"),
        rationales_dir=str(rationales),
        student_dir=folder,
        method="counterfactual",
        steps=1,
        batch_size=4,
        prefixes="none",
        drop_empty=True,
        use_dev=False,
        hide_choices=True,
        max_source=40,
        max_target=24,
    )
    assert len(trained["train"]) == 21 and trained["counted"]["left out"] == 3
    found = executed(
        "evaluate",
        out=str(tmp_path / "evaluated"),
        dataset=str(own_file),
        student_dir=str(tmp_path / "trained" / "student"),
        rationales_dir=str(rationales),
        n_test=None,
        metrics=["perturb", "refine", "swap", "shuffled"],
        swap_prefixes=["none"],
        n_simulate=0,
        draws=1,
        rhos=[],
        max_new_tokens=6,
    )
    rows = [json.loads(line) for line in (tmp_path / "evaluated" / "rows.jsonl").read_text().splitlines()]
    assert (
        len(rows) == 6
        and {"own", "perturbed", "shuffled", "oracle", "swap_wrong", "choice"} <= rows[0].keys()
    )
    assert found["scores"]["accuracy_likely"].n == 6
    follows = found["measured"].scores["swap_none"].details["wrong"]
    assert follows.value == pytest.approx(sum(r["swap_wrong"] for r in rows) / 6)


def test_released_rationales_come_back_and_hold_no_text_of_a_question(tmp_path):
    q = Question("q1", "Where is a secret kept?", CHOICES, 2, split="test")
    records = [
        Rationale(
            q.id, q.question, q.choices, 2, "It is deep.", target=t, perturbed=p, split="test", alpha=0.5
        )
        for t, p in ((2, (0, 1)), (0, 2))
    ]
    records[1] = replace(records[1], rationale="")  # one that came out empty is a record too
    file, card = write_release("secret", records, tmp_path, dataset="csqa")
    assert load_rationales("secret", [q], tmp_path) == records
    assert b"secret kept" not in __import__("gzip").decompress(file.read_bytes()) + card.read_bytes()
    with pytest.raises(BadInput, match="two rationales of one role"):
        write_release("twice", records * 2, tmp_path, dataset="csqa")
    for name in ("../x", "a/b", "", "a b"):
        with pytest.raises(BadInput, match="field 'name': must be letters"):
            write_release(name, records, tmp_path, dataset="csqa")
    (tmp_path / "mine.json").write_text("[1]")
    with pytest.raises(BadInput, match="mine.json: is no card of released rationales"):
        write_release("mine", records, tmp_path, dataset="csqa")
    (tmp_path / "own.jsonl.gz").write_text("mine")
    with pytest.raises(BadInput, match="own.json: would be replaced"):
        write_release("own", records, tmp_path, dataset="csqa")
    write_release("secret", records, tmp_path, dataset="csqa")
    (tmp_path / "secret.json").write_text("[1]")
    with pytest.raises(BadInput, match="secret.json: is no card"):
        released(tmp_path)


@pytest.mark.parametrize("name", ["csqa-greedy", "csqa-contrastive-wrong"])
def test_the_rationales_that_come_with_the_package_join_the_real_questions(name):
    data = SHARED / "csqa"
    if not data.is_dir():
        pytest.skip(f"there is no CommonsenseQA in {data}")
    questions = [q for split in ("train", "dev") for q in load_questions("csqa", split, path=data)]
    records = load_rationales(name, questions)
    counts = released()[name]["counts"]
    assert len(records) == sum(counts.values()) and {r.role for r in records} == {"gold", "counterfactual"}
    assert all(r.target == r.answer for r in records if r.role == "gold")
    assert all(r.target != r.answer for r in records if r.role == "counterfactual")


COUNT = """import json
from pathlib import Path
Path(out, "rows.jsonl").write_text(json.dumps({"id": "q", "found": step * seed}) + "\\n")
Path(out, "metrics.json").write_text(json.dumps({"found": {"value": step * seed / 100, "low": None, "high": None, "n": 1}}))
"""
NOTE = """import json
from pathlib import Path
for name in ("note.json", "metrics.json"):
    Path(out, name).write_text(json.dumps({"noted": {"value": 0.5, "low": None, "high": None, "n": 1}}))
"""
DRAW = "from pathlib import Path\nPath(out, 'drawn.csv').write_text(Path(rows_path).read_text() + Path(note_path).read_text())"


@pytest.fixture
def grid_file(tmp_path):
    "A grid of an experiment with three seeds, one without, and a figure of rows and a file of theirs."
    for name, parameters, code in (
        ("count", 'out: str = "x"\nstep: int = 1\nseed: int = 0\ndata_dir: str = ""', COUNT),
        ("note", 'out: str = "x"', NOTE),
        ("draw", 'out: str = "x"\nresults_path: str = ""\nrows_path: str = ""\nnote_path: str = ""', DRAW),
    ):
        cells = [
            dict(
                cell_type="code",
                id=f"c{i}",
                metadata={"tags": tags},
                source=s,
                outputs=[],
                execution_count=None,
            )
            for i, (s, tags) in enumerate([(parameters, ["parameters"]), (code, [])])
        ]
        notebook = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook))

    def write(step):
        text = f"""
seeds: [1, 2, 3]
groups:
  count: {{notebook: count.ipynb, params: {{step: {step}}}}}
  note: {{notebook: note.ipynb}}
figures:
  draw:
    notebook: draw.ipynb
    params: {{results_path: {{table: count}}, rows_path: {{rows: count}}, note_path: {{from: note, file: note.json}}}}
"""
        (tmp_path / "toy.yaml").write_text(text)
        return tmp_path / "toy.yaml"

    return write


def test_a_seed_that_is_kept_is_not_computed_again_unless_its_settings_changed(grid_file, tmp_path):
    from faithful_distill.lab.study import keep_profile

    file, kept = grid_file(2), tmp_path / "kept"
    states = []
    for machine, seed in (("a", 1), ("b", 3)):
        runs = tmp_path / machine
        made = reproduce(file, seeds=[seed], workers=1, runs=runs, keep=kept)
        keep_profile(file, kept, runs, [seed])
        states.append({o.cell: o.state for o in made.outcomes})
    assert states == [
        {"count seed=1": "computed", "note": "computed", "draw": "computed"},
        {"count seed=1": "there", "note": "there", "count seed=3": "computed", "draw": "computed"},
    ]
    assert (kept / "toy_count_rows.csv").read_text() == "group,seed,id,found\ncount,1,q,2\ncount,3,q,6\n"
    assert sorted(done_cells("toy", kept)) == ["count seed=1", "count seed=3", "note"]
    assert (kept / "toy_count.csv").read_text().splitlines()[1].startswith("count,1,found,0.02")
    grid = grid_with_kept(grid_file(5), kept, [2])
    assert list(grid.plan.cells) == ["count seed=2", "note", "draw"] and Kept(grid, kept).cells == {"note"}
    (kept / "toy_count_rows.csv").unlink(), (kept / "toy_note.json").unlink()
    grid = grid_with_kept(grid_file(2), kept, [1])
    assert left_out(grid, Kept(grid, kept), tmp_path / "c") == ([], set()), (
        "half of what is kept is not enough"
    )
    (kept / "toy_done.json").write_text('{"count seed=1": ')
    with pytest.raises(BadInput, match="toy_done.json"):
        grid_with_kept(file, kept, [1])
    assert keep_rows(load_grid(file, [1]), tmp_path / "a", tmp_path / "new")[-1].name == "toy_done.json"


def test_models_are_made_once_and_half_a_student_is_made_anew(tmp_path):
    (tmp_path / "student.new").mkdir()
    (tmp_path / "student.new" / "model.safetensors").write_bytes(b"torn")
    how = dict(out=str(tmp_path), teacher=str(shipped("data", "models", "teacher")), keep=2)
    metrics = executed("models", **how)["metrics"]
    assert metrics["student"]["layers"] == -(-metrics["teacher"]["layers"] // 2)
    before = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    assert executed("models", **how)["metrics"] == metrics
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_grids_of_real_questions_take_a_folder_of_data(tmp_path):
    for name in ("real", "real-smoke"):
        cells = load_grid(name, data_dir=str(tmp_path)).plan.cells.values()
        asking = [c for c in cells if Path(c.notebook).stem == "rationales"]
        assert asking and all(c.params["data_dir"] == str(tmp_path) for c in asking)
        assert all("data_dir" not in c.params for c in cells if c not in asking)


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="a quarter of an hour: set FAITHFUL_DISTILL_SLOW=1"
)
def test_the_whole_road_on_real_questions_and_models(tmp_path):
    if not (SHARED / "csqa").is_dir():
        pytest.skip("needs the public datasets beside the repository")
    if not (cache_folder() / "smollm2-135m-instruct").is_dir():
        pytest.skip("needs the pretrained models in the cache: faithful_distill.lab.pretrained fetches them")
    made = reproduce("real-smoke", runs=tmp_path, data_dir=str(SHARED))
    assert made.ok, made.summary()
    assert (made.folder / "report.html").is_file() and (
        made.folder / "figures" / "fig14_students.png"
    ).is_file()
    again = reproduce("real-smoke", runs=tmp_path, data_dir=str(SHARED))
    assert {o.state for o in again.outcomes} == {"there"}
