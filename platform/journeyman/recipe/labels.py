"""What the teacher is asked, and what is kept of its answer: one section for each kind of label."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from journeyman.recipe.base import Count, Section, Share, check_answer_pattern

_PROMPT = (
    "Jinja template over the row's columns (text, and those of columns.meta); with chat, of the "
    "user's message; with channel scoring also over label, the label's words."
)


class Filters(Section):
    """Which labeled rows of ``train`` to leave out; counted as filtered, kept on disk with the
    reason. Rows that are held out all stay: a promise about easy rows alone would be none.

    They run over finished labels: changing them asks the teacher nothing.
    """

    min_label_mass: Share | None = Field(
        None, description="classes: probability that the teacher put on any label word at all."
    )
    max_entropy: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Entropy in nats: of the class distribution, or the mean over positions."
    )
    min_agreement: Share | None = Field(
        None, description="rationales: share of the samples with the majority's answer."
    )
    min_tokens: Count | None = Field(
        None, description="Tokens of the answer, or of the text scored, at least."
    )
    max_tokens: Count | None = Field(
        None, description="Tokens of the answer, or of the text scored, at most."
    )
    max_repetition: Share | None = Field(
        None, description="Share of the answer's word 4-grams that occurred in it before."
    )
    finished: bool = Field(
        False, description="generate, rationales: leave out answers cut off at max_tokens."
    )
    matches_gold: bool = Field(
        False, description="Leave out rows where the teacher differs from their gold label."
    )


class Example(Section):
    """One worked example for few-shot prompts."""

    row: dict[str, Any] = Field(description="Columns for the prompt's template.")
    answer: str = Field(description="What the teacher should have said.")


class _Common(Section):
    overflow: Literal["quarantine", "truncate_left", "truncate_right", "skip"] = Field(
        "quarantine",
        description="A row longer than the teacher's context: quarantine it, cut its text at the "
        "left or the right until it fits, or skip it (counted as filtered).",
    )
    filters: Filters = Field(default_factory=Filters)
    shards_in_flight: Count = Field(
        2, description="Shards that one replica works on at a time, to keep its batches full."
    )
    max_attempts: Count = Field(3, description="Attempts at a row before it is quarantined.")
    max_quarantined: Share = Field(
        0.5, description="Stop if more than this share of the first rows goes to quarantine."
    )
    cache: str | None = Field(
        None,
        description="Folder or URL of a content-addressed cache: a row that the same teacher has "
        "labeled in the same way, in any dataset, is copied from there.",
    )
    destination: str | None = Field(
        None,
        description="URL (s3://, gs://, az://, file://) or folder of the label dataset; default "
        "labels/ in the run's folder.",
    )

    def templates(self) -> dict[str, str]:
        """The templates over a row's columns, by YAML path."""
        return {}

    def asked(self) -> dict[str, Any]:
        """Settings that decide what the teacher says of a row: a dataset's identity."""
        return self.model_dump(mode="json", exclude=_NOT_ASKED)


_NOT_ASKED = {
    "filters", "shards_in_flight", "max_attempts", "max_quarantined", "cache", "destination",
}  # fmt: skip


# Of logits, with what they were as long as nobody could set them.
_LATER: dict[str, Any] = {"chat": False, "system": None, "examples": (), "tokens": None}


_SHARES = "class_shares"
_OF_CANDIDATES = {
    "scoring", "classes", "prompt", "target", "chat", "system", "examples", "prior_correction",
    "class_shares",
}  # fmt: skip


class _Chat(Section):
    chat: bool = Field(
        False,
        description="Wrap the prompt (of logits, the context) in the teacher's own chat template, "
        "as a user message.",
    )
    system: str | None = Field(None, description="chat: the system message.")
    examples: tuple[Example, ...] = Field(
        (), description="chat: worked examples (few-shot), as earlier turns of the conversation."
    )

    @model_validator(mode="after")
    def _chat_has_turns(self) -> _Chat:
        if not self.chat and (self.system is not None or self.examples):
            raise ValueError("system and examples need chat: true (or write them into prompt)")
        return self


class _Asked(_Common, _Chat):
    prompt: str = Field(description=_PROMPT)

    def templates(self) -> dict[str, str]:
        return {"labels.prompt": self.prompt}


