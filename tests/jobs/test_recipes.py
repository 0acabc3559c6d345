"""Slices of the shipped recipes: real data, the real teacher, a real training.

``routing`` is the fixture ``small_run``, ``policy`` shares the session's engine; the others, and
whole runs of the command, are marked slow.
"""

import asyncio
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from journeyman import corpus, recipe, steps
from journeyman.certify import bundle as bundles
from journeyman.labels import dataset, finishing
from journeyman.labels.replica import Replica
from journeyman.labels.rows import columns_of
from journeyman.recipe import Recipe
from journeyman.student.inputs import Inputs
from journeyman.student.models import Classifier
from journeyman.teacher import tasks
from journeyman.teacher.answers import RowError
from tests.conftest import ROOT, journeyman
from tests.journeyman.labels.synthetic import write_dataset

RECIPES = ROOT / "jobs" / "recipes"
SLICES = {
    "policy": ("corpus.limits={train: 60, calibrate: 10, certify: 15, test: 2}",),
    "retrieval": (
        "corpus.limits={train: 24, calibrate: 10, certify: 15, test: 10}",
        "student.max_length=64",
    ),
}
QUICK = ("corpus.rows_per_shard=40", "training.epochs=1", "training.workers=1",
         "certify={guarantee: system_agreement, alpha: 0.45, delta: 0.2}")  # fmt: skip


def test_every_recipe_is_whole_and_names_files_that_are_there():
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert {"routing", "policy", "filtering", "retrieval", "rationales", "logits"} <= set(names)
    for name in names:
        loaded = recipe.load(RECIPES / f"{name}.yaml")
        assert loaded.name == name
        corpus.id_columns(loaded)
        assert corpus.source_urls(loaded.corpus)
        folder = ROOT / Path(loaded.corpus.sources[0]).parent
        assert "Licence" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_has_a_page_for_its_job(name: str):
    page = (ROOT / "docs" / "jobs" / f"{name}.md").read_text()
    assert f"jobs/recipes/{name}.yaml" in page and "results.md" in page
    for part in ("What to label", "Which scoring", "How many rows", "How to read the curve",
                 "What it costs on a GPU", "When the teacher is an API"):  # fmt: skip
        assert f"**{part}" in page
    assert f"docs/jobs/{name}.md" in (ROOT / "README.md").read_text()


def making_recipes() -> str:
    """The commands of `make recipes`."""
    return subprocess.run(["make", "-n", "recipes", "INSTALLED="], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout  # fmt: skip


def test_make_recipes_runs_each_and_shows_what_came_of_each():
    said = making_recipes()
    run, shown = (said.split(start)[1].split(end)[0].split() for start, end in
                  (("for recipe in ", ";"), ("journeyman results ", " --to")))  # fmt: skip
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert set(run) == names
    again = set(re.findall(r"--set name=(\S+)", said))
    assert again == {"policy-balanced", "rationales-answers"}
    assert set(shown) == {f"runs/{name}" for name in names | again}


def labeled(name: str, replica: Replica, output: Path) -> tuple[Recipe, steps.Run]:
    """A slice of a shipped recipe."""
    overrides = [*SLICES[name], *QUICK, f"output={output}"]
    return labeled_run(recipe.load(RECIPES / f"{name}.yaml", overrides), replica)


def labeled_run(settings: Recipe, replica: Replica) -> tuple[Recipe, steps.Run]:
    """Labeled by the session's engine as a replica of its own would."""
    output = Path(settings.output)
    manifest = corpus.prepare(settings, output / "prepared")
    task = tasks.local(settings.labels, replica._backend)

    async def ask(row: dict[str, Any]) -> Any:
        try:
            return await task.run(columns_of(row))
        except RowError:  # the session's engine has a shorter context than the recipe's
            return None

    async def ask_all(rows: list[dict[str, Any]]) -> list[Any]:
        return await asyncio.gather(*map(ask, rows))

    shards = []
    for shard in manifest["shards"]:
        rows = corpus.read_shard(output / "prepared", shard["name"]).to_pylist()
        said = replica._call(ask_all(rows))
        shards.append([pair for pair in zip(rows, said, strict=True) if pair[1] is not None])
    run = steps.Run(settings)
    finishing.complete(write_dataset(run.directory, settings.labels, shards), settings)
    return settings, run


def balanced() -> tuple[str, ...]:
    """How `make recipes` runs policy on its other mix."""
    lines = making_recipes().splitlines()
    (line,) = (line for line in lines if "name=policy-balanced" in line)
    return tuple(shlex.split(line)[3:])


@pytest.fixture(scope="module")
def retrieval(
    replica: Replica, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, steps.Run]:
    settings, run = labeled("retrieval", replica, tmp_path_factory.mktemp("retrieval"))
    for step in ("train", "certify"):
        run.execute(step)
    return settings, run


def mean_probabilities(settings: Recipe, run: steps.Run) -> dict[str, float]:
    rows = dataset.read_classes(run.labels, run.path("prepare"), ("train",))
    return dict(zip(rows.labels, np.exp(rows.logprobs).mean(axis=0), strict=True))


def test_policy_has_the_prior_that_its_recipe_knows_and_ends_with_a_bundle(
    replica: Replica, ray_cluster: None, tmp_path: Path
):
    settings, run = labeled("policy", replica, tmp_path)
    assert mean_probabilities(settings, run) == pytest.approx(
        {"answer": 0.8, "refuse": 0.2}, abs=1e-4
    )
    rows = dataset.read_classes(run.labels, run.path("prepare"), ("train",))
    answers, known = rows.logprobs.argmax(axis=1), rows.gold >= 0
    assert known.all()
    assert (answers == rows.gold).mean() > 0.7  # .90 of 1,000 train rows
    for step in ("train", "certify"):
        run.execute(step)
    bundle = bundles.load(run.path("certify"))
    assert bundle.columns == ("text",) and bundle.served.n == 15
    served = bundle.served
    assert served.upper_bound <= served.alpha if served.feasible else served.threshold is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("sms_spam/messages.tsv.gz", []),
        ("xquad/pairs.jsonl.gz", ["--group", "article", "--meta", "passage"]),
    ],
)
def test_what_init_drafts_runs_to_its_bundle(
    replica: Replica, ray_cluster: None, tmp_path: Path, file: str, flags: list[str]
):
    drafted = journeyman("init", str(RECIPES / file), *flags, "--to", str(tmp_path / "mine.yaml"))
    assert drafted.returncode == 0, drafted.stderr
    limits = "corpus.limits={train: 40, calibrate: 10, certify: 15, test: 5}"
    settings = recipe.load(tmp_path / "mine.yaml", [limits, *QUICK, f"output={tmp_path}"])
    _, run = labeled_run(settings, replica)
    for step in ("train", "certify"):
        run.execute(step)
    assert set(bundles.load(run.path("certify")).label_names) == set(settings.classes().classes)


