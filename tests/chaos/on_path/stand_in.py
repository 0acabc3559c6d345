"""An engine that starts in no time: what a replica needs of one, and a core process to be killed.

Its answers depend on the row's tokens alone, so that any two runs agree.
"""

import asyncio
import contextlib
import hashlib
import subprocess
import sys
import threading

import numpy as np

from journeyman.errors import ModelError
from journeyman.teacher.answers import Recorded

VOCABULARY = 256
# Lives until its replica's end of the pipe is closed, however that comes about.
_CORE = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()", "VLLM::EngineCore"]


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, without special ones."""

    bos_token_id = None
    added_tokens_decoder: dict = {}  # noqa: RUF012
    all_special_tokens: tuple = ()

    def encode(self, text, add_special_tokens=True, split_special_tokens=False):
        return list(text.encode())

    def decode(self, token_ids, skip_special_tokens=False):
        return bytes(token_ids).decode(errors="replace")


def answer(token_ids, start, k):
    """The distributions recorded of the tokens from ``start`` on."""
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=8)
    generator = np.random.default_rng(int.from_bytes(digest.digest(), "big"))
    logits = generator.normal(scale=3, size=(len(token_ids) - start, VOCABULARY))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return Recorded(
        token_ids=ids.astype(np.int32),
        logprobs=np.take_along_axis(logprobs, ids, axis=1).astype(np.float32),
    )


def engine(module):
    """The class to put in the place of ``module.Engine``."""

    class Engine:
        """teacher.engine_args: row_s, start_s: how long each takes."""

        stock_capture = ""

        def __init__(self, settings, model, draws=0, node_labels=None):
            self.settings = settings
            self.max_num_seqs = settings.max_num_seqs
            self.max_model_len = settings.max_model_len
            self.tokenizer = _tokenizer(model)
            self._row_s = settings.engine_args["row_s"]
            self._start_s = settings.engine_args["start_s"]
            self._core = None

        @property
        def alive(self):
            return self._core is not None and not self._died.done()

        async def start(self):
            if self.alive:
                return
            self.close()
            self._running = asyncio.Semaphore(self.max_num_seqs)
            self._core = subprocess.Popen(_CORE, stdin=subprocess.PIPE)
            self._died = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._watch, args=(self._core, self._died), daemon=True).start()
            await asyncio.wait({self._died}, timeout=self._start_s)
            if not self.alive:
                raise ModelError("the stand-in's core was killed while it started.")

        def close(self):
            if self._core is not None:
                self._core.kill()
                self._core.stdin.close()
                self._core = None

        @staticmethod
        def _watch(core, died):
            core.wait()
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                died.get_loop().call_soon_threadsafe(died.set_result, None)

        async def record_target(self, token_ids, start, k, seed=0):
            if not self.alive:
                raise module.EngineDied
            died = self._died
            async with self._running:
                await asyncio.wait({died}, timeout=self._row_s)
            if died.done():
                raise module.EngineDied
            return answer(token_ids, start, k), 0

    return Engine


def _tokenizer(model):
    if not (model.path / "tokenizer.json").exists():
        return Bytes()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)
