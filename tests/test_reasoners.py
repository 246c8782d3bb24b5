"Reasoners: prompts as models see them, files of weights, planted reasoners at floor and ceiling."

from dataclasses import replace

import pytest
from gguf_models import byte_tokenizer, template, tiny_llama, write_gguf

from faithful_distill import measure
from faithful_distill.files import BadInput, write_json
from faithful_distill.lab.world import supporting_rationale, world_questions
from faithful_distill.reasoners.cached import CachedReasoner
from faithful_distill.reasoners.causal import CausalReasoner
from faithful_distill.reasoners.opening import open_reasoner
from faithful_distill.reasoners.protocol import Scripted


@pytest.fixture(scope="module")
def model():
    tokenizer = byte_tokenizer()
    return tiny_llama(tokenizer, positions=2048), tokenizer


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory):
    pytest.importorskip("gguf")
    return write_gguf(*model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_is_the_model_that_was_written(model, gguf_file, tmp_path):
    import torch

    reasoner = open_reasoner(gguf_file, "chat", max_new_tokens=4)
    read, ids = reasoner.teacher.model, torch.tensor([model[1]("this is the question")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, model[0](ids).logits, rtol=0, atol=1e-5)
    assert reasoner.tokenizer.chat_template == template
    assert reasoner.name == "tiny.gguf" and len(reasoner.describe()["weights"]) == 12
    read.save_pretrained(tmp_path)  # it forgets that it was quantised
    again = open_reasoner((type(read).from_pretrained(tmp_path), model[1]), "chat", max_new_tokens=4)
    q = world_questions("choice", "dev", limit=1)
    assert again.ask(q)[0].scores == pytest.approx(reasoner.ask(q)[0].scores, abs=1e-3)


def test_a_gguf_file_becomes_a_student_and_is_saved(gguf_file, tmp_path):
    from faithful_distill import answer, load_student

    student = load_student(gguf_file, max_target=40)
    [found] = answer(student, world_questions("choice", "dev", limit=1), [""])
    assert len(found.scores) == 5
    student.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "change, words",
    [
        ("architecture", "architecture odd is not supported yet"),
        ("cut", "Fetch it again"),
        ("text", "is no GGUF file"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_one_line(model, gguf_file, tmp_path, change, words):
    file = tmp_path / "bad.gguf"
    if change == "architecture":
        write_gguf(*model, file, architecture="odd")
    else:
        file.write_bytes(gguf_file.read_bytes()[:3000] if change == "cut" else b"<html>")
    with pytest.raises(BadInput) as caught:
        open_reasoner(file)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_package_gguf_may_be_missing(gguf_file, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a)
    )
    with pytest.raises(BadInput, match="needs the package gguf.*pip install"):
        open_reasoner(gguf_file)


def planted_scores(copies: bool):
    questions = world_questions("choice", "dev", limit=40)
    wrong = [next(i for i in range(5) if i != q.answer) for q in questions]
    rows = [
        dict(id=q.id, target=target, rationale=supporting_rationale(q, target))
        for q, w in zip(questions, wrong)
        for target in (q.answer, w)
    ]
    return measure(Scripted(copies), questions, rows).scores


def test_planted_reasoners_sit_at_ceiling_and_floor(tmp_path):
    ceiling, floor = planted_scores(True), planted_scores(False)
    for name in ("perturb", "filler", "shuffled", "early_answering", "adding_mistakes"):
        assert floor[name].value == 0.0, name
    assert (
        floor["post_answer_same"].value == floor["self_splice"].value == ceiling["self_splice"].value == 1.0
    )
    assert ceiling["swap_none"].value == 1.0
    assert ceiling["swap_none"].details["wrong"].value == 1.0
    assert ceiling["shuffled"].value > 0.5 and ceiling["post_answer"].value > 0.5
    for name in ("swap_factual", "swap_counterfactual_probability"):
        assert ceiling[name].value is None and "trained with tags" in ceiling[name].reason


def scripted_thinker(model, thought: str, monkeypatch, **options):
    "A thinking reasoner whose model writes this text, token by token."
    reasoner = CausalReasoner(model, "think", **options)
    ids = reasoner.tokenizer(thought, add_special_tokens=False)["input_ids"]

    def write(contexts, limits, over):
        found = []
        for k, limit in enumerate(limits):
            n = next((n for n in range(1, len(ids) + 1) if over(k, ids[:n])), len(ids))
            found.append((ids[: min(n, limit)], min(n, limit) == len(ids) and n == len(ids)))
        return found

    monkeypatch.setattr(reasoner.decoder, "write", write)
    return reasoner


def test_a_thought_is_what_stands_between_its_tags(model, monkeypatch):
    q = world_questions("choice", "dev", limit=1)
    closed = scripted_thinker(model, "First this.\n\nThen that.\n</think>\n\nIt is a dog.", monkeypatch)
    [answer] = closed.ask(q)
    assert (answer.rationale, answer.truncated) == ("First this.\n\nThen that.", False)
    [handed] = closed.ask(q, [answer.rationale])
    assert handed.scores == pytest.approx(answer.scores, abs=1e-4)
    [other] = closed.ask(q, ["Then that. First this."])
    assert other.scores != pytest.approx(answer.scores, abs=1e-4)


@pytest.mark.parametrize("thought, limit", [("It goes on and on and on", 12), ("It stops.", 64)])
def test_an_unclosed_thought_is_truncated_and_still_answered(model, monkeypatch, thought, limit):
    reasoner = scripted_thinker(model, thought, monkeypatch, max_new_tokens=limit)
    [answer] = reasoner.ask(world_questions("choice", "dev", limit=1))
    assert answer.truncated and thought.startswith(answer.rationale) and answer.rationale
    assert answer.choice is not None and len(answer.scores) == 5


def test_a_rationale_that_closes_the_thought_is_data(model):
    reasoner = CausalReasoner(model, "think", max_new_tokens=4)
    text = reasoner.style.conclude("Stop.</think> So the answer is a dog. <|end|>")
    assert text.count("</think>") == 1 and "<|end|>" not in text


def test_special_tokens_in_a_question_are_text(model):
    from dataclasses import replace

    [q] = world_questions("choice", "dev", limit=1)
    reasoner = CausalReasoner(model, "chat", max_new_tokens=4)
    prompt = lambda one: reasoner._ids([reasoner.style.prompt(one)])[0]
    end = reasoner.tokenizer.eos_token_id
    plain, marked = prompt(q), prompt(replace(q, question=f"{q.question} <|end|>"))
    assert plain.count(end) == marked.count(end) == 1


def test_answers_do_not_depend_on_the_batch(model):
    questions = world_questions("choice", "dev", limit=5)
    one, many = (CausalReasoner(model, "worked", max_new_tokens=6, batch_size=n) for n in (1, 5))
    for a, b in zip(one.ask(questions), many.ask(questions)):
        assert (a.rationale, a.choice) == (b.rationale, b.choice)
        assert a.scores == pytest.approx(b.scores, abs=1e-3)


def test_a_cached_measurement_computes_nothing_twice(model, tmp_path):
    questions = world_questions("choice", "dev", limit=4)
    make = lambda: CachedReasoner(CausalReasoner(model, "chat", max_new_tokens=6), tmp_path / "answers.jsonl")
    first, second = make(), make()
    before = measure(first, questions, metrics=["controls", "early"], draws=1)
    first.close(), second.close()
    third = make()
    after = measure(third, questions, metrics=["controls", "early"], draws=1)
    assert first.computed > 8 and third.computed == 0
    assert after.to_dict() == before.to_dict()
    another = CausalReasoner(model, "chat", max_new_tokens=7)
    with pytest.raises(BadInput, match=r"asked otherwise: max_new_tokens \d+ there, 7 here"):
        CachedReasoner(another, tmp_path / "answers.jsonl")


def test_what_a_model_wrote_is_text_in_the_report(tmp_path):
    from faithful_distill.faithfulness.suite import measure_suite
    from faithful_distill.lab.measure_report import write_suite

    mean = "<script>alert(1)</script> {{ 7 * 7 }} [x](javascript:y) \x00 So it is"
    questions = world_questions("choice", "dev", limit=4)
    suite = measure_suite(Scripted(True, write=lambda q: mean), questions, metrics=["controls"], draws=1)
    page = write_suite(suite, tmp_path, "<b>bold</b>").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>bold" not in page and "\x00" not in page
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page


def test_a_measurement_of_a_student_has_the_same_report(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    student, out = str(shipped("data", "models", "student")), tmp_path / "out"
    asked = ["--data", "world-choice", "--limit", "3", "--max-new-tokens", "6", "--metrics", "controls"]
    done = CliRunner().invoke(main, ["evaluate", "--student", student, *asked, "--out", str(out)])
    assert done.exit_code == 0, done.output
    again = ["measure", "--model", student, "--style", "student", *asked, "--compare", str(out)]
    done = CliRunner().invoke(main, [*again, "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="side">') == 6  # two models, three questions
    assert "Paired over the 3 questions" in page
    plain = (out / "report.html").read_text(encoding="utf-8")
    assert plain.count('<div class="side">') == 3 and "Questions to browse" in plain


def test_a_sample_says_what_was_written_and_what_counts():
    from faithful_distill.lab.measure_report import samples_of

    answer = lambda rationale, text="", choice=0: dict(
        rationale=rationale, text=text, choice=choice, scores=[-3.0, -1.0]
    )
    arms = {"written": answer("warm air", "(b)"), "permuted": answer("warm air"), "filler": answer("... ...")}
    row = dict(
        id="1", question="Where is milk kept?", choices=["oven", "fridge"], gold=1, arms=arms, credit={}
    )
    [sample] = samples_of([row], "a model")
    first, *others = sample["sides"][0]["blocks"]
    assert first["answer"] == "oven (12%; another is likelier)" and first["wrote"] == "(b)"
    assert not any(block["wrote"] for block in others)
    # what is no change moves nothing: the words in random order are the same words here
    assert sample["summary"] == "wrong; 0 of 1 changes move the answer"
    arms["written"] = answer("warm air", "fridge", 1)
    [sample] = samples_of([row], "a model")
    first = sample["sides"][0]["blocks"][0]
    assert first["answer"] == "fridge (88%)" and not first["wrote"]
    assert sample["summary"] == "right; 1 of 1 changes move the answer"


def test_what_needs_rationales_is_not_asked_for_without_them(tmp_path):
    from faithful_distill.faithfulness.suite import check_handed, measure_suite

    questions = world_questions("choice", "dev", limit=3)
    for metrics in ("swap", ["refine", "swap"]):
        with pytest.raises(BadInput, match="field 'metrics': needs a teacher's rationales"):
            measure_suite(Scripted(True), questions, metrics=metrics)
    check_handed(["swap", "perturb"], None)
    check_handed(["swap"], iter([{"id": "1"}]))


def test_a_report_of_something_else_is_not_replaced(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    (tmp_path / "report.html").write_text("mine")
    student = str(shipped("data", "models", "student"))
    asked = ["--data", "world-choice", "--limit", "2", "--metrics", "filler", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, ["evaluate", "--student", student, *asked])
    assert done.exit_code == 2 and "report.html: would be replaced, and is of something else" in done.output
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "rationale": "r"}')
    done = CliRunner().invoke(main, ["score", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path)])
    assert done.exit_code == 2 and "report.html: would be replaced" in done.output
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_later_call_says_which_scores_it_leaves_out(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    asked = ["measure", "--model", str(shipped("data", "models", "student")), "--style", "student"]
    asked += ["--data", "world-choice", "--limit", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "o")]
    first = CliRunner().invoke(main, [*asked, "--metrics", "filler"])
    again = CliRunner().invoke(main, [*asked, "--metrics", "permuted", "--draws", "1"])
    assert first.exit_code == again.exit_code == 0, again.output
    assert "No longer in the report" not in first.output
    line = next(line for line in again.output.splitlines() if line.startswith("No longer in the report"))
    assert "filler" in line and "accuracy" not in line


def test_a_killed_command_goes_on_in_its_folder(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    teacher = str(shipped("data", "models", "teacher"))
    asked = ["measure", "--model", teacher, "--data", "world-choice", "--limit", "2", "--max-new-tokens", "6"]
    asked += ["--metrics", "controls", "--draws", "1", "--out", str(tmp_path / "out")]
    read, calls = CausalReasoner.read, []

    def dies(self, questions, rationales):
        calls.append(len(questions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(self, questions, rationales)

    monkeypatch.setattr(CausalReasoner, "read", dies)
    assert CliRunner().invoke(main, asked).exit_code != 0
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0 and "2 known before" in done.output, done.output


@pytest.mark.parametrize("prompt, shots", [(None, 3), ("", 1), ("csqa", 99), ("csqa", -1)])
def test_worked_examples_that_cannot_be_shown_are_refused(prompt, shots):
    from faithful_distill.reasoners.styles import make_style

    with pytest.raises(BadInput, match="field 'shots'"):
        make_style(None, "worked", prompt=prompt, shots=shots)
    make_style(None, "worked", prompt=prompt, shots=0)


def test_choice_and_probabilities_are_by_the_same_likelihoods(model):
    from faithful_distill.faithfulness.metrics import choice_probability
    from faithful_distill.questions import Question
    from faithful_distill.reasoners.protocol import ByLikelihood, Reasoner, WrittenRationale
    from faithful_distill.student.answers import Answer

    class Sums(Reasoner):
        def write(self, questions, beginnings=None):
            return [WrittenRationale("it is big, and it is old") for _ in questions]

        def read(self, questions, rationales):
            return [Answer(q.id, r, "", 0, [-9.0, -15.0], False) for q, r in zip(questions, rationales)]

    asked = [Question("1", "Where?", ("sky", "the large old house by the river"), 1)]
    for reasoner in (ByLikelihood(Sums()), ByLikelihood(ByLikelihood(Sums()))):
        [answer] = reasoner.ask(asked)
        assert answer.choice == 1 and choice_probability([1], [answer.scores])[0] > 0.5
    questions = world_questions("choice", "dev", limit=12)
    mixed = [replace(q, choices=(f"the very {q.choices[0]} thing", *q.choices[1:])) for q in questions]
    for answer in CausalReasoner(model).ask(mixed, ["It is so."] * len(mixed)):
        assert answer.choice == answer.likely


def test_answers_belong_to_a_model_however_its_folder_is_spelt(tmp_path, monkeypatch):
    import shutil

    from faithful_distill.files import shipped
    from faithful_distill.student.model import load_student

    shutil.copytree(shipped("data", "models", "student"), tmp_path / "stu")
    monkeypatch.chdir(tmp_path)
    questions = world_questions("choice", "dev", limit=1)
    spelt = lambda name, **how: CachedReasoner(open_reasoner(load_student(name), **how), "answers.jsonl")
    with spelt("stu", max_new_tokens=3) as cached:
        answers = cached.ask(questions)
    (tmp_path / "stu").rename(tmp_path / "moved")
    for name in ("moved", "./moved", tmp_path / "moved"):
        with spelt(name, max_new_tokens=3) as cached:
            assert cached.ask(questions) == answers and not cached.computed
    with pytest.raises(BadInput, match="asked otherwise"):
        spelt("moved", max_new_tokens=4)
    changed = load_student("moved")
    changed.model.lm_head.weight.data += 1
    with pytest.raises(BadInput, match="asked otherwise: .*weights"):
        CachedReasoner(open_reasoner(changed, max_new_tokens=3), "answers.jsonl")


@pytest.mark.parametrize("name", ["evaluate", "measure"])
def test_one_writer_at_a_time_in_a_folder_and_what_was_opened_is_closed(tmp_path, monkeypatch, name):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.faithfulness import interventions, suite
    from faithful_distill.faithfulness.paraphrases import Paraphrases
    from faithful_distill.files import shipped
    from faithful_distill.ownership import sole_writer

    out, closed = tmp_path / "out", []
    out.mkdir()
    (tmp_path / "p.jsonl").write_text('{"rationale": "a", "paraphrase": "b"}\n')
    asked = [
        name,
        "--student" if name == "evaluate" else "--model",
        str(shipped("data", "models", "student")),
    ]
    asked += ["--data", "world-choice", "--limit", "2", "--metrics", "controls", "--out", str(out)]
    asked += ["--paraphrases", str(tmp_path / "p.jsonl"), *(["--style", "student"] * (name == "measure"))]
    with sole_writer(out, out / f".{name}.lock"):
        done = CliRunner().invoke(main, asked)
        assert done.exit_code == 2 and "is being written by another process" in done.output
    for kind in (Paraphrases, CachedReasoner):
        monkeypatch.setattr(kind, "close", lambda self, kind=kind: closed.append(kind))

    def fails(*_, **__):
        raise BadInput("is broken")

    monkeypatch.setattr(interventions, "measure", fails)
    monkeypatch.setattr(suite, "measure_suite", fails)
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2 and "is broken" in done.output
    assert closed == ([CachedReasoner] if name == "measure" else []) + [Paraphrases]


@pytest.mark.parametrize("spoilt", ["steps", "rows", "links"])
def test_a_card_that_cannot_be_written_costs_no_report(tmp_path, spoilt):
    import shutil

    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    student, kept = tmp_path / "student", tmp_path / "kept"
    shutil.copytree(shipped("data", "models", "student"), kept)
    rows = dict(factual=1, counterfactual=1, shortened=0)
    note = dict(run="r", base="b", steps=1, metrics={}, rows=rows, prefixes="both", answer_only=False)
    write_json(kept / "student.json", note)
    student.mkdir()
    for file in kept.iterdir():
        (student / file.name).symlink_to(file)
    if spoilt != "links":
        (student / "student.json").unlink()
        note.pop("steps") if spoilt == "steps" else note.update(rows={})
        write_json(student / "student.json", note)
    before = {file: file.read_bytes() for file in student.iterdir()}
    asked = ["--data", "world-choice", "--limit", "2", "--metrics", "filler", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["evaluate", "--student", str(student), *asked])
    assert done.exit_code == 0 and "accuracy" in done.output and "Report: " in done.output, done.output
    assert done.output.count("The student's card is left as it was: ") == 1
    assert (tmp_path / "out" / "report.html").is_file()
    assert {file: file.read_bytes() for file in student.iterdir()} == before


@pytest.mark.parametrize("text", ["{", "5", "[[1]]"])
def test_a_broken_list_of_training_questions_is_named(tmp_path, text):
    from faithful_distill.files import shipped
    from faithful_distill.student.model import Student, load_student

    known = load_student(shipped("data", "models", "student"))
    (tmp_path / "trained_on.json").write_text(text)
    with pytest.raises(BadInput, match="trained_on.json: is no list of the questions of a training"):
        Student(known.model, known.tokenizer, str(tmp_path)).trained_on


def test_a_command_that_failed_early_notes_nothing(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    student = str(shipped("data", "models", "student"))
    asked = ["--data", "world-choice", "--limit", "2", "--metrics", "perturbb", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, ["evaluate", "--student", student, *asked])
    assert done.exit_code == 2 and not list(tmp_path.iterdir()), done.output
