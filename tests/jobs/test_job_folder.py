"""What a job takes along, and what it refuses to."""

from pathlib import Path

import pytest

from journeyman import job_folder, jobs, recipe
from journeyman.errors import RecipeError
from journeyman.recipe import Recipe
from tests.conftest import DEMO

OUTPUT = "output=/shared/runs"


def demo(*overrides: str) -> Recipe:
    return recipe.load(DEMO, [OUTPUT, *overrides])


def test_a_job_takes_the_code_its_recipe_and_its_small_files_alone(tmp_path: Path):
    loaded = demo()
    n_bytes = job_folder.pack(loaded, tmp_path)
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {"jobs/pipeline.py", "platform/journeyman/cli/__main__.py", "serve/app.py",
            "platform/journeyman/report/page.html.j2"} <= there  # fmt: skip
    assert [name for name in there if name.endswith(".gz")] == list(loaded.corpus.sources)
    assert not [name for name in there if name.startswith((".", "tests", "runs", "docs"))]
    assert n_bytes < 4 << 20


@pytest.mark.parametrize("name", ["routing", "logits", "rationales"])
def test_the_recipe_arrives_as_it_will_run(name: str, tmp_path: Path):
    loaded = recipe.load(DEMO.with_name(f"{name}.yaml"), [OUTPUT])
    job_folder.pack(loaded, tmp_path)
    arrived = recipe.load(tmp_path / job_folder.RECIPE)
    assert arrived == loaded and arrived.hash == loaded.hash
    if isinstance(loaded.labels, recipe.Classes):  # their order decides what a label's index means
        assert list(arrived.classes().classes) == list(loaded.classes().classes)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output=runs", "output: runs is relative"),
        ("labels.destination=labels", "labels.destination: labels is relative.*or a URL"),
        ("labels.cache=cache", "labels.cache: cache is relative"),
        ("cascade.state=spent", "cascade.state: spent is relative"),
        ("cascade.feedback={to: kept}", "cascade.feedback.to: kept is relative"),
        ("teacher.model=./teacher", "teacher.model: ./teacher is a file or folder of this machine"),
        ("student.model=tests", "student.model: tests is a file or folder of this machine"),
        ("teacher.engine_args={hf_token: hf_0123456789abcdefghijklmnopqrstuv}",
         r"looks like a credential \(hf_0123…\).*--env NAME"),
        ("corpus.sources=['s3://me:mine-alone@bucket/rows.jsonl']", "looks like a credential"),
        (f"corpus.sources=['https://b/r.csv?X-Amz-Date=1&X-Amz-Signature={'0a' * 32}']",
         "looks like a credential"),
        (f"corpus.sources=['https://b/r.csv?sv=2024&sig={'Ab%2F' * 9}']", "looks like a cred"),
        ("labels.prompt='ASIA" + "Q" * 16 + " {{ label }}'", "looks like a credential"),
        ("labels.prompt='ghp_" + "a1" * 18 + " {{ label }}'", "looks like a credential"),
    ],
)  # fmt: skip
def test_what_would_be_lost_or_given_away_is_refused(override: str, words: str):
    with pytest.raises(RecipeError, match=words):
        job_folder.check(demo(override), {})


def test_a_secret_of_the_environment_must_not_be_in_the_recipe():
    loaded = demo("labels.prompt='Bearer correct-horse-battery {{ label }}'")
    job_folder.check(loaded, {"HOME": "correct-horse-battery"})
    with pytest.raises(RecipeError, match=r"variable MY_API_KEY.*--env MY_API_KEY"):
        job_folder.check(loaded, {"MY_API_KEY": "correct-horse-battery"})
    with pytest.raises(RecipeError, match=r"variable db_password"):
        job_folder.check(loaded, {"db_password": "correct-horse-battery"})


def test_what_the_cluster_has_of_its_own_is_left_to_it():
    job_folder.check(
        demo("labels.destination=s3://bucket/labels", "teacher.model=Qwen/Qwen3-8B",
             "student.model=/models/minilm", "corpus.sources=['s3://b/*.parquet', /data/a.csv]"),
        {},
    )  # fmt: skip


def test_large_and_outlying_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work, folder = tmp_path / "work", tmp_path / "job"
    (work / "data").mkdir(parents=True)
    folder.mkdir()
    with (work / "data" / "rows.jsonl").open("wb") as file:
        file.truncate(65 << 20)
    monkeypatch.chdir(work)
    with pytest.raises(RecipeError, match="68 MB on this machine, and a job takes 67 MB along"):
        job_folder.pack(demo("corpus.sources=[data/*.jsonl]"), folder)
    with pytest.raises(RecipeError, match="lies outside of"):
        job_folder.pack(demo("corpus.sources=[../rows.jsonl]"), folder)


def test_jobs_of_one_recipe_are_counted():
    first = jobs.job_id(demo(), "label")
    assert first == f"routing-label-{demo().hash[:12]}"
    assert jobs.job_id(demo("training.epochs=9"), "label") != first
    names = [first, f"{first}-2", f"{first}-11", f"{first}-x", f"{first}0", "other"]
    assert [jobs._number(name, first) for name in names] == [1, 2, 11, 0, 0, 0]
