"""Near duplicates against a brute-force search by exact Jaccard similarity, and through prepare."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from journeyman import corpus, near_duplicates, recipe
from journeyman.recipe import SPLITS, Recipe
from journeyman.recipe.corpus import NearDuplicates

WORDS = [f"word{i}" for i in range(500)]


def jaccard(a: str, b: str, size: int) -> float:
    """The definition, written down apart from the module's own."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}

    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def edited(text: str, n_words: int, rng: random.Random) -> str:
    words = text.split()
    for i in rng.sample(range(len(words)), n_words):
        words[i] = rng.choice(WORDS)
    return " ".join(words)


def families(n: int, rng: random.Random) -> list[str]:
    """Texts, each with copies that differ in zero to six of some forty words."""
    originals = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(n)]
    texts = originals + [edited(t, rng.randint(0, 6), rng) for t in originals for _ in range(2)]
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("shingle", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_what_goes_and_what_stays_is_what_a_search_of_all_pairs_says(similarity, shingle):
    rng = random.Random(f"{similarity} {shingle}")
    texts = families(150, rng)
    priorities = [rng.randrange(4) for _ in texts]
    settings = NearDuplicates(similarity=similarity, shingle=shingle)
    found = near_duplicates.find(texts, priorities, settings)
    kept = [i for i, k in enumerate(found) if k is None]
    assert 150 <= len(kept) < len(texts) - 50
    for i, k in enumerate(found):
        if k is not None:  # never a false one, and never the one farther from training
            assert found[k] is None
            assert jaccard(texts[i], texts[k], shingle) >= similarity
            assert (-priorities[k], k) < (-priorities[i], i)
    pairs = itertools.combinations(kept, 2)
    missed = [p for p in pairs if jaccard(texts[p[0]], texts[p[1]], shingle) >= similarity]
    assert len(missed) <= 1  # of some 300 near duplicates; most are far above the threshold


def test_the_most_similar_kept_text_is_named():
    base = "a b c d e f g h i j k l m n o p q r s t"
    texts = [f"{base} x y z", f"{base} u v w", f"{base} u v w w"]
    settings = NearDuplicates(similarity=0.7, shingle=1)
    assert near_duplicates.find(texts, [0, 0, 0], settings) == [None, 0, 0]
    assert near_duplicates.find(texts[1:] + texts[:1], [1, 0, 1], settings) == [None, 0, 0]
    far = NearDuplicates(similarity=0.9, shingle=1)
    assert near_duplicates.find(texts, [0, 0, 0], far) == [None, None, 1]


def test_of_near_duplicates_the_one_with_the_higher_priority_stays():
    texts = ["One  two THREE four", "one two three four", "ONE two three\tfour"]
    settings = NearDuplicates()
    assert near_duplicates.find(texts, [0, 3, 1], settings) == [1, None, 1]
    assert near_duplicates.find(texts, [2, 2, 2], settings) == [None, 0, 0]


def test_texts_of_unlike_contexts_do_not_repeat_each_other():
    texts = ["is this the answer to it"] * 4
    found = near_duplicates.find(texts, [0] * 4, NearDuplicates(), contexts=["p", "q", "p", "q"])
    assert found == [None, None, 0, 1]


def test_texts_shorter_than_a_shingle_are_one_shingle():
    assert near_duplicates.shingles("Hello  there", 3) == {"hello there"}
    assert near_duplicates.shingles("", 3) == {""}
    assert near_duplicates.shingles("a b c d", 3) == {"a b c", "b c d"}
    found = near_duplicates.find(["hello", "Hello", "hell", "hello there"], [0] * 4,
                                 NearDuplicates())  # fmt: skip
    assert found == [None, 0, None, None]
    assert near_duplicates.find([], [], NearDuplicates()) == []


@given(st.floats(0.05, 0.99), st.integers(1, 256))
def test_bands_miss_few_wherever_the_permutations_allow_it(similarity, permutations):
    n_bands, n_rows = shape = near_duplicates.bands(similarity, permutations)
    assert n_bands * n_rows <= permutations
    few = near_duplicates.missed(similarity, shape) <= 0.01
    assert few or shape == (permutations, 1)
    if n_rows < permutations:  # longer bands would miss more than that
        longer = (permutations // (n_rows + 1), n_rows + 1)
        assert near_duplicates.missed(similarity, longer) > 0.01


def test_as_many_pairs_at_the_threshold_are_missed_as_stated():
    """2,000 pairs of similarity 0.8: 16 words in common, 2 of each text's own."""
    texts = []
    for i in range(2000):
        common = [f"w{i}-{j}" for j in range(16)]
        texts += [" ".join([*common, f"a{i}", f"b{i}"]), " ".join([*common, f"c{i}", f"d{i}"])]
    settings = NearDuplicates(similarity=0.8, shingle=1)
    assert jaccard(texts[0], texts[1], 1) == 0.8
    missed = near_duplicates.find(texts, [0] * len(texts), settings)[1::2].count(None)
    # (1 - 0.8 ** 6) ** 21 = 0.17% are expected, 3.4 pairs: 12 is beyond 1 in 10,000.
    assert missed <= 12


# --- through prepare ---


def made(source: Path, target: str = "{{ text }}", **settings: Any) -> Recipe:
    return recipe.parse(
        {
            "name": "t",
            "corpus": {"sources": [str(source)]} | settings,
            "teacher": {"model": "unused"},
            "student": {"model": "unused"},
            "labels": {
                "scoring": "channel",
                "classes": {"yes": "yes", "no": "no"},
                "prompt": "{{ label }}\n",
                "target": target,
            },
        }
    )


def prepared(out: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[dict, list[dict]]:
    """The manifest and the rows of a corpus made from these."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = corpus.prepare(made(source, **settings), out)
    shards = [corpus.read_shard(out, s["name"]).to_pylist() for s in manifest["shards"]]
    return manifest, list(itertools.chain.from_iterable(shards))


def test_nothing_of_train_nearly_repeats_test_and_every_row_is_accounted_for(tmp_path: Path):
    rng = random.Random(0)
    texts = families(100, rng)
    rows = [{"text": t, "split": rng.choice(SPLITS)} for t in texts]
    rows += rows[:7]  # exact duplicates are counted as such
    manifest, kept = prepared(
        tmp_path / "out",
        [*rows, {"text": " ", "split": "train"}],
        columns={"split": "split"},
        near_duplicates={"similarity": 0.7, "shingle": 2},
        limits={"train": 10},
    )
    for a, b in itertools.combinations(kept, 2):
        assert jaccard(a["text"], b["text"], 2) < 0.7
    gone = pq.read_table(tmp_path / "out" / "near_duplicates.parquet").to_pylist()
    assert manifest["near_duplicates"] == len(gone) > 50
    assert manifest["over_limit"] > 0
    counted = ("duplicates", "near_duplicates", "over_limit", "filtered", "without_split", "rows")
    assert sum(manifest[name] for name in counted) + manifest["malformed"]["rows"] == len(rows) + 1
    kept_ids = {row["id"] for row in kept}
    assert all(list(row) == ["id", "kept_id", "similarity"] for row in gone)
    assert all(row["similarity"] >= 0.7 and row["id"] not in kept_ids for row in gone)


@pytest.mark.parametrize("order", [1, -1])
def test_across_splits_the_row_nearer_to_training_goes(tmp_path: Path, order: int):
    rows = [
        {"text": "please send ten euros to my sister ann today", "split": "train"},
        {"text": "Please send ten euros to my sister ann", "split": "certify"},
        {"text": "please send ten euros to my sister ann  today now", "split": "calibrate"},
    ]
    manifest, kept = prepared(
        tmp_path / "out",
        rows[::order],
        columns={"split": "split"},
        near_duplicates={"similarity": 0.7, "shingle": 3},
    )
    assert [row["split"] for row in kept] == ["certify"]
    gone = pq.read_table(tmp_path / "out" / "near_duplicates.parquet").to_pylist()
    assert {row["kept_id"] for row in gone} == {kept[0]["id"]}
    assert sorted(row["similarity"] for row in gone) == pytest.approx([6 / 8, 6 / 7])
    assert manifest["splits"] == {"train": 0, "calibrate": 0, "certify": 1, "test": 0}


def test_rows_that_differ_in_another_column_of_the_template_are_kept(tmp_path: Path):
    rows = [{"text": "who wrote the book", "passage": f"passage number {i}"} for i in range(3)]
    rows.append({"text": "Who wrote the  book", "passage": "passage number 1"})
    settings = {"columns": {"meta": ["passage"]}, "near_duplicates": {}}
    manifest, kept = prepared(
        tmp_path / "out", rows, target="{{ passage }}: {{ text }}", **settings
    )
    assert manifest["near_duplicates"] == 1
    assert len(kept) == 3


def test_without_the_setting_near_duplicates_stay(tmp_path: Path):
    manifest, kept = prepared(tmp_path / "out", [{"text": "a b c d"}, {"text": "A b c d"}])
    assert manifest["near_duplicates"] == 0
    assert len(kept) == 2
    assert not (tmp_path / "out" / "near_duplicates.parquet").exists()
