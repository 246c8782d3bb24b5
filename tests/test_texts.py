"""Teachers known by their texts: a contrast of whole rationales equals the rule by hand; nothing is lost on the way."""

import json

import pytest

pytest.importorskip("openai")
import torch
from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.loopback import serve_locally
from faithful_distill.lab.world import world_questions
from faithful_distill.served import ServedModel
from faithful_distill.teacher.loading import load_teacher
from faithful_distill.teacher.prompts import context
from faithful_distill.teacher.rationales import rationalize
from faithful_distill.teacher.selection import rejected_path
from faithful_distill.teacher.texts import ServedTeacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(shipped("data", "models", "teacher"))


@pytest.fixture(scope="module")
def questions():
    return world_questions("choice", "dev", limit=2)


def log_p(teacher, prompt, text):
    "Log-probability of a text after a prompt, one forward pass, from the equation."
    n, ids = len(teacher.tokenizer(prompt).input_ids), teacher.tokenizer(prompt + text).input_ids
    with torch.inference_mode():
        p = teacher.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(p[i - 1, ids[i]].item() for i in range(n, len(ids)))


@pytest.mark.parametrize("strategy", ["contrastive-wrong", "contrastive-all-wrong", "contrastive-empty"])
def test_the_kept_rationale_is_the_best_by_the_equation(teacher, questions, tmp_path, strategy):
    out = tmp_path / "r.jsonl"
    with serve_locally(teacher) as url:
        kept = rationalize(url, questions, strategy, samples=4, max_new_tokens=12, out=out)
    rejected = [json.loads(line) for line in rejected_path(out).read_text().splitlines()]
    assert len(kept) == 4 and len(rejected) == 12
    for r in kept:
        q, others = r.as_question(), r.perturbed
        if strategy == "contrastive-empty":
            others = [None]
        others = others if isinstance(others, (tuple, list)) else [others]
        texts = [r.rationale] + [o["rationale"] for o in rejected if (o["id"], o["role"]) == (r.id, r.role)]

        def score(text):
            against = [log_p(teacher, context(q, i), f" {text}") for i in others]
            return log_p(teacher, context(q, r.target), f" {text}") - 0.5 * sum(against) / len(against)

        assert score(r.rationale) == pytest.approx(max(map(score, texts)), abs=1e-2)
        assert r.extra["selection"]["score"] == pytest.approx(score(r.rationale), abs=1e-2)


def test_a_call_that_was_cut_off_asks_only_what_is_missing(teacher, questions, tmp_path):
    out, many = tmp_path / "r.jsonl", world_questions("choice", "dev", limit=20)
    how = dict(samples=2, max_new_tokens=4, out=out, roles=["gold"])
    with serve_locally(teacher) as url:
        with pytest.raises(BadInput, match="budget"):
            rationalize(ServedTeacher(ServedModel(url, budget=4000)), many, "contrastive-wrong", **how)
        partial = (tmp_path / "r.jsonl.partial").read_text().splitlines()
        assert len(partial) == 32
        rest, whole = ServedModel(url), ServedModel(url)
        kept = rationalize(ServedTeacher(rest), many, "contrastive-wrong", **how)
        again = rationalize(
            ServedTeacher(whole), many, "contrastive-wrong", **how | {"out": tmp_path / "w.jsonl"}
        )
    assert [r.rationale for r in kept] == [r.rationale for r in again]
    assert rest.usage.requests < whole.usage.requests / 3


def test_a_server_without_log_probabilities_cannot_contrast(teacher, questions):
    def keeps(asked, response):
        response["choices"][0].pop("logprobs", None)
        return response

    with serve_locally(teacher, keeps) as url:
        with pytest.raises(BadInput, match="cannot contrast: it gives no log-probabilities"):
            rationalize(url, questions, "contrastive-wrong", samples=2, max_new_tokens=4)
        assert len(rationalize(url, questions, "sampled", max_new_tokens=4)) == 4


def test_a_question_that_does_not_fit_is_named(teacher, questions):
    fault = lambda asked, _: (
        (400, {"message": "too long"}) if questions[1].question in asked["prompt"] else None
    )
    with serve_locally(teacher, fault) as url, pytest.raises(BadInput, match="too long") as e:
        rationalize(url, questions, "greedy", roles=["gold"], max_new_tokens=4)
    assert questions[1].id in str(e.value)


def test_control_words_in_a_question_are_parted(teacher, questions):
    from dataclasses import replace

    seen = []
    q = replace(questions[0], question="Who says <|im_end|>?")
    with serve_locally(teacher, lambda asked, _: seen.append(asked["prompt"])) as url:
        rationalize(url, [q], "greedy", roles=["gold"], max_new_tokens=2)
    assert seen and all("<|im_end|>" not in prompt and "< |im_end|>" in prompt for prompt in seen)


def test_by_the_command_line(teacher, tmp_path):
    asked = [
        "--data",
        "world-choice",
        "--split",
        "dev",
        "--limit",
        "2",
        "--samples",
        "2",
        "--max-new-tokens",
        "6",
    ]
    with serve_locally(teacher) as url:
        rationales = ["rationales", "--teacher", url, *asked, "--out", str(tmp_path / "r.jsonl")]
        tried = CliRunner().invoke(main, [*rationales, "--dry-run"])
        result = CliRunner().invoke(main, rationales)
    assert tried.exit_code == 0 and "tokens are sent" in tried.output, tried.output
    assert result.exit_code == 0 and "Kept by contrast: 4 of 8 samples" in result.output, result.output
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert all(row["teacher"].startswith("teacher at 127.0.0.1:") for row in rows)


def test_contrast_is_not_for_a_teacher_at_hand(teacher, questions):
    with pytest.raises(BadInput, match="known by their texts alone"):
        rationalize(teacher, questions, "contrastive-wrong", samples=2, select="contrast")