class _Recorded(Section):
    codec: Literal["topk_fp16", "topk_q8", "sampled"] = Field(
        "topk_fp16",
        description="topk_fp16: the k most likely tokens, 16-bit log-probabilities and the tail's "
        "mass. topk_q8: the same in 8 bits. sampled: true draws from the whole distribution "
        "(Random Sampling KD, Anshumann et al. 2025).",
    )
    k: Count = Field(64, description="topk codecs: tokens kept at each position.")
    draws: Annotated[int, Field(ge=1, le=1024)] = Field(
        50, description="sampled: draws at each position."
    )


class Logits(_Common, _Recorded, _Chat):
    """The teacher's next-token distribution at every position of a given text."""

    kind: Literal["logits"] = "logits"
    target: str = Field(
        "{{ text }}", description="Template of the text whose positions are recorded."
    )
    context: str = Field(
        "", description="Template of what stands in front of it, not recorded (a prompt, say)."
    )
    tokens: str | None = Field(
        None,
        description="Column of corpus.columns.meta that holds the text as a list of the teacher's "
        "token ids, in place of target: what a model with the same vocabulary wrote, token by "
        "token.",
    )

    def templates(self) -> dict[str, str]:
        if self.tokens:
            return {"labels.tokens": f"{{{{ {self.tokens} }}}}", "labels.context": self.context}
        return {"labels.target": self.target, "labels.context": self.context}

    def asked(self) -> dict[str, Any]:
        # Datasets that were made before there were these settings are the same without them.
        unset = {name for name in _LATER if getattr(self, name) == _LATER[name]}
        return {name: value for name, value in super().asked().items() if name not in unset}


