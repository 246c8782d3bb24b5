"""Models behind a server: the same as in memory, and what happens when the server is busy, dies, lies or cuts texts."""

import json
import math
import os
import signal
import threading

import pytest

pytest.importorskip("openai")

from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.loopback import serve_locally
from faithful_distill.lab.world import world_questions
from faithful_distill.reasoners.opening import open_reasoner
from faithful_distill.reasoners.served import ServedReasoner, label_scores, sample_scores
from faithful_distill.replies import Reply
from faithful_distill.served import ServedModel
from faithful_distill.teacher.loading import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(shipped("data", "models", "teacher"))


@pytest.fixture(scope="module")
def questions():
    return world_questions("choice", "dev", limit=4)


def no_log_p(asked, response):
    response["choices"][0].pop("logprobs", None)
    return response


def measured(model, out, *more):
    asked = ["--data", "world-choice", "--split", "dev", "--limit", "4", "--metrics", "perturb,early"]
    asked += ["--style", "worked", "--max-new-tokens", "10", "--draws", "1", "--out", str(out)]
    return CliRunner().invoke(main, ["measure", "--model", model, *asked, *more])


def test_measured_behind_a_server_as_in_memory(teacher, tmp_path):
    local = measured(str(shipped("data", "models", "teacher")), tmp_path / "local")
    with serve_locally(teacher) as url:
        served = measured(url, tmp_path / "served", "--tokenizer", str(shipped("data", "models", "teacher")))
        # a second call has every answer, and asks the server for none of them
        sent = len((tmp_path / "served" / "requests.jsonl").read_text().splitlines())
        again = measured(url, tmp_path / "served", "--tokenizer", str(shipped("data", "models", "teacher")))
    assert local.exit_code == served.exit_code == again.exit_code == 0, served.output
    scores = [json.loads((tmp_path / d / "metrics.json").read_text()) for d in ("local", "served")]
    assert scores[0].keys() == scores[1].keys()
    for name, one in scores[0].items():
        assert one["value"] == pytest.approx(scores[1][name]["value"], abs=1e-3), name
    assert "0 answers computed" in again.output
    assert len((tmp_path / "served" / "requests.jsonl").read_text().splitlines()) == sent
    facts = json.loads((tmp_path / "served" / "facts.json").read_text())
    assert "requests" in facts["notes"] and facts["reads"] == "echo"


def test_a_spent_budget_loses_nothing(teacher, tmp_path):
    with serve_locally(teacher) as url:
        first = measured(url, tmp_path / "o", "--budget", "900")
        kept = len((tmp_path / "o" / "requests.jsonl").read_text().splitlines())
        assert first.exit_code == 2 and "budget" in first.output and "Traceback" not in first.output
        assert kept > 3
        second = measured(url, tmp_path / "o")
        assert second.exit_code == 0, second.output
        measured(url, tmp_path / "whole")
    both = [(tmp_path / d / "metrics.json").read_text() for d in ("o", "whole")]
    assert both[0] == both[1]
    lines = {d: len((tmp_path / d / "requests.jsonl").read_text().splitlines()) for d in ("o", "whole")}
    assert lines["o"] == lines["whole"]  # nothing was asked twice


def test_a_server_that_dies_and_comes_back(teacher, questions, tmp_path):
    calls = []

    def dies(asked, response):
        calls.append(asked)
        if len(calls) > 9:
            raise ConnectionError

    with serve_locally(teacher, dies) as url:
        port = int(url.split(":")[-1].split("/")[0])
        model = ServedModel(url, cache=tmp_path / "c.jsonl", retries=0, concurrency=2)
        reasoner = ServedReasoner(model, "worked", max_new_tokens=8)
        with pytest.raises(BadInput, match="does not answer after 1 tries.*call again"):
            reasoner.ask(questions)
        model.close()
    kept = len((tmp_path / "c.jsonl").read_text().splitlines())
    assert kept == 9
    with serve_locally(teacher, port=port) as url:
        model = ServedModel(url, cache=tmp_path / "c.jsonl")
        answers = ServedReasoner(model, "worked", max_new_tokens=8).ask(questions)
        plain = ServedReasoner(url, "worked", max_new_tokens=8).ask(questions)
        model.close()
    assert answers == plain and model.usage.cached >= 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(teacher, status):
    turned_away = iter(range(2))
    fault = lambda *_: (status, {"message": "busy"}) if next(turned_away, None) is not None else None
    with serve_locally(teacher, fault) as url:
        model = ServedModel(url, retries=3)
        reply = model.complete(["Q: Who"], 2)[0]
    assert reply.text and model.usage.retries == 2
    with serve_locally(teacher, lambda *_: (status, {"message": "busy"})) as url:
        with pytest.raises(BadInput, match="after 2 tries: .*busy"):
            ServedModel(url, retries=1).complete(["Q: Who"], 2)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "wants another key"), (403, "wants another key"), (404, "does not have that")]
)
def test_refusals_are_not_asked_again(teacher, status, words):
    asked = []

    def fault(body, _):
        asked.append(body)
        return status, {"message": "no"}

    with serve_locally(teacher, fault) as url, pytest.raises(BadInput, match=words):
        ServedModel(url).complete(["Q: Who"], 2)
    assert len(asked) == 1