@pytest.mark.slow
def test_retrieval_ends_with_a_bundle_for_its_columns(retrieval):
    settings, run = retrieval
    bundle = bundles.load(run.path("certify"))
    assert bundle.columns == tuple(corpus.id_columns(settings)) == ("passage", "text")
    assert sum(mean_probabilities(settings, run).values()) == pytest.approx(1)
    rows = dataset.read_classes(run.labels, run.path("prepare"))
    student = Classifier.load(run.path("train"))
    logits = student.logits(Inputs(settings.learner()).all(rows.split("test").columns))
    assert logits.shape == (len(rows.split("test")), 2) and student.labels == rows.labels


@pytest.mark.slow
def test_no_group_is_in_two_splits(retrieval):
    settings, run = retrieval
    column = settings.corpus.columns.group
    rows = dataset.read_classes(run.labels, run.path("prepare"))
    splits: dict[str, set[str]] = {}
    for meta, split in zip(rows.metas, rows.splits, strict=True):
        splits.setdefault(meta[column], set()).add(split)
    assert len(splits) > 4 and all(len(found) == 1 for found in splits.values())


def test_the_shipped_pairs_are_lists_of_five_that_share_no_article(tmp_path: Path):
    settings = recipe.load(RECIPES / "retrieval.yaml", ["corpus.limits={}"])
    manifest = corpus.prepare(settings, tmp_path / "corpus")
    rows = [
        row
        for shard in manifest["shards"]
        for row in corpus.read_shard(tmp_path / "corpus", shard["name"]).to_pylist()
    ]
    per_question: dict[str, list[str]] = {}
    articles: dict[str, set[str]] = {}
    for row in rows:
        articles.setdefault(columns_of(row)["article"], set()).add(row["split"])
        per_question.setdefault(row["text"], []).append(row["label"])
    assert all(len(splits) == 1 for splits in articles.values()) and len(articles) == 48
    assert all(sorted(found) == ["not_relevant"] * 4 + ["relevant"]
               for found in per_question.values())  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy", "filtering", "retrieval", "policy-balanced"])
def test_a_recipe_runs_to_its_report_and_again_at_once(name: str, tmp_path: Path):
    limits = "corpus.limits={train: 64, calibrate: 25, certify: 50, test: 50}"
    overrides = [part for one in (limits, *QUICK, f"output={tmp_path}") for part in ("--set", one)]
    other = balanced() if name == "policy-balanced" else ()
    command = ("run", str(RECIPES / f"{name.split('-')[0]}.yaml"), *other, *overrides)
    first = journeyman(*command)
    assert first.returncode == 0, first.stderr
    for words in ("balanced accuracy", "realised on test", "times the teacher"):
        assert words in first.stdout
    assert ("MRR, recall at 1" in first.stdout) == (name == "retrieval")
    page = (tmp_path / name / "report" / "index.html").read_text()
    assert "What escalating was worth" in page or "100.0%" in page
    assert '<section id="slices">' in page
    again = journeyman(*command)
    assert again.stdout.count("already done for the same inputs") == 5
    listed = journeyman("results", str(tmp_path / name))
    assert listed.returncode == 0 and f"| {name} |" in listed.stdout


@pytest.mark.slow
def test_ways_to_ask_are_tried_and_the_best_is_written_into_the_recipe(tmp_path: Path):
    own = tmp_path / "mine.yaml"
    own.write_text((RECIPES / "filtering.yaml").read_text())
    before = recipe.load(own)
    tried = journeyman("label", str(own), "--try", "--rows", "24", "--take", "best", "--set",
                       f"output={tmp_path}")  # fmt: skip
    assert tried.returncode == 0, tried.stderr
    for name in ("recipe", *before.classes().candidates):
        assert f"\n{name} " in f"\n{tried.stdout}"
    assert "trying recipe, 1 of 5 ways" in tried.stderr
    taken = tried.stdout.split("taken     ")[1].split(",")[0]
    after = recipe.load(own)
    expected = before.classes() if taken == "recipe" else before.classes().candidate(taken)
    assert after.classes().asked() == expected.asked()
    assert "was taken by journeyman label --try" in own.read_text()
    assert "# Filtering: which text messages are spam?" in own.read_text()
