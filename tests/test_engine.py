"""The shared-prefix engine: the slow loop's tokens, each token computed once, and a way out where it cannot serve."""

import inspect
import json
import logging

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import distribute_tensor

from faithful_distill.files import BadInput
from faithful_distill import attention
from decoding_models import VOCABULARY, launched, prompts, tiny
from faithful_distill.attention import Unserved
from faithful_distill.teacher.choice import Row
from faithful_distill.teacher.contrast import Generation, Stop, reference_generate
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.teacher.engine import SharedPrefix, common_prefix, group_rows, refused

gold, empty, wrong, all_wrong = prompts(6)
tokens = lambda generations: [g.tokens for g in generations]
models = {
    kind: tiny(kind) for kind in ("gpt_neox", "llama", "qwen2", "gpt2", "opt", "qwen3", "mistral", "phi3")
}


# --- shapes

ids = lambda low, high: st.lists(st.integers(0, VOCABULARY - 1), min_size=low, max_size=high)
question = st.tuples(
    ids(0, 8), st.lists(ids(0, 4), min_size=1, max_size=4)
)  # a stem, and the endings of its contexts
shapes = st.fixed_dictionaries(
    dict(
        kind=st.sampled_from(sorted(models)),
        prefix=ids(0, 20),
        questions=st.lists(question, min_size=1, max_size=6),
        twice=st.booleans(),
        alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
        beta=st.sampled_from([0.0, 0.0, 0.1]),
        new=st.integers(1, 6),
        budget=st.sampled_from([1, 40, 150, 100_000]),
        stops=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=30),
        rule=st.sampled_from(["either", "contrast"]),
    )
)


def check(kind, prefix, questions, twice, alpha, beta, new, budget, stops, rule):
    "All engines give the slow loop's generations; `twice` adds the counterfactual row of each question."
    contexts = [[(prefix + stem + end) or [1] for end in ends] for stem, ends in questions]
    if twice:
        contexts += [c[::-1] for c in contexts]
    first, rest = [c[0] for c in contexts], [c[1:] or [c[0]] for c in contexts]
    options = dict(alpha=alpha, beta=beta, max_new_tokens=new, stop=Stop(stops, rule=rule))
    slow = reference_generate(models[kind], first, rest, **options)
    for engine in ("shared", "plain"):
        assert (
            contrastive_generate(models[kind], first, rest, engine=engine, token_budget=budget, **options)
            == slow
        )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes)
@example(
    dict(
        kind="gpt2",
        prefix=[],
        questions=[([], [[5], [5]])],
        twice=False,
        alpha=0.5,
        beta=0.0,
        new=4,
        budget=1,
        stops=frozenset(),
        rule="either",
    )
)  # nothing shared, equal answers
@example(
    dict(
        kind="llama",
        prefix=[7] * 20,
        questions=[([], [[], [3]])] * 3,
        twice=True,
        alpha=0.5,
        beta=0.0,
        new=4,
        budget=40,
        stops=frozenset(),
        rule="either",
    )
)  # equal questions, one context inside the other
@example(
    dict(
        kind="gpt_neox",
        prefix=[7],
        questions=[([3], [[1], [2]])],
        twice=False,
        alpha=0.5,
        beta=0.0,
        new=3,
        budget=9,
        stops=frozenset(range(97)),
        rule="contrast",
    )
)  # stops at once
def test_every_shape_gives_the_slow_loops_tokens(shape):
    check(**shape)


