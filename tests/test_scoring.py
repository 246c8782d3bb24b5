"""Trained readers against plain ones, and rationales of any origin through `score_rationales`."""
import pytest

from faithful_distill.interventions import ChoiceReader, Reader, reading_scores
from faithful_distill.questions import Question
from faithful_distill.student import tiny_student

words = ["what is it", "a red cow said so", "the sky", "cow", "two cows of the sky", "sky", "red"]
asked = [Question("a", "what is it", ("cow", "two cows of the sky", "sky"), 0), Question("b", "the sky said", ("red", "cow"), 1), Question("c", "it", ("sky", "cow", "red"), 1)]
texts = ["what is it a red cow", "the sky", "a red cow said so the sky is two cows of it"]


class Base:
    "An encoder-decoder of another family than T5."
    def __init__(self):
        import torch
        import transformers
        self.tokenizer = tiny_student(words).tokenizer
        config = transformers.BartConfig(vocab_size=len(self.tokenizer), d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                                         encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
                                         decoder_start_token_id=1, dropout=0.0, attention_dropout=0.0, forced_eos_token_id=None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.BartForConditionalGeneration(config)


def plain_scores(reader, text, tail):
    "One text, one choice, no padding, no cache."
    import torch
    source = torch.tensor([[*reader.before, *text, *reader.after]])
    target = [*tail, reader.tokenizer.eos_token_id]
    decoder = torch.tensor([[reader.model.config.decoder_start_token_id, *target[:-1]]])
    logp = reader.model(input_ids=source, decoder_input_ids=decoder, use_cache=False).logits.log_softmax(-1)[0]
    return sum(logp[i, t] for i, t in enumerate(target))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_choices_that_share_a_cache_score_and_learn_like_choices_read_one_by_one(family):
    import torch
    reader = ChoiceReader(tiny_student(words, seed=3) if family == "t5" else Base(), settings=Reader(device="cpu"))
    ids, choices = reader.texts(texts), reader.choices(asked)

    def both(scores):
        reader.model.zero_grad()
        sum(s[0] for s in scores).backward()
        return torch.cat([p.grad.flatten() for p in reader.model.parameters() if p.grad is not None])

    table = reading_scores(reader, ids, choices)
    slow = [[plain_scores(reader, t, tail) for tail in row] for t, row in zip(ids, choices)]
    for fast_row, slow_row in zip(table, slow):
        assert fast_row[:len(slow_row)].tolist() == pytest.approx([float(s) for s in slow_row], abs=1e-4)
        assert (fast_row[len(slow_row):] == -1e9).all()
    assert torch.allclose(both([row.log_softmax(-1) for row in table]), both([torch.stack(row).log_softmax(-1) for row in slow]), atol=1e-4)
