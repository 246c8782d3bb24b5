"Rows read as branches of one tree, against one forward pass per text."

import random

import pytest
import torch

from faithful_distill import prefix_tree
from faithful_distill.prefix_tree import PrefixTree, Root, clusters_by_prefix, passes, refused, windows
from faithful_distill.questions import Question
from faithful_distill.reasoners import causal
from faithful_distill.student.answers import answer
from faithful_distill.student.model import tiny_student

KINDS = ["llama", "gpt2", "gpt_neox", "qwen2"]
EOS = 1


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_student([f"word{i}" for i in range(60)], request.param, initializer_range=0.3).model


def drawn(rng, n):
    return [rng.randrange(2, 60) for _ in range(n)]


def rows_of(rng, shots):
    "Ragged rows: worked examples in front of questions with many arms; arms that go on from one another, and twice the same."
    shots, contexts = drawn(rng, shots), []
    for _ in range(2):
        question, reason = drawn(rng, rng.randrange(1, 20)), drawn(rng, 15)
        contexts += [shots + question + reason[:k] for k in (0, 4, 9, 15, 15)]
        contexts += [shots + question + drawn(rng, rng.randrange(1, 9)) for _ in range(2)]
    rng.shuffle(contexts)
    first = drawn(rng, 3)
    return contexts, [[[*first[:k], EOS] for k in (1, 2, 3)] + [[*drawn(rng, 2), EOS]] for _ in contexts]


def likelihood(model, context, tail):
    "By one forward pass; and are all tokens of the tail the likeliest?"
    logits = model(torch.tensor([context + tail[:-1]])).logits[0, -len(tail) :]
    return float(logits.log_softmax(-1)[range(len(tail)), tail].sum()), logits.argmax(-1).tolist() == tail


def continuation(model, context, limit):
    "By one forward pass a token."
    new = []
    while len(new) < limit:
        new.append(int(model(torch.tensor([context + new])).logits[0, -1].argmax()))
        if new[-1] == EOS:
            return new[:-1], True
    return new, False


@pytest.mark.parametrize("shots, chunk, apart", [(5, 1024, False), (30, 1024, False), (30, 7, True)])
def test_a_tree_scores_and_writes_as_one_text_at_a_time_does(model, shots, chunk, apart, monkeypatch):
    "Also where every row stands alone, in passes of a few tokens, and for texts that were just written: those are read no second time."
    rng = random.Random(shots + chunk)
    contexts, choices = rows_of(rng, shots)
    limits = [rng.randrange(0, 9) for _ in contexts]
    monkeypatch.setattr(Root, "chunk", chunk)
    with torch.inference_mode():
        root = Root(model, contexts, 200)
        assert bool(root.ids) == (shots == 30)
        n = len(contexts)
        together = [rows for rows, _ in clusters_by_prefix(contexts, [12] * n, len(root.ids), n)]
        tree = PrefixTree(root, [[row] for row in range(n)] if apart else together)
        # A choice that greedy decoding writes, where it comes to an end
        slow = [continuation(model, c, k) for c, k in zip(contexts, limits)]
        choices = [[*row, [*new, EOS]] if end else row for row, (new, end) in zip(choices, slow)]
        scores, greedy = tree.score(range(n), contexts, choices)
        written, ended = tree.write(range(n), contexts, limits, EOS)
        assert list(zip(written, ended)) == slow
        computed = sum(c.count for c in tree.clusters)
        longer = [c + new for c, new in zip(contexts, written)]
        again, _ = tree.score(range(n), longer, choices)
        for texts, found in ((contexts, scores), (longer, again)):
            for text, row, tails in zip(texts, found, choices):
                assert row == pytest.approx([likelihood(model, text, t)[0] for t in tails], abs=1e-4)
        for text, one, tails in zip(contexts, greedy, choices):
            named = [likelihood(model, text, tail)[1] for tail in tails]
            assert one == (named.index(True) if True in named else None)
    after = {tuple(t + tail[:k]) for t, row in zip(longer, choices) for tail in row for k in range(len(tail))}
    assert sum(c.count for c in tree.clusters) - computed <= len(after)


def test_every_beginning_is_computed_once(model, monkeypatch):
    rng, passed = random.Random(0), []
    question, reasons = drawn(rng, 30), [drawn(rng, 20) for _ in range(4)]
    contexts = [question + reason[:k] for reason in reasons for k in (5, 10, 15, 20)]
    root = Root(model, contexts, 100)
    forward = root.forward
    monkeypatch.setattr(root, "forward", lambda ids, *rest: passed.append(len(ids)) or forward(ids, *rest))
    tree = PrefixTree(root, [list(range(16))])
    with torch.inference_mode():
        tree.score(range(16), contexts, [[[5, EOS]]] * 16)
    beginnings = {tuple(c[:k]) for c in [c + [5] for c in contexts] for k in range(1, len(c) + 1)}
    assert sum(passed) == len(beginnings) == 30 + 4 * 20 + 16


