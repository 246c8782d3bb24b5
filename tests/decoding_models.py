"""Tiny random causal LMs whose logits are far apart, one per architecture, and prompts for them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

VOCABULARY, CONTEXT = 97, 160


def tiny(kind: str, seed: int = 0, **changes):
    "A random two-layer model of the architecture `kind`, float32, in eval mode."
    import transformers as t

    torch.manual_seed(seed)
    common = dict(
        vocab_size=VOCABULARY, initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=None
    )
    rotary = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    grouped = rotary | dict(num_key_value_heads=2)
    make = {
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**common | rotary | changes)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**common | grouped | changes)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**common | grouped | changes)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**common | grouped | dict(head_dim=16) | changes)),
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**common | grouped | dict(sliding_window=None) | changes)
        ),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**common | grouped | changes)),
        "llama4": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                **common | grouped | dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=64) | changes
            )
        ),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**common | grouped | dict(head_dim=8) | changes)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**common | grouped | dict(head_dim=8) | changes)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**common | grouped | dict(num_local_experts=4) | changes)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(**common | dict(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT) | changes)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                **common
                | dict(
                    pad_token_id=1,
                    init_std=0.3,
                    hidden_size=32,
                    word_embed_proj_dim=32,
                    ffn_dim=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=CONTEXT,
                )
                | changes
            )
        ),
        "gptj": lambda: t.GPTJForCausalLM(
            t.GPTJConfig(
                **common | dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT) | changes
            )
        ),
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(
                **common
                | dict(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    max_position_embeddings=CONTEXT,
                )
                | changes
            )
        ),
        "bloom": lambda: t.BloomForCausalLM(
            t.BloomConfig(**common | dict(hidden_size=32, n_layer=2, n_head=4) | changes)
        ),
    }
    return make[kind]().eval()


def prompts(
    n: int, *, prefix: int = 24, question=(5, 15), answer=(1, 4), wrong: int = 3, seed: int = 0, low: int = 3
):
    "Contexts of `n` questions after one shared prefix: gold, empty, one wrong each, all wrong each."
    rng = random.Random(seed)
    tokens = lambda k: [rng.randrange(low, VOCABULARY) for _ in range(k)]
    shared, gold, empty, one, all_wrong = tokens(prefix), [], [], [], []
    for _ in range(n):
        stem = shared + tokens(rng.randint(*question))
        answers = [tokens(rng.randint(*answer)) for _ in range(wrong + 1)]
        gold.append(stem + [2] + answers[0] + [0])
        empty.append(stem + [2])
        all_wrong.append([stem + [2] + a + [0] for a in answers[1:]])
        one.append(all_wrong[-1][0])
    return gold, empty, one, all_wrong


def guided(model, gold, negative, alpha, max_new_tokens, stops=()):
    "transformers' classifier-free guidance, one row: the tokens before a stop."
    out = model.generate(
        torch.tensor([gold]),
        attention_mask=torch.ones(1, len(gold), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        guidance_scale=1 / (1 - alpha),
        negative_prompt_ids=torch.tensor([negative]),
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    new = out[0, len(gold) :].tolist()
    return new[: next((i for i, t in enumerate(new) if t in stops), len(new))]


def launched(*arguments, timeout=240, **environment):
    "Run python with a launcher's arguments, as from a fresh shell; a failure shows the end of its stderr."
    rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    here = Path(__file__).parent
    env = (
        {k: v for k, v in os.environ.items() if k not in rank}
        | dict(
            OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo",
            FAITHFUL_DISTILL_PROGRESS="0",
            HF_HUB_OFFLINE="1",
            PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]),
        )
        | environment
    )
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=env
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run
