"""The large model that labels: run by vLLM on the cluster, or behind a URL."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from journeyman.recipe.base import Count, Seconds, Section, Share

Dollars = Annotated[float, Field(ge=0)]


class Price(Section):
    """What labeling costs in dollars; what is not given counts as nothing."""

    per_replica_hour: Dollars = Field(0.0, description="Of one replica (all of its GPUs).")
    per_million_prompt_tokens: Dollars = Field(0.0, description="As an API bills them.")
    per_million_cached_tokens: Dollars | None = Field(
        None, description="Prompt tokens read from the prefix cache; default as prompt tokens."
    )
    per_million_output_tokens: Dollars = Field(0.0, description="As an API bills them.")


# vLLM's arguments that a field of ours sets; a second setting would be part of no identity.
_OWN_FIELDS = {
    name: name
    for name in ("model", "revision", "dtype", "max_model_len", "max_num_seqs",
                 "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size",
                 "gpu_memory_utilization")
} | {"enable_lora": "lora", "max_loras": "lora", "max_lora_rank": "lora"}  # fmt: skip
# Those that change what a model says.
DECIDING_ARGUMENTS = (
    "quantization", "kv_cache_dtype", "hf_overrides", "load_format", "tokenizer", "tokenizer_mode",
    "tokenizer_revision", "code_revision", "config_format", "generation_config",
    "override_generation_config", "logits_processors", "speculative_config", "rope_scaling",
    "rope_theta", "disable_sliding_window", "lora_dtype", "additional_config", "model_impl",
    "attention_backend",
)  # fmt: skip
_TAKEN = {"logprobs_mode", "max_logprobs", "worker_extension_cls", "skip_tokenizer_init"}


class Teacher(Section):
    """The large model that labels, as vLLM runs it or as a URL serves it."""

    model: str = Field(
        description="Hub id, local folder, .gguf file, or package://NAME/RESOURCE (a file or "
        "folder that an installed Python package carries); with url, the name it is served under."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    lora: str | None = Field(
        None, description="LoRA adapter on the teacher: hub id or local folder."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and activations; on a CPU float32 is often the fastest."
    )
    max_model_len: Count | None = Field(
        None, description="Longest prompt plus output in tokens; default the model's own."
    )
    max_num_seqs: Count = Field(256, description="Sequences in the engine at a time.")
    max_num_batched_tokens: Count | None = Field(
        None, description="Tokens of one engine step; default vLLM's."
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that share each layer.")
    pipeline_parallel_size: Count = Field(1, description="Groups of layers, each on its own GPUs.")
    gpu_memory_utilization: Share = Field(0.9, description="Share of a GPU's memory to use.")
    cpu_kv_cache_gib: Annotated[float, Field(gt=0)] = Field(
        2.0, description="KV cache of a CPU replica in GiB."
    )
    start_timeout_s: Seconds = Field(
        600.0, description="Deadline of an engine's start, or of a silence behind a url."
    )
    request_timeout_s: Seconds = Field(300.0, description="Deadline of one request.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Any other vLLM engine argument, passed on as it is."
    )

    @field_validator("engine_args")
    @classmethod
    def _has_no_field_of_its_own(cls, given: dict[str, Any]) -> dict[str, Any]:
        if named := sorted(given.keys() & _OWN_FIELDS):
            raise ValueError(f"{named[0]} is set by the recipe: teacher.{_OWN_FIELDS[named[0]]}")
        if taken := sorted(given.keys() & _TAKEN):
            raise ValueError(f"{taken[0]} cannot be set: capturing log-probabilities depends on it")
        return given

    url: str | None = Field(
        None,
        description="Base URL of an OpenAI-compatible API (https://host/v1) that serves the "
        "teacher, instead of an engine of our own.",
    )
    column: str | None = Field(
        None,
        description="Column of corpus.columns.meta with what the teacher wrote behind each row, "
        "elsewhere and before: generate and rationales without an engine. model is its name then.",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="url: environment variable that holds the API key, if any."
    )
    requests_per_minute: Count | None = Field(
        None, description="url: rate limit, over all replicas."
    )
    tokens_per_minute: Count | None = Field(
        None, description="url: rate limit on prompt and output tokens, over all replicas."
    )
    max_retries: Annotated[int, Field(ge=0)] = Field(
        6, description="url: retries of a request that met 408, 429, 5xx or a lost connection, "
        "with growing pauses, or as long as Retry-After says."
    )  # fmt: skip
    price: Price = Field(default_factory=Price, description="What it costs.")

    def decisive(self, overflow: str) -> dict[str, Any]:
        """Settings that change what the model says of a text; overflow: of ``labels``."""
        decided = {n: v for n, v in self.engine_args.items() if n in DECIDING_ARGUMENTS}
        facts: dict[str, Any] = {"dtype": self.dtype, "engine_args": decided}
        if overflow.startswith("truncate"):
            facts["max_model_len"] = self.max_model_len
        return facts

    @property
    def gives_text_alone(self) -> bool:
        """Whether it is not an engine of ours, and so has neither tokens nor distributions."""
        return bool(self.url or self.column)

    @property
    def n_workers(self) -> int:
        """Workers of an engine, each on its GPUs."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def spread(self) -> bool:
        """Whether its workers are Ray's, on any nodes, and not those of one node."""
        return self.n_workers > 1 and self.engine_args.get("distributed_executor_backend") == "ray"

    @model_validator(mode="after")
    def _column_is_read(self) -> Teacher:
        if self.column and (self.url or self.lora):
            raise ValueError("column holds what was written before; url and lora are for teachers "
                             "that still have to write")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _url_runs_no_engine(self) -> Teacher:
        if self.url and self.lora:
            raise ValueError("lora needs an engine of our own; an API names its adapter in model")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        return self
