from pathlib import Path

import pytest
import yaml

from journeyman import recipe
from journeyman.errors import RecipeError
from journeyman.recipe import Training
from journeyman.run_folder import RunFolder

DEMO = Path(__file__).parents[2] / "jobs" / "recipes" / "routing.yaml"


def sentence(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(DEMO, overrides)
    return str(caught.value)


def test_unknown_key_names_its_path_and_the_nearest_known_one():
    assert "unknown key training.epoch; did you mean epochs?" in sentence("training.epoch=3")
    assert "unknown key corpus.columns.txt; did you mean text?" in sentence("corpus.columns.txt=x")


def test_unknown_key_without_a_near_one_lists_what_is_known():
    assert "known here: name, output, corpus" in sentence("zzz=1")


def test_wrong_type_says_where_and_what_was_got():
    words = sentence("training.epochs=many")
    assert "training.epochs" in words and "'many'" in words and "integer" in words


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.batch_size=33", "batch_size (33) must be a multiple of workers (2)"),
        ("labels.prompt=hello", "prompt must name {{ label }}"),
        ("training.min_workers=3", "min_workers (3) must not exceed workers (2)"),
        ("corpus.columns.split=null", "split_map needs columns.split"),
        ("corpus.split_map={val: {test: 0.4}}", "split_map.val must add up to 1, got 0.4"),
        ("cluster.replicas={min: 3, max: 2}", "min (3) must not exceed max (2)"),
        ("corpus.columns.meta=[label]", "columns.meta: label stands for the words of a label"),
        ("certify={delta: 0.9}", "delta (0.9) must not exceed max_delta (0.5)"),
        (
            "certify={delta: 0.3, besides: [accuracy]}",
            "delta of 2 guarantees (0.6) must not exceed max_delta (0.5)",
        ),
        ("labels.classes.travel=[]", "classes.travel is an empty list"),
        ("labels.class_shares={travel: 1.0}", "less than 1"),
        ("labels.class_shares={travel: 0.5}", "class_shares must name each label of classes"),
        ("report.positive=spam", "report.positive: spam is no label; labels.classes has banking"),
        ("labels.candidates={a: {filter: x}}", "candidates.a.filter is none of chat, class_shares"),
        ("labels.candidates={a: {classes: {x: y}}}", "candidates.a.classes must have the labels"),
        ("labels.candidates={a: {prompt: hello}}", "candidates.a: prompt must name {{ label }}"),
        ("labels.candidates={a: {scoring: best}}", "candidates.a.scoring: Input should be"),
        ("report.rank_by=text", "report.rank_by needs report.positive"),
        ("report={positive: travel, rank_by: who}", "report.rank_by: who is neither text nor"),
        ("certify={guarantee: accuracy, per_class: true}", "per_class goes with system_agreement"),
        ("certify={per_class: true, besides: [accuracy]}", "besides cannot go with per_class"),
    ],
)
def test_impossible_combination_is_one_sentence(override: str, words: str):
    assert words in sentence(override)
    assert "\n" not in sentence(override)


CAUSAL = "student={model: m, kind: causal}"


CLASSIFIER = "student.kind=classifier"


@pytest.mark.parametrize("kind", [CAUSAL, CLASSIFIER])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.start=pruned", "start: pruned needs layers: how many to keep"),
        ("student.layers=2", "layers goes with start: pruned or fresh"),
        ("student.layer_choice=similarity", "layer_choice goes with start: pruned"),
        ("student.config={hidden_size: 8}", "config goes with start: fresh"),
        ("student.lora={rnk: 4}", "unknown key student.lora.rnk; did you mean rank?"),
        ("student.lora.target_modules=[]", "student.lora.target_modules"),
        ("training.beta=1", "training.beta"),
        ("training.skew=0", "training.skew"),
        ("training.seed=-1", "training.seed"),
    ],
)
def test_impossible_student_is_one_sentence(kind: str, override: str, words: str):
    assert words in sentence(kind, override)
    assert "\n" not in sentence(kind, override)


def test_a_classifiers_config_leaves_its_labels_to_the_classes():
    words = sentence("student.start=fresh", "student.config={num_labels: 3}")
    assert "config.num_labels is what labels.classes says; leave it out" in words