CORNERS = dict(
    single_token_answers=dict(questions=[([5, 6], [[7], [8]]), ([9], [[7], [8]])]),
    gold_and_perturbed_the_same=dict(questions=[([5, 6], [[7, 8], [7, 8]]), ([9], [[7], [7]])]),
    nothing_shared=dict(prefix=[], questions=[([5, 6], [[7], [8]]), ([10, 11], [[7], [8]])]),
    one_context_inside_the_other=dict(questions=[([5, 6], [[], [7, 8, 9]])]),
    the_same_question_twice=dict(questions=[([5, 6], [[7], [8]])] * 2),
    all_wrong_choices=dict(questions=[([5, 6], [[7], [8], [9, 10], [11]])]),
    a_single_token=dict(prefix=[], questions=[([], [[5], [6]])]),
    ends_at_the_first_token=dict(stops=frozenset(range(VOCABULARY)), rule="contrast"),
    never_ends=dict(stops=frozenset()),
    one_new_token=dict(new=1),
    no_contrast=dict(alpha=0.0),
    masked=dict(beta=0.1),
    one_slot=dict(budget=1),
)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2", "opt"])
def test_corners(kind, corner):
    plain = dict(
        prefix=[3] * 12,
        questions=[([5, 6], [[7], [8, 9]]), ([10], [[11, 12], [13]])],
        twice=True,
        alpha=0.5,
        beta=0.0,
        new=5,
        budget=100_000,
        stops=frozenset({4, 40}),
        rule="either",
    )
    check(kind, **plain | CORNERS[corner])


# --- what is shared is computed once


def rows_of(gold, perturbed, room=5):
    return [Row(i, [g, *p], room, Generation()) for i, (g, p) in enumerate(zip(gold, perturbed))]


def counted(model, monkeypatch):
    "Counts the tokens that pass through the model."
    forward, sizes = type(model).forward, []

    def count(self, input_ids=None, **kwargs):
        sizes.append(input_ids.numel())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", count)
    return sizes


def test_each_distinct_token_is_computed_once(monkeypatch):
    model = models["gpt_neox"]
    first, others = (
        gold + [w[0] for w in all_wrong],
        [[w[0]] for w in all_wrong] + [[g] for g in gold],
    )  # gold and counterfactual rows
    assert refused(model) == ""
    sizes = counted(model, monkeypatch)
    made = contrastive_generate(model, first, others, max_new_tokens=5)
    contexts = {tuple(c) for row in zip(first, others) for c in (row[0], *row[1])}
    prefixes = {
        c[: i + 1] for c in contexts for i in range(len(c))
    }  # one computation per distinct prefix is the least there is
    assert sum(sizes) == len(prefixes) + sum(2 * (len(m.tokens) - 1) for m in made)


def test_gold_and_counterfactual_rows_find_each_other():
    first, others = gold + [w[0] for w in all_wrong], [[w[0]] for w in all_wrong] + [[g] for g in gold]
    rows = rows_of(first, others)
    root = common_prefix([c for r in rows for c in r.contexts])
    groups = group_rows(rows, root)
    assert sorted(tuple(sorted(r.index for r in g.rows)) for g in groups) == [(i, i + 6) for i in range(6)]
    assert all(len(g.streams) == 4 and len(g.holders) == 2 for g in groups)


def test_waiting_rows_enter_while_others_are_under_way(monkeypatch):
    "Two slots, six questions, rationales of unequal length: no slot waits for the longest of its batch."
    model, stop = models["llama"], Stop(frozenset(range(40)))
    slow = reference_generate(model, gold, wrong, max_new_tokens=12, stop=stop)
    assert refused(model) == ""
    sizes = counted(model, monkeypatch)
    rows = rows_of(gold, [[w] for w in wrong], 12)
    group = max(SharedPrefix(model, rows, 1).size())
    made = contrastive_generate(
        model,
        gold,
        wrong,
        max_new_tokens=12,
        stop=stop,
        token_budget=2 * max(g.trunk + 2 * g.tail for g in SharedPrefix(model, rows, 1).waiting),
    )
    assert made == slow
    both = [s for s in sizes if s in (2, 4)]
    turns = [len(s.tokens) + (s.stop == "stop") - 1 for s in slow]  # passes after the first, per row
    assert sum(both) == 2 * sum(turns) and len(both) < sum(turns), (
        "two rows at a time take fewer passes than one by one"
    )
    assert group > 0


# --- refusals and ways out


