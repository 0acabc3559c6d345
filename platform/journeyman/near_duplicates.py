"""Texts that nearly repeat one another: candidates by MinHash and banding, then exact similarity.

Similarity is the Jaccard index of two texts' sets of word shingles (Broder 1997). Signatures come
from datasketch; in place of its LSH index, of Python dictionaries (6 KB and 72 µs a row), stand
arrays (0.6 KB and 5 µs). A text without spaces, as in Chinese, is one shingle.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from journeyman.recipe.corpus import NearDuplicates

_MAX_MISSED = 0.01  # of pairs whose similarity is just the one asked for
_ERRORS = 4  # standard errors of an estimated similarity
_ALONE = -1  # a row that shares a band with no other


def find(
    texts: Sequence[str],
    priorities: Sequence[int],
    settings: NearDuplicates,
    *,
    contexts: Sequence[str] | None = None,
) -> list[int | None]:
    """For each text the index of the kept one that it nearly repeats, or None where it is kept.

    Of near duplicates the one with the highest priority is kept, of equal ones the first; only
    texts of equal ``contexts`` (all, where None) can repeat one another. No text is left out
    whose similarity to the kept one is below ``settings.similarity``; ``missed`` says how many
    near duplicates are kept. A chain of them is not followed: a text goes only if it repeats one
    that stays.
    """
    sketches = _sketches(texts, settings)
    groups = _groups(sketches, contexts, settings)
    kept_in: list[dict[int, list[int]]] = [{} for _ in range(groups.shape[1])]
    repeats: list[int | None] = [None] * len(texts)
    for i in sorted(range(len(texts)), key=lambda i: (-priorities[i], i)):
        shared = [(band, group) for band, group in enumerate(groups[i].tolist()) if group != _ALONE]
        if not shared:
            continue
        candidates = set[int]().union(*(kept_in[band].get(group, ()) for band, group in shared))
        if contexts is not None:
            candidates = {k for k in candidates if contexts[k] == contexts[i]}
        if candidates:
            promising = _promising(sketches, i, candidates, settings)
            repeats[i] = _nearest(texts, i, promising, settings)
        if repeats[i] is None:
            for band, group in shared:
                kept_in[band].setdefault(group, []).append(i)
    return repeats


def shingles(text: str, size: int) -> set[str]:
    """Runs of ``size`` words, lower-cased; a shorter text is one shingle."""
    words = text.lower().split()
    if len(words) <= size:
        return {" ".join(words)}
    return {" ".join(run) for run in zip(*(words[i:] for i in range(size)), strict=False)}


def similarity(text: str, other: str, shingle: int) -> float:
    """Jaccard index of the two texts' shingles, exact."""
    return _jaccard(shingles(text, shingle), shingles(other, shingle))


def bands(similarity: float, permutations: int) -> tuple[int, int]:
    """Bands, and rows of each: the longest that miss at most one in a hundred at ``similarity``.

    datasketch weighs misses against false candidates, and so misses 60% at 0.8; here candidates
    are verified, so a false one costs microseconds and a missed one a leak between splits.
    """
    fitting = [
        (permutations // r, r)
        for r in range(1, permutations + 1)
        if missed(similarity, (permutations // r, r)) <= _MAX_MISSED
    ]
    return max(fitting, key=lambda shape: shape[1], default=(permutations, 1))


def missed(similarity: float, shape: tuple[int, int]) -> float:
    """Probability that two texts of this similarity share none of the bands, and are both kept.

    At the defaults (0.8; 21 bands of 6): 0.17% at 0.8, 0.0018% at 0.9; of unlike texts, 63% are
    compared at 0.6 and 0.13% at 0.2.
    """
    n_bands, n_rows = shape
    return float((1 - similarity**n_rows) ** n_bands)


def _sketches(texts: Sequence[str], settings: NearDuplicates) -> np.ndarray:
    """uint32[n, permutations]: MinHash signatures."""
    from datasketch import MinHash

    encoded = ([s.encode() for s in shingles(text, settings.shingle)] for text in texts)
    sketches = np.empty((len(texts), settings.permutations), dtype=np.uint32)
    made = MinHash.generator(
        encoded, num_perm=settings.permutations, hashfunc=zlib.crc32, scheme="affine32"
    )
    for i, sketch in enumerate(made):
        sketches[i] = sketch.hashvalues
    return sketches


def _groups(
    sketches: np.ndarray, contexts: Sequence[str] | None, settings: NearDuplicates
) -> np.ndarray:
    """int32[n, bands]: number of the group of texts that agree in a band, or _ALONE."""
    n_bands, n_rows = bands(settings.similarity, settings.permutations)
    # Random odd multipliers hash a band to 64 bits; what collides is a candidate more.
    mixers = np.random.default_rng(0).integers(1 << 63, size=n_rows, dtype=np.uint64) * 2 + 1
    context: np.ndarray | int = 0
    if contexts is not None:
        context = np.array([zlib.crc32(c.encode()) for c in contexts], dtype=np.uint64) << 32
    groups = np.empty((len(sketches), n_bands), dtype=np.int32)
    for band in range(n_bands):
        keys = sketches[:, band * n_rows : (band + 1) * n_rows] @ mixers + context
        _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        groups[:, band] = np.where(sizes[group] > 1, group, _ALONE)
    return groups


def _promising(
    sketches: np.ndarray, i: int, candidates: set[int], settings: NearDuplicates
) -> list[int]:
    """Those whose signatures agree about as often as they would at the similarity asked for.

    Four standard errors below it: one near duplicate in 30,000 is lost, and a corpus of texts
    that share half of their words is searched some thirty times faster.
    """
    n, p = settings.permutations, settings.similarity
    enough = n * p - _ERRORS * math.sqrt(n * p * (1 - p))
    chosen = np.fromiter(sorted(candidates), dtype=np.int64, count=len(candidates))
    agreeing = np.count_nonzero(sketches[chosen] == sketches[i], axis=1)
    return chosen[agreeing >= enough].tolist()


def _nearest(
    texts: Sequence[str], i: int, candidates: Sequence[int], settings: NearDuplicates
) -> int | None:
    """The most similar candidate, the first of equal ones, if it is similar enough."""
    own = shingles(texts[i], settings.shingle)
    scored = [(_jaccard(own, shingles(texts[k], settings.shingle)), -k) for k in candidates]
    best, negative = max(scored, default=(0.0, 0))
    return -negative if best >= settings.similarity else None


def _jaccard(a: set[str], b: set[str]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)