def test_windows_hold_every_row_once_and_no_more_than_they_may():
    rng = random.Random(0)
    shots = drawn(rng, 40)
    contexts = [shots + drawn(rng, rng.randrange(1, 60)) + [k] for k in range(20) for _ in range(3)]
    contexts += [shots + [7] * 30 + drawn(rng, 9) for _ in range(30)]
    more = [rng.randrange(1, 40) for _ in contexts]
    size = lambda i: len(contexts[i]) - 40 + more[i]
    for most_rows, most_tokens in ((8, 10_000), (64, 300), (1, 50)):
        found = windows(contexts, more, 40, most_rows, most_tokens)
        assert sorted(i for w in found for rows in w for i in rows) == list(range(len(contexts)))
        for window in found:
            assert sum(map(len, window)) <= most_rows
            places = max(max(map(size, rows)) for rows in window)
            assert len(window) == 1 or len(window) * places <= most_tokens
    together = [rows for rows, _ in clusters_by_prefix(contexts, more, 40, 64) if len(rows) > 1]
    assert together and {i for rows in together for i in rows} <= set(range(60, 90))


def test_passes_bound_tokens_logits_and_filling():
    node = lambda slot, asked: prefix_tree.Node(0, 0, 0, prefix_tree.Cluster(slot, 0), asked=asked)
    nodes = [node(0, True) for _ in range(30)] + [node(slot, slot % 2 == 0) for slot in range(1, 400)]
    found = list(passes(nodes, 100, 25))
    assert sum(found, []) == nodes
    for some in found:
        lines = [sum(n.cluster.slot == slot for n in some) for slot in {n.cluster.slot for n in some}]
        assert len(some) <= 100 and sum(n.asked for n in some) <= 25
        assert len(lines) * max(lines) <= 2 * len(some) + 256 + max(lines)


def arms(q):
    "Rationales for one question: own ones, given, empty, with unknown words, twice the same, and one too long."
    long = " ".join(["Beavers cut wood and stop rivers ."] * 12)
    return [None, "", "Safe .", "zyx qwv Safe .", "Beavers cut wood .", "Beavers cut wood .", long, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continue_from", [False, True])
def test_answers_from_a_tree_are_those_of_padded_batches(kind, continue_from, monkeypatch):
    asked = [
        Question("1", "What does a beaver build ?", ("a dam", "a bank", "a zyx"), 0),
        Question("2", "Where is money kept by a beaver ?", ("bank", "river", "under the bed"), 1),
    ]
    words = ["Beavers cut wood and stop rivers .", "Safe ."]
    words += [text for q in asked for text in (q.question, *q.choices[:2])] + ["under the bed"]
    student = tiny_student(words, kind, initializer_range=0.3)
    student.max_target = 40
    questions, texts = [q for q in asked for _ in arms(q)], [text for q in asked for text in arms(q)]
    call = dict(max_new_tokens=9, continue_from=continue_from)
    for size in (1, 64) if kind == "llama" else (64,):
        found = answer(student, questions, texts, batch_size=size, **call)
        with monkeypatch.context() as patch:
            patch.setattr(prefix_tree, "refused", lambda *_: "not now")
            padded = answer(student, questions, texts, batch_size=size, **call)
        for a, b in zip(found, padded, strict=True):
            assert a.scores == pytest.approx(b.scores, abs=1e-4)
            assert vars(a) | {"scores": 0} == vars(b) | {"scores": 0}
        assert any(a.truncated for a in found) and (continue_from or not all(a.truncated for a in found))


def test_a_model_that_trees_do_not_serve_is_read_in_batches(monkeypatch):
    "A window shorter than the longest row is refused, one that is longer is not; the batches find the same."
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=300)).eval()
    assert refused(model, 256) == "" and "sliding_window" in refused(model, 512)
    rng = random.Random(0)
    decoder, used = causal.CausalDecoder(model, {EOS}), []
    for way in ("_tree_batches", "_padded_batches"):
        make = getattr(causal, way)
        monkeypatch.setattr(causal, way, lambda *given, way=way, make=make: used.append(way) or make(*given))
    tails = [[3, 4, EOS], [5, EOS]]
    with torch.inference_mode():
        for contexts in ([drawn(rng, 20), drawn(rng, 9)], [drawn(rng, 320), drawn(rng, 9)]):
            written = decoder.write(contexts, [8, 8], lambda i, tokens: False)
            found = decoder.read(contexts, [tails] * 2, lambda i, tokens: False)
            assert written == [continuation(model, c, 8) for c in contexts]
            for (scores, _, _), c in zip(found, contexts, strict=True):
                assert scores == pytest.approx([likelihood(model, c, t)[0] for t in tails], abs=1e-4)
    assert used == ["_tree_batches"] * 2 + ["_padded_batches"] * 2


def test_a_row_that_leaves_the_common_beginning_is_an_error(model):
    root = Root(model, [[5] * 20 + [6], [5] * 20 + [7]], 64)
    tree = PrefixTree(root, [[0], [1]])
    for ids in ([5] * 19 + [6, 6], [5] * 20):
        with pytest.raises(ValueError, match="20 tokens that all rows begin with"):
            tree.write([0], [ids], [1], EOS)