@pytest.mark.parametrize("kind", [CAUSAL, CLASSIFIER])
def test_fresh_student_takes_its_layers_from_one_key_and_no_low_rank_matrices(kind: str):
    fresh = (kind, "student.start=fresh")
    words = sentence(*fresh, "student.layers=2", "student.config={num_hidden_layers: 3}")
    assert "layers and config.num_hidden_layers say the same" in words
    assert "lora adds to weights that have learned" in sentence(*fresh, "student.lora={}")


def test_causal_student_has_the_defaults_of_a_whole_model():
    student = recipe.load(DEMO, [CAUSAL, "student.lora={target_modules: [q_proj]}"]).learner()
    assert (student.start, student.layers, student.layer_choice) == ("pretrained", None, "even")
    assert student.lora is not None
    assert (student.lora.rank, student.lora.target_modules) == (16, ("q_proj",))


def test_a_guarantee_is_certified_once_however_often_it_is_named():
    named = recipe.load(DEMO, ["certify={guarantee: accuracy, besides: [accuracy, accuracy]}"])
    assert named.certify.guarantees == ("accuracy",)


@pytest.mark.parametrize("override", ["certify.guarantee=accuracy", "certify.besides=[accuracy]"])
def test_a_promise_against_gold_without_gold_is_refused(override):
    words = sentence(override, "corpus.columns.label=null")
    assert "certify.guarantee accuracy needs gold labels: set corpus.columns.label" in words


def test_gold_mix_without_gold_is_refused():
    words = sentence("training.gold_weight=0.5", "corpus.columns.label=null")
    assert "training.gold_weight needs gold labels" in words


GENERATE = "labels={kind: generate, prompt: '{{ text }}'}"
RATIONALES = "labels={kind: rationales, prompt: '{{ text }}', samples: 3}"
CONFIDENCE, AGREEMENT = "training.row_weight=confidence", "training.row_weight=agreement"


def test_answers_in_a_column_are_refused_for_texts_that_a_cascade_kept():
    written = ("corpus.columns.meta=[text_2]", "teacher.column=text_2", GENERATE)
    words = sentence(*written, "corpus.feedback=kept")
    assert "teacher.column: what a cascade kept has no such column" in words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((AGREEMENT,), "needs labels.kind: rationales with labels.samples of 2 or more"),
        ((AGREEMENT, RATIONALES, "labels.samples=1"), "labels.samples of 2 or more"),
        ((CONFIDENCE, RATIONALES), "confidence of rationales needs labels.classes"),
        ((CONFIDENCE, "labels={kind: logits, codec: sampled}"), "true draws do not hold"),
        ((CONFIDENCE, GENERATE, "teacher.url=http://host/v1"), "behind a URL does not give"),
    ],
)
def test_weights_that_the_labels_do_not_hold_are_refused(overrides: tuple[str, ...], words: str):
    assert words in sentence(*overrides) and "\n" not in sentence(*overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("training.class_weight=heavy",), "none, balanced or a mapping of label to weight"),
        (("training.class_weight={bankin: 2}",), "bankin is no label; did you mean banking"),
        (
            ("training.class_weight={banking: 0}",),
            "weight of banking must be a number above 0, got 0",
        ),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(overrides: tuple[str, ...], words: str):
    assert words in sentence(*overrides) and "\n" not in sentence(*overrides)


def test_hard_labels_have_no_temperature():
    assert "leave temperature at 1" in sentence(
        "training.hard_labels=true", "training.temperature=2"
    )


CLASSES = "labels.kind=classes"
LOGITS = "labels={kind: logits}"
BY_URL = "teacher.url=http://host/v1"
DRAWS = "labels={kind: logits, codec: sampled}"
CE = "training.cross_entropy=1"
ROUNDS = "training.on_policy={max_tokens: 8}"
JSD_ROUNDS = "training.on_policy={divergence: jsd, max_tokens: 8}"


