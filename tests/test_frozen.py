"""Frozen readers as simulators: pooling, cache and head against plain computations, null checks, names."""

import logging
import random

import numpy as np
import pytest

from faithful_distill.faithfulness.evaluators import measure_rev, rora_lite
from faithful_distill.faithfulness.frozen import Encoder, LanguageModel, mean_pooled
from faithful_distill.faithfulness.scoring import score_rationales
from faithful_distill.faithfulness.simulator_registry import (
    Embeddings,
    Likelihood,
    as_simulator,
    default_simulator,
    model_at_hand,
    register_simulator,
    simulators,
)
from faithful_distill.faithfulness.simulators import ModelBehaviour, simulate, simulate_folds, try_las
from faithful_distill.faithfulness.vector_cache import VectorCache, text_key
from faithful_distill.files import BadInput
from faithful_distill.hashes import model_identity
from faithful_distill.questions import Question
from faithful_distill.student.model import tiny_student

things = "lamp chair spoon river candle ladder violin pepper anchor button mirror pencil".split()


def bag_of_words(texts):
    "Unit vectors of the things that a text names: a stub of an embedding model."
    rows = np.array([[t.lower().split().count(w) for w in things] for t in texts], float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)


def behaviour(n=300, named=0.7, seed=0):
    "Predictions at random, named by a share of the rationales; the others name a thing that is no choice."
    rng, questions, rationales, predictions = random.Random(seed), [], [], []
    for i in range(n):
        *choices, other = rng.sample(things, 4)
        y = rng.randrange(3)
        questions.append(Question(str(i), f"What is meant by number {i} ?", tuple(choices), rng.randrange(3)))
        rationales.append(f"he wants the {choices[y] if rng.random() < named else other} now")
        predictions.append(y)
    return ModelBehaviour(questions, rationales, predictions)


def encoder_folder(folder, seed=0, positions=40):
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = tiny_student([*things, "the of a what is meant"]).tokenizer
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- embeddings


def test_mean_pooling_is_the_plain_mean_of_length_one():
    import torch

    states, lengths = torch.randn(5, 7, 4), [7, 1, 3, 5, 2]
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    found = mean_pooled(states, mask)
    for i, n in enumerate(lengths):
        mean = sum(states[i, k] for k in range(n)) / n
        assert torch.allclose(found[i], mean / mean.norm(), atol=1e-6)


def test_an_encoder_reads_each_text_as_if_it_were_alone(tmp_path):
    import torch

    encoder = Encoder(encoder_folder(tmp_path), cache=False, device="cpu")
    texts = ["the lamp", "", "a chair of the river", " ".join(things * 9)]
    found = encoder(texts)
    assert not found[1].any() and encoder.max_length == 40
    for text, vector in zip(texts, found):
        if text:
            *ids, end = encoder.tokenizer(text)["input_ids"]
            with torch.inference_mode():
                mean = encoder.model(torch.tensor([[*ids[:39], end]])).last_hidden_state[0].mean(0)
            assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


# ---- the cache


def test_a_text_is_read_once_and_another_text_or_model_is_another_key(tmp_path):
    first = Encoder(encoder_folder(tmp_path / "a"), cache=tmp_path / "cache", device="cpu")
    vectors, [folder] = first(["the lamp", "a chair"]), list((tmp_path / "cache").iterdir())
    again = Encoder(tmp_path / "a", cache=tmp_path / "cache", device="cpu")
    again._embed = None  # nothing is left to be computed
    assert np.array_equal(again(["a chair", "the lamp"]), vectors[::-1])
    with pytest.raises(TypeError):
        again(["the lamps"])
    assert text_key("the lamp") != text_key("the lamps")

    other = Encoder(encoder_folder(tmp_path / "b", seed=1), cache=tmp_path / "cache", device="cpu")
    assert not np.allclose(other(["the lamp", "a chair"]), vectors)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    keys = {
        model_identity(m.model, m.tokenizer, *how, n=16)
        for m in (first, other)
        for how in (("mean", 40), ("mean", 8))
    }
    assert len(keys) == 4 and folder.name in keys


@pytest.mark.parametrize("torn", [b"", b"PK\3\4 no zip", None, "other"])
def test_a_torn_file_is_computed_again_and_then_whole(tmp_path, torn):
    asked = []

    def lengths(texts):
        asked.append(list(texts))
        return [[len(t)] for t in texts]

    VectorCache(tmp_path).vectors(["a", "bb"], lengths)
    [file] = tmp_path.iterdir()
    if torn == "other":
        np.savez(file, keys=np.array([text_key("a"), text_key("bb")]), vectors=np.array([[1.0], [np.nan]]))
    else:
        file.write_bytes(file.read_bytes()[:-30] if torn is None else torn)
    for _ in range(2):
        assert VectorCache(tmp_path).vectors(["a", "bb"], lengths).tolist() == [[1], [2]]
    assert asked == [["a", "bb"]] * 2 and list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_says_so_and_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = VectorCache(tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING, "faithful_distill"):
        found = cache.vectors(["a", "bb", "ccc"], lambda texts: [[len(t)] for t in texts], part=1)
    assert found.tolist() == [[1], [2], [3]] and caplog.text.count("are not kept") == 1


