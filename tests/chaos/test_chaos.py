"""Whatever is killed, and however often: the dataset is the one of a run that nobody disturbed."""

import json
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from journeyman import corpus, files
from journeyman.errors import DataError
from journeyman.labels import dataset
from journeyman.labels.codec import Distributions
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from tests.benchmarks import tiny_teacher
from tests.chaos import labeling
from tests.chaos.labeling import KINDS, Command, Killer, engines, until

SEED = int(os.environ.get("JOURNEYMAN_CHAOS_SEED") or random.randrange(10**6))
WITHOUT_ENGINE = {"JOURNEYMAN_TEST_ENGINE": "stand_in", "JOURNEYMAN_TEST_COMMIT_S": "0.2"}
# A step of topk_fp16, which two engines may come to lie on either side of, and what they differ by.
TOLERANCE = 3 / 1024 + 5e-4


def write_recipe(folder: Path, texts: list[str], rows_per_shard: int, **sections: Any) -> Path:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = folder / "recipe.yaml"
    recipe = {
        "name": "disturbed",
        "output": str(folder),
        "corpus": {"sources": [str(source)], "rows_per_shard": rows_per_shard},
        **sections,
    }
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


class Witness:
    """Looks at a dataset while it is made: what is committed is whole, and stays as it is."""

    def __init__(self, run: Path) -> None:
        self.store = LabelStore(run / "labels")
        self._labels = run / "labels"
        self._corpus = run / "corpus"
        self._seen: dict[str, bytes] = {}
        self._n_done = 0

    def look(self) -> None:
        paths = sorted(self._labels.glob("commits/*.json"))
        assert self.store.done() >= {f"{path.stem}.parquet" for path in paths}
        for path in paths:
            content = path.read_bytes()
            assert self._seen.setdefault(path.name, content) == content, "a commit was changed"
        for shard, commit in self.store.commits().items():
            rows = corpus.read_shard(self._corpus, shard)
            assert commit.sha256 == files.file_digest(self._labels / commit.data)
            assert commit.rows == commit.ok + commit.quarantined + commit.filtered == len(rows)
            assert self.store.read_shard(commit)["id"].to_pylist() == rows["id"].to_pylist()

    def look_after(self, kind: str) -> None:
        self.look()
        if self._seen:
            self._leave_an_orphan()

    def progress(self) -> bool:
        """Whether a shard has been committed since this was last found."""
        before, n_done = self._n_done, len(self.store.done())
        if n_done > before:
            self._n_done = n_done
        return n_done > before

    def orphans(self) -> list[str]:
        named = {commit.data for commit in self.store.commits().values()}
        there = {f"shards/{path.name}" for path in (self._labels / "shards").iterdir()}
        return sorted(there - named)

    def _leave_an_orphan(self) -> None:
        """As a replica does that is killed in the middle of writing."""
        commit = next(iter(self.store.commits().values()))
        content = (self._labels / commit.data).read_bytes()
        name = f"{Path(commit.shard).stem}.{uuid.uuid4().hex[:12]}.parquet"
        (self._labels / "shards" / name).write_bytes(content[: len(content) // 2])


def labels(run: Path) -> pa.Table:
    """Rows of a finished dataset, less what the prefix cache happened to hold."""
    return dataset.read(run / "labels").drop_columns(["n_cached_tokens"])


def label_undisturbed(folder: Path, recipe: Path, address: str, *settings: str) -> Path:
    """The same rows in a run of its own; returns its folder."""
    arguments = [str(recipe), "--set=name=undisturbed", f"--set=cluster.address={address}",
                 *(f"--set={setting}" for setting in settings)]  # fmt: skip
    for step in ("prepare", "label"):
        done = labeling.journeyman(folder, step, *arguments)
        assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


def disturb(
    folder: Path,
    recipe: Path,
    nodes: labeling.Cluster,
    kinds: list[str],
    *,
    pause_s: tuple[float, float],
    wait_for_progress: bool = False,
) -> Witness:
    """Label while so much is killed, until the labels are finished."""
    arguments = [str(recipe), f"--set=cluster.address={nodes.address}"]
    assert labeling.journeyman(folder, "prepare", *arguments).returncode == 0
    witness = Witness(folder / "disturbed")
    ready: Callable[[], bool] = witness.progress if wait_for_progress else lambda: True
    started = time.monotonic()
    run = Command(folder, "label", *arguments)
    killer = Killer(folder, nodes, run, random.Random(SEED), pause_s, ready, witness.look_after)
    try:
        until(lambda: (folder / "disturbed" / "labels" / "commits").exists())
        killer.run(kinds)
        run.wait(240)
    finally:
        run.stop()
        print(f"seed {SEED}: {dict(Counter(killer.kills))} in {time.monotonic() - started:.0f} s; "
              f"drivers ended with {run.statuses}; {len(witness.orphans())} orphans")  # fmt: skip
    witness.look()
    # Whatever else is killed, a run goes on by itself.
    assert run.statuses == [-signal.SIGKILL] * kinds.count("driver") + [0], run.log()
    until(lambda: not engines(folder), 20)  # they end with the driver, not with the cluster
    return witness


def check_accounts(witness: Witness, n_rows: int) -> None:
    totals: dict[str, Any] = witness.store.manifest()["totals"]
    assert totals["rows"] == totals["ok"] == n_rows
    assert totals["quarantined"] == totals["filtered"] == 0


def check_orphans(witness: Witness, run: Path) -> None:
    """Files that killed replicas left are in nobody's way, and can be removed."""
    orphans, before = witness.orphans(), labels(run)
    assert orphans
    assert witness.store.remove_orphans(older_than_s=0) == len(orphans)
    assert witness.orphans() == []
    assert labels(run).equals(before)


def check_a_shard_without_commit_is_not_done(witness: Witness, run: Path) -> None:
    shard, commit = next(iter(witness.store.commits().items()))
    (run / "labels" / "commits" / f"{Path(shard).stem}.json").unlink()
    assert (run / "labels" / commit.data).exists()
    assert shard not in witness.store.done()
    with pytest.raises(DataError, match=f"{shard} has no commit"):
        labels(run)


@pytest.mark.parametrize(
    ("n_rows", "kills", "pause_s"),
    [
        pytest.param(1200, dict.fromkeys(KINDS, 1), (0.5, 1.5), id="short"),
        pytest.param(
            8000,
            {"engine": 12, "replica": 9, "node": 6, "driver": 6},
            (0.1, 3.0),
            id="full",
            marks=[pytest.mark.slow, pytest.mark.timeout(900)],
        ),
    ],
)
def test_a_run_that_is_killed_at_random_makes_the_same_labels(
    tmp_path: Path, n_rows: int, kills: dict[str, int], pause_s: tuple[float, float]
):
    words = random.Random(0)
    recipe = write_recipe(
        tmp_path,
        [f"row {i}" + " word" * words.randrange(12) for i in range(n_rows)],
        rows_per_shard=40,
        teacher={
            "model": labeling.nothing_but_a_name(tmp_path / "model"),
            "max_model_len": 512,
            "max_num_seqs": 4,
            "engine_args": {"row_s": 0.08, "start_s": 0.3},
        },
        labels={"kind": "logits", "k": 4},
        cluster={"replicas": {"min": 2, "max": 2}},
    )
    kinds = labeling.shuffled(random.Random(SEED), **kills)
    with labeling.cluster(3, tmp_path, **WITHOUT_ENGINE) as nodes:
        undisturbed = label_undisturbed(
            tmp_path, recipe, nodes.address, "teacher.engine_args.row_s=0"
        )
        witness = disturb(tmp_path, recipe, nodes, kinds, pause_s=pause_s)
    run = tmp_path / "disturbed"
    check_accounts(witness, n_rows)
    assert labels(run).equals(labels(undisturbed))
    check_orphans(witness, run)
    check_a_shard_without_commit_is_not_done(witness, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_real_engines_are_killed_makes_the_same_labels(
    tmp_path: Path, teacher_model: Model
):
    words = random.Random(0)
    texts = [f"row {i}: " + " ".join(words.choices("abcdefghij", k=300)) for i in range(320)]
    recipe = write_recipe(
        tmp_path,
        texts,
        rows_per_shard=16,
        teacher={
            "model": str(tiny_teacher.make(tmp_path / "model", teacher_model)),
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 8,
            "cpu_kv_cache_gib": 1,
        },
        labels={"kind": "logits", "k": 16},
    )
    kinds = labeling.shuffled(random.Random(SEED), **dict.fromkeys(KINDS, 1))
    with labeling.cluster(2, tmp_path) as nodes:
        undisturbed = label_undisturbed(tmp_path, recipe, nodes.address)
        witness = disturb(
            tmp_path, recipe, nodes, kinds, pause_s=(0.0, 1.0), wait_for_progress=True
        )
    run = tmp_path / "disturbed"
    check_accounts(witness, len(texts))
    ours, theirs = labels(run), labels(undisturbed)
    assert ours.drop_columns(["logprobs"]).equals(theirs.drop_columns(["logprobs"]))
    for mine, wanted in zip(distributions(run), distributions(undisturbed), strict=True):
        assert_close(mine, wanted)
    check_orphans(witness, run)


def distributions(run: Path) -> Iterator[Distributions | None]:
    codec = dataset.codec_of(LabelStore(run / "labels").manifest())
    assert codec is not None
    return dataset.distributions(dataset.read(run / "labels"), codec)


def assert_close(ours: Distributions | None, theirs: Distributions | None) -> None:
    assert ours is not None and theirs is not None
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(ours.log_tail_mass, theirs.log_tail_mass, atol=TOLERANCE)
    # Entries as likely as their neighbour, or as the first one left out, may change places.
    values = np.pad(theirs.logprobs, ((0, 0), (1, 0)), constant_values=np.inf)
    above = values[:, :-1] - values[:, 1:]
    below = np.pad(above[:, 1:], ((0, 0), (0, 1)))
    same = ours.token_ids == theirs.token_ids
    assert (same | (np.minimum(above, below) <= TOLERANCE)).all()
    assert same.mean() > 0.99