@pytest.mark.parametrize(
    ("setting", "unread", "read"),
    [
        ("head_learning_rate=1", [(LOGITS,), (RATIONALES,)], [(CLASSES,)]),
        ("gold_weight=0.5", [(GENERATE,), (LOGITS,)], [(CLASSES,)]),
        ("hard_labels=true", [(GENERATE,), (RATIONALES,)], [(CLASSES,)]),
        ("class_weight=balanced", [(GENERATE,), (RATIONALES,)], [(CLASSES,)]),
        (
            "temperature=2",
            [(RATIONALES,), (GENERATE, BY_URL), (LOGITS, CE)],
            [(CLASSES,), (LOGITS,), (GENERATE, CE, ROUNDS)],
        ),
        (
            "divergence=reverse_kl",
            [(CLASSES,), (RATIONALES,), (GENERATE, BY_URL), (LOGITS, CE)],
            [(LOGITS,), (GENERATE,), (LOGITS, "training.cross_entropy=0.9")],
        ),
        (
            "tail=renormalised",
            [(CLASSES,), (RATIONALES,), (DRAWS,), (LOGITS, CE)],
            [(LOGITS,), (GENERATE, CE, ROUNDS)],
        ),
        (
            "beta=0.3",
            [(CLASSES,), (LOGITS,), (GENERATE, ROUNDS)],
            [(LOGITS, "training.divergence=jsd"), (GENERATE, JSD_ROUNDS)],
        ),
        (
            "skew=0.3",
            [(CLASSES,), (LOGITS, "training.divergence=jsd"), (GENERATE, JSD_ROUNDS)],
            [(LOGITS, "training.divergence=skewed_kl")],
        ),
        (
            "cross_entropy=0.5",
            [(CLASSES,), (RATIONALES,), (GENERATE, BY_URL)],
            [(LOGITS,), (GENERATE,), (DRAWS,)],
        ),
        (
            "label_smoothing=0.1",
            [(LOGITS,), (GENERATE, ROUNDS)],
            [(CLASSES,), (LOGITS, CE), (RATIONALES,), (GENERATE, BY_URL)],
        ),
        ("rationale_weight=0", [(CLASSES,), (GENERATE,)], [(RATIONALES,)]),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_and_its_default_is_not(
    setting: str, unread: list[tuple[str, ...]], read: list[tuple[str, ...]]
):
    name, _, _ = setting.partition("=")
    default = Training.model_fields[name].default
    for overrides in unread:
        words = sentence(*overrides, f"training.{setting}")
        assert f"{DEMO.name}: training.{name} would change nothing: it goes with " in words
        assert words.endswith("trained with it is trained anew then).")
        assert "\n" not in words
        recipe.load(DEMO, [*overrides, f"training.{name}={default}"])
    for overrides in read:
        recipe.load(DEMO, [*overrides, f"training.{setting}"])


@pytest.mark.parametrize(
    ("given", "where", "why"),
    [
        ((BY_URL,), "teacher", "behind a URL"),
        (
            (GENERATE, "corpus.columns.meta=[reply]", "teacher.column=reply"),
            "teacher",
            "in a column",
        ),
        (("ensemble.b={model: m, url: http://host/v1}",), "ensemble.b", "behind a URL"),
        (
            (
                GENERATE,
                "student.kind=causal",
                "certify={match: judge, judge: {teacher: {model: m, url: http://host/v1}}}",
            ),
            "certify.judge.teacher",
            "behind a URL",
        ),
    ],
)
def test_a_revision_of_a_teacher_that_is_no_repository_is_refused(
    given: tuple[str, ...], where: str, why: str
):
    recipe.load(DEMO, given)
    words = sentence(*given, f"{where}.revision=v2")
    assert words.endswith(
        f"{DEMO.name}: {where}.revision would change nothing: it is of a repository on the hub, "
        f"and this teacher is {why}; leave it out."
    )
    assert "\n" not in words


def test_cpus_for_a_student_that_is_scored_in_the_ingress_are_refused():
    words = sentence("cascade.student_cpus=4")
    assert words.startswith(f"{DEMO}: cascade.student_cpus would change nothing: a student that")
    assert words.endswith("leave it out.") and "\n" not in words
    recipe.load(DEMO, ["cascade.student_cpus=1"])
    recipe.load(DEMO, [GENERATE, "student.kind=causal", "cascade.student_cpus=4"])
    for apart in ("student_apart=true", "student_gpus=0.5"):
        recipe.load(DEMO, ["cascade.student_cpus=4", f"cascade.{apart}"])


@pytest.mark.parametrize(
    "setting", ["student_apart=true", "max_batch_size=8", "max_batch_tokens=9"]
)
def test_what_an_engine_decides_itself_is_refused_of_a_student_that_writes(setting: str):
    name, _, _ = setting.partition("=")
    words = sentence(GENERATE, "student.kind=causal", f"cascade.{setting}")
    assert words.startswith(f"{DEMO}: cascade.{name} would change nothing: it goes with a student")
    assert words.endswith("leave it out.") and "\n" not in words
    default = recipe.load(DEMO).cascade.model_dump()[name]
    recipe.load(DEMO, [GENERATE, "student.kind=causal", f"cascade.{name}={default}"])
    recipe.load(DEMO, [f"cascade.{setting}"])


def test_the_recipe_of_a_finished_run_is_read_with_settings_that_nothing_reads():
    finished = recipe.load(DEMO).model_dump(mode="json")
    finished["training"]["divergence"] = "reverse_kl"
    finished["cascade"]["student_gpus"] = 1
    finished["corpus"]["columns"]["meta"] = ["label"]
    finished["teacher"] |= {"url": "http://api/v1", "revision": "v2"}
    assert recipe.parse(finished).training.divergence == "reverse_kl"


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_comes_with_us_is_read_to_its_last_setting(path: Path):
    recipe.load(path)


def test_missing_key_says_what_it_is_for():
    assert "teacher.model is missing; Hub id, local folder" in sentence("teacher={}")


def test_override_reaches_nested_keys_and_changes_the_hash():
    plain, changed = recipe.load(DEMO), recipe.load(DEMO, ["training.epochs=9"])
    assert changed.training.epochs == 9
    assert plain.hash != changed.hash
    assert plain.hash == recipe.load(DEMO).hash


def test_what_show_prints_is_the_same_recipe(tmp_path: Path):
    loaded = recipe.load(DEMO)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    assert recipe.load(copy).hash == loaded.hash


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [1", "not valid YAML at line"), ("- 1\n- 2", "must be a mapping"), ("", "got nothing")],
)
def test_a_file_that_is_no_recipe_gets_a_sentence(tmp_path: Path, content: str, words: str):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words):
        recipe.load(path)


def test_a_missing_file_gets_a_sentence(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "none.yaml")


def test_every_setting_is_documented():
    undocumented = []

    def walk(model: type, path: str) -> None:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, recipe.Section):
                walk(inner, f"{path}{name}.")
            elif not field.description:
                undocumented.append(path + name)

    walk(recipe.Recipe, "")
    assert undocumented == []