# ---- likelihood


def test_likelihoods_are_those_of_one_text_at_a_time(tmp_path):
    import torch

    tiny = tiny_student([*things, "the of a what is meant So answer"], "llama")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, cache=False, device="cpu")
    contexts = ["So the answer is", "what is meant by the lamp of the river So the answer is"]
    pairs = [(c, t) for c in contexts for t in ("lamp", "the violin of a chair", "river spoon")]
    for found, (context, choice) in zip(model(pairs), pairs):
        before, after = (tiny.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, choice))
        with torch.inference_mode():
            log_p = tiny.model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        plain = [log_p[len(before) - 1 + k, token].item() for k, token in enumerate(after)]
        assert found == pytest.approx(np.mean(plain), abs=1e-5)


# ---- as simulators


@pytest.mark.parametrize("head", [False, True])
def test_a_frozen_reader_that_finds_the_named_choice_is_at_the_ceiling(head):
    e = behaviour(named=1.0)
    s = simulate_folds(Embeddings(bag_of_words, head), e, seeds=(0, 1, 2))
    assert s.predictions("xr").shape == (1, 300), "the seed makes no difference"
    las = s.scores(draws=200)["las"]
    assert las.details["acc_xr"] == las.details["acc_r"] == 1 and las.details["unadjusted"].value > 0.5
    shuffled = ModelBehaviour(e.questions, e.rationales[1:] + e.rationales[:1], e.predictions)
    gain = simulate_folds(Embeddings(bag_of_words, head), shuffled).scores(draws=400)["las"]
    assert gain.details["unadjusted"].low <= 0 <= gain.details["unadjusted"].high


@pytest.mark.parametrize("head", [False, True])
def test_empty_rationales_change_nothing(head):
    e = behaviour()
    empty = ModelBehaviour(e.questions, [""] * len(e.questions), e.predictions)
    read = simulate(Embeddings(bag_of_words, head), e, empty).read[0]
    if not head:  # a head may weigh a question that stands alone in another way
        assert all(np.allclose(a, b) for a, b in zip(read["xr"], read["x"]))
    assert all(np.ptp(row) < 1e-9 for row in read["r"])


def test_null_checks_of_permuted_predictions():
    e = behaviour(400)
    asked = simulate_folds(Embeddings(bag_of_words), e, permute_labels=True)
    gain = asked.scores(draws=400)["las"].details["unadjusted"]
    assert sorted(asked.y) == sorted(e.predictions) and asked.y != e.predictions
    assert gain.low <= 0 <= gain.high
    learned = simulate_folds(Embeddings(bag_of_words, head=True), e, permute_labels=True)
    null, true = (
        s.scores(draws=400)["las_probability"].details["unadjusted"].value
        for s in (learned, simulate_folds(Embeddings(bag_of_words, head=True), e))
    )
    assert abs(null) < 0.03 < 0.3 < true


def test_a_head_learns_which_part_is_worth_reading():
    e = behaviour()
    misled = [f"{q.question} {q.choices[(y + 1) % 3]}" for q, y in zip(e.questions, e.predictions)]
    questions = [Question(q.id, t, q.choices, q.answer) for q, t in zip(e.questions, misled)]
    e = ModelBehaviour(questions, e.rationales, e.predictions)
    plain, head = (simulate_folds(Embeddings(bag_of_words, h), e).scores(draws=50)["las"] for h in (0, 1))
    assert head.details["acc_xr"] > plain.details["acc_xr"] + 0.1, "the question names a wrong choice"
    assert plain.details["acc_x"] == 0 and head.details["acc_x"] > 0.2, (
        "it avoids what is named; ties go to the first"
    )
    assert head.details["acc_r"] > 0.6


def test_rev_and_rora_take_frozen_readers():
    e = behaviour(200)
    half = e.part(range(100)), e.part(range(100, 200))
    said = lambda q, i: "he said so"
    assert measure_rev(Embeddings(bag_of_words, True), *half, restate=said, draws=100).value > 0.3
    guarded = rora_lite(Embeddings(bag_of_words, True), *half, draws=100)
    bare = rora_lite(Embeddings(bag_of_words, True), *half, rounds=0, draws=100)
    assert bare.value > 0.3 > abs(guarded.value) and guarded.details["masked"] > 0.1


# ---- accuracy on gold labels


