"""Contrastive decoding against two oracles: the slow loop of the method, and transformers' own guidance."""

import math

import pytest
import torch

from decoding_models import VOCABULARY, guided, prompts, tiny
from faithful_distill.teacher.choice import row_uniforms
from faithful_distill.teacher.contrast import Generation, Stop, reference_generate, stop_rule
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.files import BadInput

FOUR = ["gpt_neox", "llama", "qwen2", "gpt2"]
ENGINES = ["plain", "shared"]
gold, empty, wrong, all_wrong = prompts(6)
perturbations = {"empty": empty, "wrong": wrong, "all wrong": all_wrong}
tokens = lambda generations: [g.tokens for g in generations]


@pytest.fixture(scope="module", params=FOUR)
def teacher(request):
    return tiny(request.param)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", perturbations)
def test_equals_the_slow_loop(teacher, engine, name):
    for alpha, beta in ((0.5, 0.0), (0.25, 0.05), (0.8, 0.01)):
        options = dict(alpha=alpha, beta=beta, max_new_tokens=8, stop=Stop(frozenset(range(10))))
        slow = reference_generate(teacher, gold, perturbations[name], **options)
        assert contrastive_generate(teacher, gold, perturbations[name], engine=engine, **options) == slow
        assert {len(s.tokens) for s in slow} != {8}, "the stop rule was never at work"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["empty", "wrong"])