def test_the_key_is_written_nowhere(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serve_locally(teacher) as url:
        result = measured(url, tmp_path / "o")
    assert result.exit_code == 0, result.output
    for file in (tmp_path / "o").rglob("*"):
        assert not file.is_file() or b"very-secret" not in file.read_bytes(), file
    assert "very-secret" not in result.output


def test_a_reply_that_is_no_json_or_has_no_choice(teacher):
    with serve_locally(teacher, lambda *_: {"choices": []}) as url:
        with pytest.raises(BadInput, match="without a choice"):
            ServedModel(url).complete(["Q: Who"], 2)
    with pytest.raises(BadInput, match="does not answer"):
        ServedModel("http://127.0.0.1:9", retries=0)


def test_text_cut_early_counts_as_truncated(teacher, questions):
    def cut(asked, response):
        response["choices"][0] |= {"text": " A cup", "finish_reason": "length"}
        return response

    with serve_locally(teacher, cut) as url:
        reasoner = ServedReasoner(url, "worked", reads="samples", samples=2)
        assert [one.truncated for one in reasoner.write(questions)] == [True] * 4


def test_a_question_too_long_is_counted_and_the_others_answered(teacher, questions):
    long = questions[0].question

    def fault(asked, response):
        if long in asked["prompt"]:
            return 400, {"message": "maximum context length is 10 tokens"}

    with serve_locally(teacher, fault) as url:
        reasoner = ServedReasoner(url, "worked", max_new_tokens=6)
        answers = reasoner.ask(questions)
        read = reasoner.read(questions, ["a"] * 4)
    assert "maximum context" in answers[0].problem and answers[0].choice is None
    assert all(a.choice is not None and not a.problem for a in answers[1:])
    assert read[0].problem and not any(a.problem for a in read[1:])


def chatted(thought="", content="It is a dish. So the answer is waiter.", final="(a)"):
    seen = []

    def fault(asked, response):
        seen.append(asked["messages"])
        asks = asked["messages"][-1]["content"].startswith("So what")
        message = {"content": final if asks else content}
        if thought and not asks:
            message["reasoning_content"] = thought
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    return fault, seen


def test_a_chat_hands_the_rationale_over_as_a_turn(teacher, questions):
    fault, seen = chatted()
    with serve_locally(teacher, fault) as url:
        reasoner = open_reasoner(url, system="Be brief.", samples=3)
        answers = reasoner.ask(questions[:1], ["Cups break."])
    assert reasoner.reads == "samples" and answers[0].choice == 0
    assert math.exp(answers[0].scores[0]) == pytest.approx(3.5 / 5.5)
    roles = [m["role"] for m in seen[-1]]
    assert roles == ["system", "user", "assistant", "user"] and seen[-1][2]["content"] == "Cups break."
    assert "continue" in reasoner.unable


def test_a_thought_of_its_own_field_or_between_tags(teacher, questions):
    for how in (dict(thought="It is a dish."), dict(content="<think>It is a dish.</think>\nwaiter")):
        fault, _ = chatted(**how)
        with serve_locally(teacher, fault) as url:
            written = open_reasoner(url, "think", samples=1).write(questions[:1])
        assert (written[0].text, written[0].truncated) == ("It is a dish.", False)
    fault, _ = chatted(content="<think>It is a dish")
    with serve_locally(teacher, fault) as url:
        written = open_reasoner(url, "think", samples=1).write(questions[:1])
    assert (written[0].text, written[0].truncated) == ("It is a dish", True)


def test_samples_differ_and_repeat(teacher, questions):
    with serve_locally(teacher, no_log_p) as url:
        model = ServedModel(url)
        texts = [r.text for r in model.complete(["Q: Who"] * 6, 6, temperature=1.0, seeds=range(6))]
        again = ServedModel(url).complete(["Q: Who"] * 6, 6, temperature=1.0, seeds=range(6))
    assert len(set(texts)) > 2 and [r.text for r in again] == texts


def test_labels_of_every_spelling(questions):
    q = questions[0]
    flat = label_scores(q, [(" (c", -0.1)])
    assert max(range(5), key=flat.__getitem__) == 2 and flat[0] == flat[1] < flat[2]
    assert label_scores(q, [(" ", -0.1), ("(", -3.0)]) is None
    assert sample_scores([], 2) == [math.log(0.5)] * 2


def test_no_reply_is_taken_for_another_models(teacher, tmp_path):
    with serve_locally(teacher) as url:
        one = ServedModel(url, cache=tmp_path / "c.jsonl")
        one.complete(["Q: Who"], 2)
        one.requests.connection.model = "another"
        before = one.usage.requests
        one.complete(["Q: Who"], 2)
        assert one.usage.requests == before + 1
        one.close()


def test_foreign_cache_is_left_alone(teacher, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\n')
    with serve_locally(teacher) as url, pytest.raises(BadInput, match="not a journal"):
        ServedModel(url, cache=tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}\n'
    assert Reply().problem == ""


def test_a_server_that_does_not_answer_the_probe_is_no_server_without_log_probabilities(teacher, tmp_path):
    with serve_locally(teacher) as url:
        model = ServedModel(url, budget=1)
        model.complete(["Q: Who"], 2)
        with pytest.raises(BadInput, match="is spent"):
            ServedReasoner(model, "worked")


def test_a_refused_request_is_sent_again_by_a_later_call(teacher, tmp_path):
    short = lambda asked, _: (400, {"message": "too long"}) if "long" in asked["prompt"] else None
    asked = ["Q: Who", "Q: a long one"]
    with serve_locally(teacher, short) as url:
        port = int(url.split(":")[-1].split("/")[0])
        model = ServedModel(url, cache=tmp_path / "c.jsonl")
        assert [bool(r.problem) for r in model.complete(asked, 2)] == [False, True]
        model.close()
    with serve_locally(teacher, port=port) as url:
        model = ServedModel(url, cache=tmp_path / "c.jsonl")
        assert [r.problem for r in model.complete(asked, 2)] == ["", ""]
        assert (model.usage.requests, model.usage.cached) == (1, 1)
        model.close()


def test_samples_without_seeds_differ_and_repeat(teacher, tmp_path):
    kept = []
    with serve_locally(teacher) as url:
        for again in (False, True):
            with ServedModel(url, cache=tmp_path / "c.jsonl") as model:
                replies = [model.complete(["Q: What"] * 5, 6, temperature=1.0)]
                replies += [model.chat([[{"role": "user", "content": "Hi"}]] * 5, 6, temperature=1.0)]
                assert [len({r.text for r in some}) > 1 for some in replies] == [True, True]
                assert model.usage.requests == (0 if again else 10)
                kept.append(replies)
            assert model.requests.journal.file.closed
    assert kept[0] == kept[1]


def test_a_refused_request_costs_nothing(teacher):
    with serve_locally(teacher, lambda *_: (400, {"message": "too long"})) as url:
        model = ServedModel(url, budget=10)
        replies = [model.complete([f"{i} {'x' * 4000}"], 2)[0] for i in range(2)]
    assert [r.problem for r in replies] == ["too long"] * 2
    assert model.usage.tokens == 0 and model.usage.requests == 2


def test_an_interrupt_waits_for_no_request_and_what_still_comes_is_kept(teacher, tmp_path):
    reached, goes_on = threading.Event(), threading.Event()

    def slow(asked, response):
        reached.set()
        goes_on.wait(60)

    def interrupt():
        reached.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    with serve_locally(teacher, slow) as url:
        model = ServedModel(url, cache=tmp_path / "c.jsonl", concurrency=1)
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background ignores it
        threading.Thread(target=interrupt).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                model.complete(["Q: Who", "Q: What"], 2)
        finally:
            signal.signal(signal.SIGINT, before)
        assert not goes_on.is_set() and not model.requests.known
        goes_on.set()
        assert model.complete(["Q: Who"], 2)[0].text
        model.close()
    assert model.usage.requests <= 2