def test_fallback_says_why_and_keeps_the_tokens(caplog):
    model = tiny("falcon")
    with caplog.at_level(logging.INFO):
        made = contrastive_generate(model, gold, wrong, max_new_tokens=5)
    assert made == reference_generate(model, gold, wrong, max_new_tokens=5)
    lines = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(lines) == 1 and "does not serve FalconForCausalLM" in lines[0] and "plain batch" in lines[0]
    with pytest.raises(Unserved):
        contrastive_generate(model, gold, wrong, engine="shared")


def test_memory_is_logged_before_the_first_token(caplog):
    with caplog.at_level(logging.INFO):
        contrastive_generate(models["llama"], gold, wrong, max_new_tokens=5)
    assert "MiB of keys and values" in caplog.text and "6 rows" in caplog.text


def test_attention_to_less_than_all_is_not_served(caplog):
    model = tiny("mistral", sliding_window=20)  # longer than the trial's contexts, shorter than these
    assert refused(model) == ""
    assert contrastive_generate(model, gold, wrong, max_new_tokens=5) == reference_generate(
        model, gold, wrong, max_new_tokens=5
    )
    assert "sliding_window" in caplog.text
    model = tiny("llama4", attention_chunk_size=20)
    assert refused(model) == ""
    assert contrastive_generate(model, gold, wrong, max_new_tokens=5) == reference_generate(
        model, gold, wrong, max_new_tokens=5
    )
    assert "chunks of 20 tokens" in caplog.text


def test_the_trial_catches_a_wrong_attention(monkeypatch):
    right = attention.partial_attention
    for wrongly in (
        lambda q, k, v, b, s: right(q, k, v, None, s),  # forgets what is hidden
        lambda q, k, v, b, s: right(q, k, v, b, s * 1.05),  # a scale slightly off
        lambda q, k, v, b, s: (lambda out, lse: (out, lse * 0))(*right(q, k, v, b, s)),
    ):  # parts weighed equally
        monkeypatch.setattr(attention, "partial_attention", wrongly)
        assert "different from a plain forward pass" in refused(tiny("llama"))
    monkeypatch.setattr(attention, "partial_attention", right)
    assert refused(tiny("llama")) == ""


def test_a_verdict_is_of_a_precision_and_no_verdict_is_made_without_memory(monkeypatch):
    model = tiny("llama")
    full = ["not enough memory: you tried to allocate 9 bytes"]
    right = attention.partial_attention

    def once_full(*given):
        if full:
            raise RuntimeError(full.pop())
        return right(*given)

    monkeypatch.setattr(attention, "partial_attention", once_full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        refused(model)
    assert refused(model) == ""
    monkeypatch.setattr(attention, "partial_attention", lambda q, k, v, b, s: right(q, k, v, None, s))
    assert refused(model) == "" and "different from a plain forward pass" in refused(model.double())


def test_out_of_memory_halves_the_budget(caplog, monkeypatch):
    model, done = models["llama"], []
    expected = reference_generate(model, gold, wrong, max_new_tokens=6)
    assert refused(model) == ""
    forward, sizes = type(model).forward, []

    def small(self, input_ids=None, **kwargs):
        sizes.append(input_ids.numel())
        if input_ids.numel() > 30:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", small)
    assert (
        contrastive_generate(model, gold, wrong, max_new_tokens=6, on_done=lambda i, g: done.append(i))
        == expected
    )
    assert sorted(done) == list(range(6)) and max(sizes) > 30
    budgets = [int(r.message.split()[-1]) for r in caplog.records if "token budget of" in r.message]
    held = sum(
        s.slots * s.places
        for s in (lambda e: (e.root, e.store))(
            SharedPrefix(model, rows_of(gold, [[w] for w in wrong], 6), 32768)
        )
    )
    assert budgets[0] == held // 2 and all(b <= a // 2 for a, b in zip(budgets, budgets[1:])), (
        "half of what was held, not of what was allowed"
    )