def test_equals_transformers_guidance(teacher, engine, name):
    stops = tuple(range(40, 46))
    for alpha in (0.3, 0.5, 0.75):
        ours = contrastive_generate(
            teacher,
            gold,
            perturbations[name],
            alpha=alpha,
            max_new_tokens=10,
            stop=Stop(frozenset(stops), rule="contrast"),
            engine=engine,
        )
        assert tokens(ours) == [
            guided(teacher, g, p, alpha, 10, stops) for g, p in zip(gold, perturbations[name])
        ]


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_equals_transformers_generate(teacher, engine):
    ours = contrastive_generate(teacher, gold, wrong, alpha=0.0, max_new_tokens=10, engine=engine)
    theirs = [
        teacher.generate(
            torch.tensor([g]),
            attention_mask=torch.ones(1, len(g), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(g) :].tolist()
        for g in gold
    ]
    assert tokens(ours) == theirs == tokens(reference_generate(teacher, gold, max_new_tokens=10))


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_order_nor_budget_changes_a_token(teacher, engine):
    whole = contrastive_generate(teacher, gold, wrong, max_new_tokens=8, engine=engine)
    for order, budget in (([5, 3, 1, 0, 2, 4], 1), ([2, 4, 0, 1, 5, 3], 200), ([1, 0, 3, 2, 5, 4], 400)):
        some = contrastive_generate(
            teacher,
            [gold[i] for i in order],
            [wrong[i] for i in order],
            max_new_tokens=8,
            token_budget=budget,
            engine=engine,
        )
        assert some == [whole[i] for i in order]


@pytest.mark.parametrize("engine", ENGINES)
def test_scores(teacher, engine):
    for perturbed in (wrong, all_wrong):
        ours = contrastive_generate(teacher, gold, perturbed, max_new_tokens=6, scores=True, engine=engine)
        slow = reference_generate(teacher, gold, perturbed, max_new_tokens=6, scores=True)
        for a, b in zip(ours, slow):
            assert a.tokens == b.tokens and a.growth == pytest.approx(b.growth, abs=1e-3)
            assert a.growth == pytest.approx([x - y for x, y in zip(a.logp, a.logp_perturbed)], abs=1e-6)
    stop = ours[0].tokens[2]  # its own scores are those of no token of a rationale
    for perturbed in (wrong, None):
        given = dict(max_new_tokens=6, scores=True, stop=stop)
        ours = contrastive_generate(teacher, gold, perturbed, engine=engine, **given)
        slow = reference_generate(teacher, gold, perturbed, **given)
        for a, b in zip(ours, slow, strict=True):
            assert (a.tokens, a.stop) == (b.tokens, b.stop) and a.growth == pytest.approx(b.growth, abs=1e-3)
            assert len(a.tokens) == len(a.growth) == len(a.logp) == len(a.logp_perturbed)
            assert perturbed or a.growth == [0.0] * len(a.tokens) and a.logp == a.logp_perturbed
    same = contrastive_generate(teacher, gold, gold, max_new_tokens=6, scores=True, engine=engine)
    assert tokens(same) == tokens(reference_generate(teacher, gold, max_new_tokens=6)), (
        "without a difference the contrast is greedy decoding"
    )
    assert all(abs(g) < 1e-3 for made in same for g in made.growth)
    greedy = contrastive_generate(
        teacher, gold, wrong, alpha=0.0, max_new_tokens=6, scores=True, engine=engine
    )
    assert tokens(greedy) == tokens(same) and any(abs(g) > 0.1 for made in greedy for g in made.growth)


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_belongs_to_the_row(engine):
    model, names = tiny("llama"), [f"q{i}" for i in range(6)]
    whole = contrastive_generate(
        model, gold, wrong, temperature=1.0, ids=names, max_new_tokens=8, engine=engine
    )
    order = [4, 2, 0, 5, 1, 3]
    mixed = contrastive_generate(
        model,
        [gold[i] for i in order],
        [wrong[i] for i in order],
        temperature=1.0,
        ids=[names[i] for i in order],
        max_new_tokens=8,
        token_budget=100,
        engine=engine,
    )
    assert mixed == [whole[i] for i in order]
    assert whole != contrastive_generate(
        model, gold, wrong, temperature=1.0, ids=names, seed=1, max_new_tokens=8, engine=engine
    )
    assert tokens(
        contrastive_generate(model, gold, wrong, temperature=1e-4, max_new_tokens=8, engine=engine)
    ) == tokens(reference_generate(model, gold, wrong, max_new_tokens=8))


def test_sampling_follows_the_contrasted_distribution():
    "First tokens of many samples against softmax(log P* + lambda G), on the scale that the method names."
    model, n, alpha = tiny("gpt_neox", initializer_range=0.1), 4000, 0.5
    with torch.no_grad():
        log_p = lambda ids: model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        a, b = log_p(gold[0]), log_p(wrong[0])
    expected = (a + alpha / (1 - alpha) * (a - b)).softmax(-1)
    drawn = contrastive_generate(
        model,
        gold[:1] * n,
        wrong[:1] * n,
        alpha=alpha,
        temperature=1.0,
        max_new_tokens=1,
        token_budget=60_000,
    )
    counts = torch.bincount(torch.tensor([d.tokens[0] for d in drawn]), minlength=VOCABULARY)
    error = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp_min(1e-4)
    assert error.max() < 5 and expected.max() < 0.9


def test_a_forbidden_token_never_wins():
    "Logits of minus infinity (vocabulary rows that are switched off) are no NaN and are never chosen."
    model = tiny("llama")
    model.register_forward_hook(
        lambda module, args, out: [out.logits.index_fill_(-1, torch.arange(90, 97), -math.inf), None][1]
    )
    ours = contrastive_generate(model, gold, wrong, max_new_tokens=8)
    assert ours == reference_generate(model, gold, wrong, max_new_tokens=8) and all(
        t < 90 for made in ours for t in made.tokens
    )


def test_rows_beyond_the_tokenizer_are_never_chosen():
    model = tiny("gpt_neox")
    free = contrastive_generate(model, gold, wrong, max_new_tokens=8)
    cut = contrastive_generate(model, gold, wrong, max_new_tokens=8, vocabulary=60)
    assert any(t >= 60 for made in free for t in made.tokens) and all(
        t < 60 for made in cut for t in made.tokens
    )


@pytest.mark.parametrize(
    "kind",
    ["opt", "gptj", "falcon", "bloom", "mistral", "qwen3", "phi3", "gemma", "gemma2", "mixtral", "llama4"],
)
def test_other_architectures(kind):
    model = tiny(kind)
    assert contrastive_generate(model, gold, wrong, max_new_tokens=6) == reference_generate(
        model, gold, wrong, max_new_tokens=6
    )


def test_out_of_memory_halves_the_budget(caplog, monkeypatch):
    model, forward, sizes = tiny("gpt_neox"), type(tiny("gpt_neox")).forward, []
    expected = contrastive_generate(model, gold, wrong, max_new_tokens=6)

    def small(self, input_ids=None, **kwargs):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 140:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    done = []
    assert (
        contrastive_generate(
            model, gold, wrong, max_new_tokens=6, engine="plain", on_done=lambda i, g: done.append(i)
        )
        == expected
    )
    assert sorted(done) == list(range(6)) and max(sizes) > 140 and "out of memory" in caplog.text


def test_out_of_memory_that_nothing_helps_is_raised(monkeypatch):
    model = tiny("gpt_neox")

    def never(self, *args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(model), "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        contrastive_generate(model, gold, wrong)


@pytest.mark.parametrize("engine", ENGINES + ["auto"])
def test_refusals(engine):
    model = tiny("gpt2")
    assert contrastive_generate(model, [], [], engine=engine) == []
    with pytest.raises(BadInput, match="fills the model's context of 160"):
        contrastive_generate(model, gold + [[1] * 160], wrong + [[1]], engine=engine)
    with pytest.raises(BadInput, match=r"perturbed_ids\[1\].*empty context"):
        contrastive_generate(model, gold[:2], [[5], []], engine=engine)
    with pytest.raises(BadInput, match="outside the model's 97"):
        contrastive_generate(model, [[97]], [[5]], engine=engine)
    with pytest.raises(BadInput, match="has 5 rows where gold_ids has 6"):
        contrastive_generate(model, gold, wrong[:5], engine=engine)
    for bad in (
        dict(alpha=1.0),
        dict(alpha=-0.1),
        dict(beta=2),
        dict(temperature=-1),
        dict(max_new_tokens=0),
        dict(engine="warp"),
    ):
        with pytest.raises(BadInput, match=next(iter(bad))):
            contrastive_generate(model, gold, wrong, **dict(engine=engine) | bad)
    made = contrastive_generate(model, [[1] * 157, [1, 2]], [[1], [2]], max_new_tokens=9, engine=engine)
    assert [len(m.tokens) for m in made] == [3, 9] and made[0].stop == "length"
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(BadInput, match="not finite"):
        contrastive_generate(model, gold, wrong, engine=engine)


def test_on_done_comes_once_per_row_with_the_finished_generation():
    seen = {}
    made = contrastive_generate(
        tiny("gpt_neox"),
        gold,
        wrong,
        max_new_tokens=5,
        stop=list(range(20)),
        on_done=lambda i, g: seen.setdefault(i, Generation(list(g.tokens), g.stop)),
    )
    assert [seen[i] for i in range(6)] == made


# --- the stop rule, for tokenizers with three habits


def byte_tokenizer(sample, size, pattern=None):
    "A byte-level BPE trained on `sample`; with `pattern` its words are cut as the regular expression says."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    raw.pre_tokenizer = (
        level
        if pattern is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), level])
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [sample],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


