"""The promise, and serving under it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from journeyman.recipe.base import Count, Range, Seconds, Section, Share, check_answer_pattern
from journeyman.recipe.teacher import Teacher

Guarantee = Literal["system_agreement", "selective_agreement", "accuracy"]
Score = Literal["max_probability", "margin", "entropy", "deferral_head"]

# As browsers write it: without a path, and never a wildcard.
Origin = Annotated[str, Field(pattern=r"^https?://[^/*\s,]+$")]

MOST_SAMPLES = 64  # of a student for one answer


class Complete(Section):
    """What teacher and student are asked where the labels are of given texts, and have no answer:
    to write on, greedily, behind labels.context, or behind the beginning of a text."""

    words: Count | None = Field(
        None, description="So many words of a held-out text are given, where there is no "
        "labels.context; served is what requests bring.",
    )  # fmt: skip
    max_tokens: Count = Field(8, description="Tokens that are written at most.")


class Judge(Section):
    """A model that says whether two answers mean the same, asked in both orders."""

    teacher: Teacher | None = Field(
        None, description="Another model than the recipe's teacher, with the settings of teacher."
    )
    prompt: str = Field(
        "Request:\n{{ request }}\n\nAnswer A:\n{{ first }}\n\nAnswer B:\n{{ second }}\n\nDo answer "
        "A and answer B mean the same, as answers to this request? Say Yes or No.\n",
        description="Jinja template of what it is asked, over request (what the teacher was "
        "asked), first and second (the two answers), and the row's own columns.",
    )
    chat: bool | None = Field(
        None, description="Wrap that in its chat template; default as labels.chat."
    )
    same: str = Field("Yes", description="What it says where they mean the same,")
    different: str = Field("No", description="and where they do not.")
    controls: Count = Field(
        200, description="Pairs at most that its error is measured on, of each kind: of calibrate "
        "rows, answers to different requests and answers in another form.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _sees_both(self) -> Judge:
        if "first" not in self.prompt or "second" not in self.prompt:
            raise ValueError("prompt must name {{ first }} and {{ second }}, the two answers")
        if self.same == self.different:
            raise ValueError("same and different must be two different words")
        return self


class Certify(Section):
    """The promise that the escalation threshold carries."""

    guarantee: Guarantee = Field(
        "system_agreement",
        description="system_agreement: P(student answers and differs from the teacher) <= alpha. "
        "selective_agreement: P(differs | student answers) <= alpha. accuracy: against gold, the "
        "cascade is right at most alpha less often than the teacher alone.",
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="The promised rate.")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Chance that the promise is broken by bad luck in the draw of rows."
    )
    per_class: bool = Field(
        False,
        description="A threshold and a promise for each answer that the student gives, each at "
        "delta / classes: they hold for any mixture of those answers. Of agreement only.",
    )
    besides: tuple[Guarantee, ...] = Field(
        (),
        description="Guarantees certified at the same alpha and delta to be shown beside the "
        "served one; each spends delta of the certify rows.",
    )
    max_delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Certify rows that are used again (for another student, say) spend delta each "
        "time, in whichever run of `output`; once a row has spent so much they are refused.",
    )
    scores: tuple[Score, ...] = Field(
        ("max_probability", "margin", "entropy", "deferral_head"),
        min_length=1,
        description="Confidence scores to choose from, on calibrate rows. deferral_head: a "
        "logistic regression on the class probabilities, fitted there. Students that write have "
        "scores of their tokens instead.",
    )
    before: tuple[str, ...] = Field(
        (),
        description="Classifiers: runs (folders or URLs) whose students are asked before this "
        "run's own, the first one first; each passes on what it is not sure of, the last one to "
        "the teacher. They must have learned this corpus, teacher and classes. One promise of "
        "system_agreement over the whole.",
    )
    each_stage: bool = Field(
        False,
        description="before: a promise for each student by itself, at alpha and delta over the "
        "number of students, so that one may be exchanged without the others; the whole keeps "
        "alpha all the same, and escalates more.",
    )
    stage_costs: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="before: what one request costs at each student in turn, this run's own the "
        "last of them, and at the teacher, in any one unit. Default: seconds a row, of the "
        "students as they are scored for the certificate, of the teacher as it labeled.",
    )
    match: Literal["exact", "parsed", "judge"] = Field(
        "exact",
        description="Students that write: when an answer is the teacher's. exact: the same text, "
        "blanks around it aside; of rationales the same answer, as a number where labels.number is "
        "set. parsed: what answer_pattern finds is the same. judge: that, or by judge it means the "
        "same.",
    )
    answer_pattern: str | None = Field(
        None,
        description="match: parsed (or judge): regular expression whose group `answer` is what "
        "counts of an answer; the last match. An answer without one is like no other.",
    )
    judge: Judge = Field(default_factory=Judge, description="match: judge: who, and how.")

    samples: Annotated[int, Field(ge=0, le=MOST_SAMPLES)] = Field(
        0,
        description="Students that write: answers that the student samples beside its greedy one; "
        "how many of them say the same (self-consistency, Wang et al. 2023) is then one more score "
        "to choose from, alone and beside its tokens'. Where it is chosen, so many are drawn of "
        "every request, too.",
    )
    sample_temperature: Annotated[float, Field(gt=0)] = Field(
        0.7, description="samples: the temperature that they are drawn at."
    )
    complete: Complete | None = Field(
        None,
        description="labels.kind: logits: what their student is certified and served for.",
    )

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        """The served one, then those besides, each once."""
        return tuple(dict.fromkeys((self.guarantee, *self.besides)))

    def decisive(self) -> dict[str, Any]:
        """What a bundle is made of. Those from before there was a setting are the same without."""
        later = {"match", "answer_pattern"} if self.match == "exact" else set()
        if self.match != "judge":
            later |= {"judge"}
        if not self.samples:
            later |= {"samples", "sample_temperature"}
        if self.complete is None:
            later |= {"complete"}
        if not self.before:
            later |= {"before", "each_stage", "stage_costs"}
        return self.model_dump(mode="json", exclude=later)

    def way(self) -> dict[str, Any]:
        """What decides how each guarantee comes out, given the students and their rows."""
        beside = {"besides", "max_delta", "before"}
        return {name: value for name, value in self.decisive().items() if name not in beside}

    @model_validator(mode="after")
    def _match_has_its_pattern(self) -> Certify:
        patterned = {"exact": (False,), "parsed": (True,), "judge": (False, True)}[self.match]
        if (self.answer_pattern is not None) not in patterned:
            raise ValueError("match: parsed and answer_pattern go together")
        if self.match != "judge" and self.judge != Judge():
            raise ValueError("judge goes with match: judge")
        if self.answer_pattern is not None:
            check_answer_pattern(self.answer_pattern)
        return self

    @model_validator(mode="after")
    def _delta_fits(self) -> Certify:
        spent = self.delta * len(self.guarantees)
        if spent > self.max_delta * (1 + 1e-9):
            n = len(self.guarantees)
            what = "delta" if n == 1 else f"delta of {n} guarantees"
            raise ValueError(f"{what} ({spent:g}) must not exceed max_delta ({self.max_delta:g})")
        return self

    @model_validator(mode="after")
    def _guarantees_go_together(self) -> Certify:
        if self.per_class and self.guarantee == "accuracy":
            raise ValueError("per_class goes with system_agreement and selective_agreement")
        if self.per_class and self.besides:
            raise ValueError(
                "besides cannot go with per_class, whose thresholds come from the certify rows"
            )
        return self

    @model_validator(mode="after")
    def _several_students(self) -> Certify:
        if not self.before:
            if self.each_stage or self.stage_costs:
                raise ValueError("each_stage and stage_costs go with before: [RUN, ...]")
            return self
        if self.guarantees != ("system_agreement",) or self.per_class:
            raise ValueError(
                "before goes with guarantee: system_agreement alone, without besides and per_class"
            )
        if len(set(self.before)) < len(self.before):
            raise ValueError("before names a run twice")
        if self.stage_costs and len(self.stage_costs) != len(self.before) + 2:
            raise ValueError(
                f"stage_costs has {len(self.stage_costs)} numbers for {len(self.before) + 1} "
                "students and the teacher; give one for each, the teacher's last"
            )
        return self

    @property
    def needs_gold(self) -> bool:
        """Whether certify and calibrate rows must have gold labels."""
        return "accuracy" in self.guarantees


class Breaker(Section):
    """When a failing teacher is left alone, and for how long."""

    failures: Count = Field(
        5, description="Requests to the teacher that fail in a row (errors, deadlines, answers "
        "that are none) before it is left alone."
    )  # fmt: skip
    pause_s: Seconds = Field(
        2.0, description="Then for so long; doubled each time that the one request which is let "
        "through afterwards fails as well,"
    )  # fmt: skip
    max_pause_s: Seconds = Field(60.0, description="up to this.")
    probe_timeout_s: Seconds = Field(
        30.0, description="After so long without a word of it, another request is let through."
    )


class Feedback(Section):
    """Keeping what the cascade escalates, and a random audit, as the next corpus to label.

    Texts of requests are stored nowhere else, and here only where this section is given.
    """

    to: str = Field(
        description="Folder or object store (s3://, gs://, az://) for Parquet files, which "
        "`journeyman prepare` reads as a corpus."
    )
    audit_rate: Share = Field(
        0.01,
        description="Share of all texts, whoever answers them, that are kept for certifying the "
        "next student, and never trained on.",
    )
    roll_rows: Count = Field(10_000, description="Rows after which a file is finished,")
    roll_s: Seconds | None = Field(
        None,
        description="or so long after its first row. By default 300 in a folder, and 60 where `to` "
        "is an object store: until then rows lie on the node that served them, and are lost with "
        "it.",
    )


class TeacherReplicas(Range):
    """How many teachers serve, as Ray Serve scales them. With min 0 the teacher sleeps while
    nothing is escalated: the first text that is wakes it."""

    min: Annotated[int, Field(ge=0)] = Field(1, description="Replicas at least; 0 lets it sleep.")
    max: Count = Field(1, description="Replicas at most.")
    requests_per_replica: Count = Field(
        32, description="Requests in work and waiting, for each replica, that Serve scales to."
    )
    ahead_s: Annotated[float, Field(ge=0)] = Field(
        60.0, description="Where they rise, to those that there will be in so many seconds: as "
        "long as a teacher takes to start. 0: to those that there are."
    )  # fmt: skip
    idle_s: Seconds = Field(
        300.0, description="After so long with less to do a replica is taken away, the last one "
        "too where min is 0."
    )  # fmt: skip


class StudentReplicas(Range):
    """How many replicas of the ingress serve, each with the student in it, as Ray Serve scales
    them; requests that wait for the teacher do not count. Of a student apart: how many of it,
    behind ``min`` ingresses; engines of one that writes by ``teacher.max_num_seqs`` requests each.
    """

    min: Count = Field(1, description="Replicas at least.")
    max: Count = Field(1, description="Replicas at most.")
    busy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="Share of the time that a student is to compute."
    )
    idle_s: Seconds = Field(
        300.0, description="After so long with less to do a replica is taken away."
    )


class Cascade(Section):
    """Serving: the student answers what it may, the teacher the rest."""

    request_timeout_s: Seconds = Field(30.0, description="Deadline of one request.")
    teacher_timeout_s: Seconds | None = Field(
        None, description="Deadline of the teacher's part of it, if it is to be shorter."
    )
    combine: Literal["teacher", "mixture"] = Field(
        "teacher",
        description="What an escalated request is answered with. teacher: its answer. mixture: the "
        "student's opinion and the teacher's, weighted as fits gold labels of calibrate rows best; "
        "certify then promises how often the student differs from that.",
    )
    when_teacher_fails: Literal["reject", "degrade", "wait"] = Field(
        "reject",
        description="What becomes of a request that the student may not answer while the teacher "
        "cannot. reject: 503 with Retry-After. degrade: the student's answer, marked as one for "
        "which nothing is promised. wait: held until the teacher is back or the deadline has come.",
    )
    breaker: Breaker = Field(default_factory=Breaker)
    remembered_texts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="So many of the last texts are answered from memory when they come again (each "
        "replica and bundle has its own). With many repetitions the certificate is one over "
        "distinct texts, not over requests.",
    )
    api_keys: str | None = Field(
        None,
        description="File of the keys that may ask, one a line, by their hashes (`journeyman "
        "cascade key` makes them); JOURNEYMAN_API_KEYS names one, too. By default all may ask.",
    )
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Web pages of these origins (https://app.example.com) may ask from a browser; "
        "by default none may but the cascade's own.",
    )
    state: str | None = Field(
        None,
        description="Folder or object store for what keys with a budget have spent; one is needed "
        "where a key has one.",
    )
    feedback: Feedback | None = Field(None, description="By default no request is kept.")
    max_batch_size: Count = Field(
        32, description="Rows that a student that classifies scores at a time, at most."
    )
    max_batch_tokens: Count = Field(
        2048, description="Tokens of these rows, at most (four characters each), or one longer "
        "row: what came together with long texts does not wait for all of them.",
    )  # fmt: skip
    max_queued_requests: Count = Field(
        512, description="Requests waiting for the teacher, of each replica of the ingress, before "
        "further ones get 503.",
    )  # fmt: skip
    max_student_queue: Count = Field(
        2048, description="Texts waiting for the student, of each replica, before further requests "
        "get 503; fewer where they take half of request_timeout_s.",
    )  # fmt: skip
    student_replicas: StudentReplicas = Field(default_factory=StudentReplicas)
    teacher_replicas: TeacherReplicas = Field(default_factory=TeacherReplicas)
    student_apart: bool = Field(
        False,
        description="A student that classifies has replicas of its own, apart from the ingress, as "
        "one that writes always has: each of student_cpus, or on a GPU where student_gpus says so.",
    )
    student_cpus: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Ray CPUs a replica of such a student."
    )
    student_gpus: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Ray GPUs a replica of it; one that classifies is apart then."
    )
    teacher_cpus: Annotated[float, Field(ge=0)] = Field(1.0, description="Ray CPUs a teacher.")
    teacher_gpus: Annotated[float, Field(ge=0)] = Field(0.0, description="Ray GPUs a teacher.")
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray labels that the nodes of all replicas must have: {journeyman: serve} "
        "keeps the cascade off the spot nodes of cluster.yaml.",
    )

    @property
    def scores_apart(self) -> bool:
        """Whether a student that classifies has a deployment of its own."""
        return self.student_apart or self.student_gpus > 0
