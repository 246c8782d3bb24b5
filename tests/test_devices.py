"""Every tensor is made where the model is: all that runs beside a model, with the model on torch's `meta` device.

A tensor on `meta` has a shape and a device and no numbers. What a program reads from one (the token it chooses, the
loss it logs) is stubbed by zeros, and a mask is taken to be true everywhere. An operation that mixes devices is an
error, as it is on an accelerator.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
from decoding_models import prompts, tiny
from faithful_distill.student.answers import answer
from faithful_distill.student.examples import collate_examples, token_counts, training_examples
from faithful_distill.student.loss import distillation_loss, learned_logits, registry, target_log_probs
from faithful_distill.student.model import add_tags, task_tags, tiny_student
from faithful_distill.teacher.choice import Choice
from faithful_distill.teacher.contrast import Stop
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.training.trainer import loss_sums

tensors = lambda values: [t for t in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(t)]
moves = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevice(TorchDispatchMode):
    "Refuses what an accelerator refuses: tensors of two devices in one operation, but for single numbers."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        met = tensors((args, kwargs))
        devices = {t.device.type for t in met if t.dim() or function is torch.ops.aten.cat.default}
        assert len(devices) < 2 or function in moves, f"{function} meets {sorted(devices)}"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def meta(monkeypatch):
    "Reads of tensors on `meta` give zeros, masks on it are true everywhere, and devices do not mix."

    if "meta_nonzero_assume_all_nonzero" not in shapes._config:
        pytest.skip(f"torch {torch.__version__} has no masks on meta")

    def stub(name):
        plain = getattr(torch.Tensor, name)

        def read(self, *args):
            return plain(torch.zeros(self.shape, dtype=self.dtype) if self.is_meta else self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        stub(name)
    with shapes.patch(meta_nonzero_assume_all_nonzero=True), OneDevice():
        yield lambda x: torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), x)


records = [*ranks.records(), *(dict(r, rationale=r["rationale"] + "too") for r in ranks.records()[:3])]
words = [text for r in records for text in (r["question"], *r["choices"], r["rationale"])]


def student_on_meta(kind):
    student = tiny_student(words, kind, width=16)
    add_tags(student.model, student.tokenizer, task_tags)
    student.model.to("meta")
    return student


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("objective", registry)
def test_rows_loss_and_gradients(meta, kind, objective):
    student = student_on_meta(kind)
    examples = training_examples(student, records, objective)
    batch = collate_examples(examples, student)
    assert all(t.device.type == "cpu" for t in tensors(batch)), "a batch is made on the CPU and moved as one"
    widths = {batch[name].shape[1] for name in ("input_ids", "labels")}
    assert all(width % 8 == 0 for width in widths), "as wide as an accelerator likes it"
    batch = meta(batch)
    if marks := batch.get("marks"):  # an answer's tokens are among those that are learned: here, all
        marks["answer"] = marks["answer"].new_zeros(batch["labels"].numel())
    for totals in (None, token_counts(batch)):
        logits = learned_logits(student.model, batch)
        how = dict(objective=objective, marks=batch.get("marks"), totals=totals, label_smoothing=0.1)
        loss = distillation_loss(logits, batch["labels"], batch["counterfactual"], **how)
        loss.total.backward()
        assert loss_sums(loss).device.type == "meta"
    assert all(p.grad.is_meta for p in student.model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in student.model.parameters())
    assert target_log_probs(student, examples[0][0]).is_meta


gold, empty, _, all_wrong = prompts(3)


@pytest.mark.parametrize("engine", ["shared", "plain"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_the_teacher_writes(meta, monkeypatch, kind, engine):
    "The engine's forward passes and the choice; of the choice only what it reads is stubbed."
    from faithful_distill.teacher import choice, generate

    monkeypatch.setattr(generate, "refused", lambda model: "")  # it compares logits
    monkeypatch.setattr(choice, "_refuse_not_finite", lambda rows, best: best.isfinite().tolist())
    model, chosen = tiny(kind).to("meta"), []
    model.get_input_embeddings()._hf_hook = SimpleNamespace(
        execution_device="meta"
    )  # it is not on its way elsewhere
    turn = Choice.turn

    def noted(self, streams, logits):
        assert logits.is_meta and len(logits) == len(streams)
        chosen.append(len(streams))
        turn(self, streams, logits)

    monkeypatch.setattr(Choice, "turn", noted)
    for wrong, how in (
        (empty, dict(beta=0.1, scores=True)),
        (all_wrong, dict(temperature=1.0)),
        (None, dict(alpha=0.0)),
    ):
        options = dict(max_new_tokens=3, stop=Stop(frozenset({5})), token_budget=120, engine=engine) | how
        found = contrastive_generate(model, gold, wrong, **options)
        assert [g.tokens for g in found] == [[0, 0, 0]] * 3
    assert sum(chosen) > 9 * 3


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_student_answers(meta, kind):
    "With reasons of its own and with given ones."
    student = student_on_meta(kind)
    questions = [r.as_question() for r in ranks.rationales()[:4]]
    assert len(answer(student, questions, max_new_tokens=3)) == 4
    reasons = ["it gathers wood", "", "it gathers", "some wax is far"]
    assert len(answer(student, questions, rationales=reasons, max_new_tokens=3)) == 4