TEXT = "Q: Where do birds live?\nA: The answer is nest. Birds build nests in trees.\n\n" * 50
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [None, LLAMA3])
def test_stop_rule_finds_the_end_of_every_block(pattern):
    "Token by token, the rule must fire at the blank line and keep the sentence whole."
    tokenizer = byte_tokenizer(TEXT, 320, pattern)
    stop = stop_rule(tokenizer)
    for sentence in (
        "Birds build nests in trees.",
        "Birds build nests in trees",
        'He said "nest."',
        "A nest (in trees)",
    ):
        written, kept, ended = "", [], None
        for token in tokenizer(f" {sentence}\n\nQ: Where").input_ids:
            if stop.ends(written, token):
                ended = stop.tail(written, token)
                break
            kept.append(token)
            written += stop.piece(token)
        assert ended is not None and (tokenizer.decode(kept) + ended).strip() == sentence
    assert stop.ends("", tokenizer.eos_token_id) and stop.tail("", tokenizer.eos_token_id) == ""
    joined = ".\n\n" in stop.pieces
    assert joined == (pattern is not None), "the second tokenizer was meant to write '.\\n\\n' as one token"


def test_stop_rule_refuses_a_tokenizer_that_can_never_stop():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BadInput, match="neither a blank line nor"):
        stop_rule(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert stop_rule(PreTrainedTokenizerFast(tokenizer_object=raw), eos=0).ids == {0}
    with pytest.raises(BadInput, match="stop rule"):
        stop_rule(PreTrainedTokenizerFast(tokenizer_object=raw), rule="never")


def test_uniforms_are_pinned():
    "Samples of an old run must come out again: the numbers behind them are fixed."
    assert row_uniforms(0, "q7", 3).tolist() == pytest.approx(PINNED, abs=1e-12)


PINNED = [0.8227767594062654, 0.8077244146276364, 0.1773065805054953]