def test_out_of_memory_on_the_way_keeps_what_is_finished(caplog, monkeypatch):
    "Memory runs out after some rows have ended: they are not decoded again, and the others come out the same."
    model, done, stop = models["llama"], [], Stop(frozenset(range(40)))
    expected = reference_generate(model, gold, wrong, max_new_tokens=12, stop=stop)
    assert refused(model) == "" and len({len(g.tokens) for g in expected}) > 1
    forward, calls = type(model).forward, []

    def once(self, *args, **kwargs):
        calls.append(len(done))
        if calls.count(len(done)) == 1 and len(done) in (2, 3) and "x" not in calls:
            calls.append("x")
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", once)
    assert (
        contrastive_generate(
            model, gold, wrong, max_new_tokens=12, stop=stop, on_done=lambda i, g: done.append(i)
        )
        == expected
    )
    assert sorted(done) == list(range(6)) and "x" in calls and caplog.text.count("out of memory") == 1


def test_the_model_comes_back_as_it_was():
    model = tiny("gpt_neox").train()
    before = model.config._attn_implementation
    contrastive_generate(model, gold, wrong, max_new_tokens=3)
    assert (
        model.config._attn_implementation == before
        and model.training
        and not any("forward" in vars(m) for m in model.modules())
    )
    model.get_output_embeddings().weight.data[0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        contrastive_generate(model, gold, wrong, max_new_tokens=3)
    assert (
        model.config._attn_implementation == before
        and model.training
        and not any("forward" in vars(m) for m in model.modules())
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whatever_attention_the_model_came_with(attention):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    assert contrastive_generate(model, gold, wrong, max_new_tokens=5, engine="shared") == reference_generate(
        model, gold, wrong, max_new_tokens=5
    )
    assert model.config._attn_implementation == attention


def test_the_two_matrix_kernels_agree(monkeypatch):
    model, made = models["gpt_neox"], {}
    for wide in (False, torch.backends.mkldnn.is_available()):
        monkeypatch.setattr(attention, "wide_kernel", lambda: wide)
        made[wide] = contrastive_generate(model, gold, wrong, max_new_tokens=6, engine="shared")
    assert set(map(str, made.values())) == {str(reference_generate(model, gold, wrong, max_new_tokens=6))}


def test_the_kernel_without_log_sum_exp_agrees():
    "What runs on accelerators (two products, a log-sum-exp) against the fused kernel: hidden keys, grouped heads."
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    bias = torch.zeros(3, 1, 4, 9).masked_fill_(torch.rand(3, 1, 4, 9) < 0.3, torch.finfo(torch.float32).min)
    fused = attention.partial_attention(q, k, v, bias, 0.3)
    wide = attention.partial_attention(
        q, k, torch.cat([v, v], -1), bias, 0.3
    )  # another value size: the other branch
    assert torch.allclose(fused[0], wide[0][..., :8], atol=1e-5) and torch.allclose(
        fused[1], wide[1], atol=1e-5
    )


# --- half precision, offloaded weights, several processes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2"])
def test_half_precision_keeps_the_scores(kind, dtype):
    """In half precision ties make tokens depend on the batch, in every engine; so the engine's choices are
    rescored by plain passes in float32."""
    whole, half = tiny(kind, initializer_range=0.15), tiny(kind, initializer_range=0.15).to(dtype)
    made = contrastive_generate(half, gold, wrong, max_new_tokens=6, engine="shared", scores=True)
    with torch.inference_mode():
        for g, w, m in zip(gold, wrong, made):
            a, b = (
                whole(torch.tensor([c + m.tokens])).logits[0, len(c) - 1 : -1].log_softmax(-1) for c in (g, w)
            )
            scores = a - 0.5 * b
            chosen = scores.gather(1, torch.tensor(m.tokens)[:, None])[:, 0]
            spread = scores.std()
            assert (scores.max(-1).values - chosen).max() < 0.2 * spread, (
                "a choice that float32 finds much worse than its best"
            )
            assert torch.allclose(
                torch.tensor(m.logp),
                a.gather(1, torch.tensor(m.tokens)[:, None])[:, 0],
                atol=0.2 * a.std().item(),
            )


def test_weights_that_live_elsewhere():
    "accelerate fetches offloaded weights layer by layer: inputs go where the embedding is computed."
    from accelerate import cpu_offload

    model, expected = tiny("llama"), reference_generate(models["llama"], gold, wrong, max_new_tokens=5)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.device.type == "meta"
    for engine in ("shared", "plain"):
        assert contrastive_generate(model, gold, wrong, max_new_tokens=5, engine=engine) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "gpt2"])