# --- where a run lies ---


def test_output_is_a_folder_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JOURNEYMAN_CACHE", str(tmp_path))

    def run(output: str) -> RunFolder:
        return RunFolder(recipe.load(DEMO, [f"output={output}"]))

    assert (run("runs").where, run("runs").corpus) == ("runs/routing", Path("runs/routing/corpus"))
    on_disk = run("file:///some%20where")
    assert on_disk.directory == Path("/some where/routing") and on_disk.mirror("train").url is None
    far = run("s3://bucket/runs/")
    assert (far.where, far.labels, far.corpus) == (
        "s3://bucket/runs/routing", "s3://bucket/runs/routing/labels", "s3://bucket/runs/routing/corpus",
    )  # fmt: skip
    assert far.directory.is_relative_to(tmp_path) and far.directory.name == "routing"
    assert far.directory != run("s3://other/runs").directory


def test_what_output_cannot_be_gets_a_sentence():
    words = "a folder, or a URL of s3://, gs:// or az://, and ftp://host/runs is none of these"
    assert words in sentence("output=ftp://host/runs")
    rounds = ["labels={kind: generate, prompt: '{{ text }}', max_tokens: 8}",
              "student={kind: causal, model: x}",
              "training.on_policy={rounds: 1, max_tokens: 8}"]  # fmt: skip
    assert "must be a folder on a disk that all nodes share for it, and s3://b is a URL" in (
        sentence("output=s3://b", *rounds)
    )