def test_gold_accuracy_stands_beside_las_and_chance_is_said(caplog):
    e = behaviour(named=1.0)
    right = ModelBehaviour(
        [Question(q.id, q.question, q.choices, y) for q, y in zip(e.questions, e.predictions)],
        e.rationales,
        e.predictions,
    )
    with caplog.at_level(logging.WARNING, "faithful_distill"):
        good = simulate_folds(Embeddings(bag_of_words), right).scores(draws=200)
        assert good["simulator_gold"].value == 1 and "chance" not in caplog.text
        assert good["simulator_gold"].details["chance"] == pytest.approx(1 / 3)
        assert good["simulator_gold_x"].value < 0.5
        poor = simulate_folds(Embeddings(bag_of_words), e).scores(draws=200)
    assert 0.2 < poor["simulator_gold"].value < 0.45 and "the simulator is at chance" in caplog.text
    unknown = [Question(q.id, q.question, q.choices, None) for q in e.questions]
    none = simulate_folds(Embeddings(bag_of_words), ModelBehaviour(unknown, e.rationales, e.predictions))
    assert none.scores(draws=50)["simulator_gold"].reason == "no gold answers are given"
    few = try_las(Embeddings(bag_of_words), e.part(range(5)))
    assert "too few answers" in few["simulator_gold"].reason


def test_score_takes_a_simulator_by_name_and_reports_its_accuracy(tmp_path):
    from faithful_distill.lab.score_report import write_scored

    e = behaviour(90)
    rows = [
        dict(id=q.id, question=q.question, choices=list(q.choices), gold=q.answer, prediction=y, rationale=r)
        for q, r, y in zip(e.questions, e.rationales, e.predictions)
    ]
    try:
        register_simulator("things")(lambda model, texts: Embeddings(bag_of_words, head=True))
        scored = score_rationales(rows, simulator="things", parts=2, interval=dict(draws=100))
    finally:
        del simulators["things"]
    assert scored.scores["las"].details["acc_xr"] > 0.6 and scored.scores["rev"].value is not None
    assert scored.scores["simulator_gold"].n == 90 and "head" in scored.facts["simulator"]
    assert scored.facts["simulators"].startswith("1 seed,")
    text = write_scored(scored, tmp_path).read_text(encoding="utf-8")
    assert "gold answer" in text


# ---- names and bad input


def test_names(tmp_path, monkeypatch):
    monkeypatch.setenv("FAITHFUL_DISTILL_CACHE", str(tmp_path))
    assert default_simulator() == "scratch"
    for name in ("embeddings", "embeddings+head", "likelihood", "fine-tuned"):
        with pytest.raises(BadInput, match=f"needs a model.*{name.split('+')[0]}") as caught:
            as_simulator(name)
        assert "\n" not in str(caught.value)
        assert model_at_hand(name) is None
    folder = tmp_path / "all-minilm-l6-v2"
    encoder_folder(folder)
    assert default_simulator() != "scratch" and as_simulator("embeddings").model == str(folder)
    assert as_simulator("fine-tuned") == str(folder) and as_simulator("owner/name") == "owner/name"
    assert as_simulator("embeddings:owner/name").model == "owner/name"
    assert isinstance(as_simulator("likelihood:x"), Likelihood)


def test_a_bad_folder_is_one_line(tmp_path, monkeypatch):
    e = behaviour(60)
    monkeypatch.chdir(tmp_path)  # a long value is shortened in the error
    (tmp_path / "empty").mkdir()
    encoder_folder(tmp_path / "half")
    whole = (tmp_path / "half" / "model.safetensors").read_bytes()
    (tmp_path / "half" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    t5 = tiny_student(things)
    t5.model.save_pretrained(tmp_path / "t5")
    t5.tokenizer.save_pretrained(tmp_path / "t5")
    for name in ("embeddings", "likelihood"):
        for folder in ("empty", "half", "t5", "missing"):
            with pytest.raises(BadInput) as caught:
                simulate_folds(f"{name}:./{folder}", e)
            assert "\n" not in str(caught.value) and folder in str(caught.value), str(caught.value)
    assert "no simulator could be trained" in try_las(f"embeddings:{tmp_path / 'empty'}", e)["las"].reason


# ---- a real model


def test_minilm_tells_reasons_from_noise(tmp_path):
    from faithful_distill.files import cache_folder

    if (folder := model_at_hand("embeddings")) is None:
        pytest.skip(f"all-minilm-l6-v2 is not in {cache_folder()}")
    asked = [
        ("Where does one keep money?", ("bank", "river", "oven"), "it is safe with an account and a clerk"),
        ("Where do fish live?", ("cupboard", "lake", "desert"), "they need fresh water to swim in"),
        ("What do you sit on?", ("cloud", "soup", "chair"), "a piece of furniture with four legs and a back"),
    ]
    e = ModelBehaviour(
        [Question(str(i), q, c, i) for i, (q, c, _) in enumerate(asked)], [r for *_, r in asked], [0, 1, 2]
    )
    s = simulate(Embeddings(str(folder), cache=tmp_path), e, e)
    assert s.predictions("xr").tolist() == [[0, 1, 2]] and s.predictions("r").tolist() == [[0, 1, 2]]