def test_on_an_accelerator(kind):
    model = tiny(kind).to("cuda")
    options = dict(max_new_tokens=8, stop=Stop(frozenset(range(10))))
    for engine in ("shared", "plain"):
        assert contrastive_generate(model, gold, all_wrong, engine=engine, **options) == reference_generate(
            model, gold, all_wrong, **options
        )


@pytest.mark.parametrize("engine", ["shared", "plain"])
def test_device_map_auto(tmp_path, engine):
    "A teacher that does not fit in memory, laid out by `device_map='auto'`: here over memory and disk."
    from transformers import AutoModelForCausalLM

    models["gpt_neox"].save_pretrained(tmp_path / "teacher")
    room = sum(p.nbytes for p in models["gpt_neox"].parameters()) // 2
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher",
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=tmp_path / "aside",
        dtype=torch.float32,
    ).eval()
    assert {"cpu", "disk"} <= set(map(str, model.hf_device_map.values()))
    expected = tokens(reference_generate(models["gpt_neox"], gold, wrong, max_new_tokens=5))
    assert tokens(contrastive_generate(model, gold, wrong, max_new_tokens=5, engine=engine)) == expected


TENSOR_PARALLEL = """
import json, sys, torch.distributed as dist
from pathlib import Path
from decoding_models import prompts
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.ranks import leave_ranks
from faithful_distill.teacher.loading import load_teacher
from faithful_distill.teacher.shards import rationalize_in_parts
from faithful_distill.lab.world import world_questions
folder = sys.argv[1]
gold, _, wrong, _ = prompts(6)
model = load_teacher(folder + "/llama", dtype="float32", tensor_parallel=True).model
options = dict(max_new_tokens=6)
made = [contrastive_generate(model, gold, wrong, engine=engine, **options) for engine in ("shared", "plain")]
world = load_teacher(folder + "/world", tensor_parallel=True)
questions, out = world_questions("choice", limit=3), folder + "/together.jsonl"
records = rationalize_in_parts(world, questions, out=out, **options)
found = [[m.tokens for m in some] for some in made] if dist.get_rank() == 0 else len(records)
Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found))  # lines of two ranks may mix
leave_ranks()
"""


@pytest.mark.skipif(
    "src_data_rank" not in inspect.signature(distribute_tensor).parameters,
    reason="transformers splits a model with what torch has from 2.7 on",
)
def test_tensor_parallel(tmp_path):
    """Two processes, each with half of the heads, write the tokens of one. Over a dataset they share one list
    of jobs, resumed where it stopped, and one file."""
    from transformers import AutoTokenizer
    from faithful_distill.files import shipped
    from faithful_distill.files import Journal
    from faithful_distill.teacher.loading import load_teacher
    from faithful_distill.teacher.rationales import rationalize
    from faithful_distill.lab.world import world_questions

    tokenizer = AutoTokenizer.from_pretrained(shipped("data", "models", "teacher"))
    models["llama"].save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(
        tmp_path / "world"
    )
    tokenizer.save_pretrained(tmp_path / "world")
    alone = rationalize(
        load_teacher(tmp_path / "world"),
        world_questions("choice", limit=3),
        max_new_tokens=6,
        out=tmp_path / "alone.jsonl",
    )
    with Journal(tmp_path / "together.jsonl.partial") as journal:
        journal.append(*(r.to_row() for r in alone[:2]))  # as if it had been killed
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    launched(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "run.py"),
        str(tmp_path),
    )
    made, others = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert made == [tokens(reference_generate(models["llama"], gold, wrong, max_new_tokens=6))] * 2
    assert (tmp_path / "together.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert others == len(alone)
