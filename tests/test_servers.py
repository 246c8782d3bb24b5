"""Two servers that others wrote, on loopback: llama.cpp with a GGUF file, and `transformers serve` with a folder."""

import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from gguf_models import byte_tokenizer, tiny_llama, write_gguf

pytest.importorskip("openai")

from faithful_distill.files import BadInput
from faithful_distill.questions import Question
from faithful_distill.reasoners.causal import CausalReasoner
from faithful_distill.reasoners.opening import open_reasoner
from faithful_distill.reasoners.served import ServedReasoner, label_scores
from faithful_distill.served import ServedModel
from faithful_distill.teacher.rationales import rationalize


@pytest.fixture(scope="module")
def model():
    tokenizer = byte_tokenizer()
    return tiny_llama(tokenizer), tokenizer


@pytest.fixture(scope="module")
def questions():
    return [Question(f"q{i}", f"Is {i} this?", ("this", "the"), 0) for i in range(3)]


@pytest.fixture(scope="module")
def llama_cpp(model, tmp_path_factory):
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server is not installed (xllamacpp)")
    pytest.importorskip("gguf")
    asked = xllamacpp.CommonParams()
    asked.model.path = str(write_gguf(*model, tmp_path_factory.mktemp("gguf") / "tiny.gguf"))
    asked.n_ctx, asked.n_parallel, asked.port, asked.verbosity = 512, 1, 0, -1
    asked.cpuparams.n_threads = 1
    server = xllamacpp.Server(asked)
    yield f"{server.listening_address}/v1"
    del server


def next_tokens(model, text, n=20):
    "The likeliest next tokens after a text, with log-probabilities, by the model at hand."
    lm, tokenizer = model
    with torch.inference_mode():
        log_p = lm(torch.tensor([tokenizer(text).input_ids])).logits[0, -1].log_softmax(-1)
    best = log_p.topk(n)
    return [(tokenizer.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices.tolist())]


def test_llama_cpp_gives_the_next_tokens_of_the_model(llama_cpp, model):
    for text in ("this is", "the the", "Q: is this"):
        (reply,) = ServedModel(llama_cpp).complete([text], 1, top=20)
        known = next_tokens(model, text)
        assert [p for _, p in reply.top] == pytest.approx([p for _, p in known], abs=2e-3)


def test_llama_cpp_measured_by_letters_as_the_model_at_hand(llama_cpp, model, questions):
    served = open_reasoner(llama_cpp, "worked", max_new_tokens=8)
    assert served.reads == "top" and "likeliest next tokens" in served.notes()[0]
    texts = ["this is the", "the", ""]
    for q, r, answer in zip(questions, texts, served.read(questions, texts), strict=True):
        context = served.style.prompt(q) + served.style.conclude(r) + " ("
        assert answer.scores == pytest.approx(label_scores(q, next_tokens(model, context)), abs=2e-3)
    local = CausalReasoner(model, "worked", max_new_tokens=8).write(questions)
    # bytes that are no characters are shown differently by the two, so whole texts are compared as far as they are
    for one, other in zip(served.write(questions), local, strict=True):
        assert one.text.split("\ufffd")[0] == other.text.split("\ufffd")[0]


def test_llama_cpp_writes_but_cannot_contrast(llama_cpp, questions):
    greedy = rationalize(llama_cpp, questions, "greedy", roles=["gold"], max_new_tokens=6)
    assert len(greedy) == 3 and all(r.tokens <= 6 for r in greedy)
    with pytest.raises(BadInput, match="cannot contrast"):
        rationalize(llama_cpp, questions, "contrastive-wrong", roles=["gold"], samples=2, max_new_tokens=6)


@contextmanager
def transformers_serve(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "from transformers.cli.transformers import main; main()"
    asked = ["serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-c", command, *asked], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("transformers serve did not start")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="starts a server of transformers: set FAITHFUL_DISTILL_SLOW=1",
)
def test_transformers_serve_is_read_by_samples(model, questions, tmp_path):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    pytest.importorskip("uvicorn")
    for part in model:
        part.save_pretrained(tmp_path / "tiny")
    with transformers_serve(tmp_path / "tiny") as url:
        served = ServedReasoner(
            ServedModel(url, str(tmp_path / "tiny")), "worked", max_new_tokens=8, samples=4
        )
        assert served.reads == "samples"
        written = served.write(questions)
        answers = served.read(questions, ["this", "the", ""])
    local = CausalReasoner(model, "worked", max_new_tokens=8).write(questions)
    assert [w.text for w in written] == [w.text for w in local]
    for answer in answers:
        # samples that name no choice count for none, so the shares sum to one or less
        assert not answer.problem and 0 < sum(map(math.exp, answer.scores)) < 1 + 1e-9