class Structured(Section):
    """What an answer must look like; vLLM masks all else while it generates."""

    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema of the answer.")
    regex: str | None = Field(None, description="Regular expression that the answer matches.")
    choice: tuple[str, ...] | None = Field(None, description="The answer is one of these.")
    grammar: str | None = Field(None, description="Context-free grammar (EBNF) of the answer.")

    @model_validator(mode="after")
    def _one(self) -> Structured:
        given = [n for n in type(self).model_fields if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of json_schema, regex, choice, grammar; got {given}")
        return self


class _Sampled(Section):
    max_tokens: Count = Field(256, description="Tokens of an answer at most.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Of sampling; 0 is greedy. Recorded log-probabilities are at 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling.")
    stop: tuple[str, ...] = Field((), description="Strings at which an answer ends.")


class Generate(_Asked, _Recorded, _Sampled):
    """The teacher's answer, with its next-token distribution at every position."""

    kind: Literal["generate"] = "generate"
    structured: Structured | None = Field(None, description="The form that answers must have.")


class Rationales(_Asked, _Sampled):
    """Sampled reasonings with their answers, and the majority's answer."""

    kind: Literal["rationales"] = "rationales"
    samples: Count = Field(
        1, description="Reasonings of each row (self-consistency, Wang et al. 2023)."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.7, description="Of sampling; 0 is greedy, and then one sample is enough."
    )
    answer_pattern: str = Field(
        r"(?i)answer(?: is|:)\s*(?P<answer>[^\n]+?)\s*\.?\s*$",
        description="Regular expression whose group `answer` is the answer; the last match counts.",
    )
    number: bool = Field(
        False, description="Answers are numbers: 1,000 and $1000.00 are the same one."
    )
    classes: dict[str, str] = Field(
        default_factory=dict,
        description="Label to label words: also score each label behind the reasoning (a second "
        "pass, by prefill), for the class distribution given the reasoning.",
    )
    answer_prompt: str = Field(
        "\nThe answer is", description="classes: what stands between reasoning and label words."
    )

    @model_validator(mode="after")
    def _pattern_has_an_answer(self) -> Rationales:
        check_answer_pattern(self.answer_pattern)
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples > 1 at temperature 0 are all the same: raise temperature")
        if len(self.classes) == 1:
            raise ValueError("classes needs two labels at least")
        return self


class Classes(_Asked):
    """The teacher's distribution over label words."""

    kind: Literal["classes"] = "classes"
    classes: dict[str, str | tuple[str, ...]] = Field(
        min_length=2,
        description="Label (as in the gold column) to the words that name it in the prompt; with "
        "channel scoring also a list of wordings, of which the label is an even mixture.",
    )
    scoring: Literal["direct", "verbalizer", "channel"] = Field(
        "direct",
        description="direct: log P(label word | prompt), one prefill; each label's words are one "
        "token. verbalizer: the same for words of several tokens, one prefill a label. channel: "
        "log P(target | prompt with the label), one prefill a label (Min et al. 2022); far better "
        "with small teachers.",
    )
    target: str = Field(
        "{{ text }}", description="channel: template of what is scored behind the prompt."
    )
    prior_correction: Literal["batch", "none"] = Field(
        "batch",
        description="batch: divide by the mean class probability over train rows (Batch "
        "Calibration, Zhou et al. 2024).",
    )
    class_shares: dict[str, Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None,
        description="How often each label is known to occur, where not all are as frequent: the "
        "correction then makes the teacher's mean probabilities over train rows these shares.",
    )

    candidates: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Other ways to ask, by name, for journeyman label --try: settings of this "
        "section (scoring, prompt, classes, ...) that differ.",
    )

    def templates(self) -> dict[str, str]:
        return {"labels.prompt": self.prompt, "labels.target": self.target}

    def candidate(self, name: str) -> Classes:
        """This section as a candidate has it."""
        own = self.model_dump(exclude={"candidates"})
        return Classes.model_validate(own | self.candidates[name])

    def kept_candidates(self, taken: str) -> dict[str, dict[str, Any]]:
        """Settings to add to candidates, by name, so that each stays the way that it is once one
        of them has become this section's own; ``before`` is what that was."""
        names = ("before", *(f"before-{i}" for i in range(2, len(self.candidates) + 3)))
        before = next(name for name in names if name not in self.candidates)
        own = self.model_dump(mode="json", include=set(self.candidates[taken]))
        others = {
            name: {key: value for key, value in own.items() if key not in changes}
            for name, changes in self.candidates.items()
            if name != taken
        }
        return {name: added for name, added in others.items() if added} | {before: own}

    def wordings(self) -> tuple[tuple[str, ...], ...]:
        """The words of each label, one wording or several."""
        return tuple((w,) if isinstance(w, str) else w for w in self.classes.values())

    def one_wording(self) -> dict[str, str]:
        """Label to its words, for scorings that take one wording of each."""
        return {label: words[0] for label, words in zip(self.classes, self.wordings(), strict=True)}

    def asked(self) -> dict[str, Any]:
        # Datasets that were made before there was this setting are the same without it.
        asked = {name: value for name, value in super().asked().items() if name != "candidates"}
        return asked if self.class_shares else {k: v for k, v in asked.items() if k != _SHARES}

    @model_validator(mode="after")
    def _prompt_fits_scoring(self) -> Classes:
        if self.scoring == "channel" and "label" not in self.prompt:
            raise ValueError("prompt must name {{ label }} when scoring is channel")
        for label, words in zip(self.classes, self.wordings(), strict=True):
            if not words:
                raise ValueError(f"classes.{label} is an empty list; give it one wording at least")
            if self.scoring != "channel" and len(words) > 1:
                raise ValueError(
                    f"classes.{label} has {len(words)} wordings, and scoring: {self.scoring} takes "
                    "one; scoring: channel takes several"
                )
        if self.scoring != "channel" and len(set(self.wordings())) < len(self.classes):
            raise ValueError("classes must have label words that differ from one another")
        if self.scoring == "channel" and self.chat:
            raise ValueError("chat does not go with scoring: channel; write the turns into prompt")
        return self

    @model_validator(mode="after")
    def _candidates_are_ways_to_ask(self) -> Classes:
        for name, changes in self.candidates.items():
            if unknown := sorted(set(changes) - _OF_CANDIDATES):
                raise ValueError(
                    f"candidates.{name}.{unknown[0]} is none of {', '.join(sorted(_OF_CANDIDATES))}"
                )
            if set(changes.get("classes", self.classes)) != set(self.classes):
                raise ValueError(f"candidates.{name}.classes must have the labels of classes")
            try:
                self.candidate(name)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, ("candidates", name, *first["loc"])))
                raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    @model_validator(mode="after")
    def _shares_are_of_the_classes(self) -> Classes:
        if self.class_shares is None:
            return self
        if set(self.class_shares) != set(self.classes):
            raise ValueError(
                f"class_shares must name each label of classes ({', '.join(self.classes)}), got "
                f"{', '.join(self.class_shares)}"
            )
        total = sum(self.class_shares.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"class_shares must add up to 1, got {total:g}")
        if self.prior_correction == "none":
            raise ValueError("class_shares goes with prior_correction: batch")
        return self


TokenLabels = Logits | Generate
Labels = Annotated[
    Classes | Logits | Generate | Rationales,
    Field(
        discriminator="kind",
        description="kind: classes (the default), logits, generate or rationales; each has "
        "settings of its own.",
    ),
]
