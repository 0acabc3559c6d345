"""Inside vLLM's worker processes: from hidden states to top-k entries or true draws, in batches.

vLLM 0.29 takes prompt log-probabilities request by request, over all positions, and counts the rank
of each token, which nobody reads here. An engine of ours installs these functions in its workers
over vLLM's public ``worker_extension_cls`` and ``collective_rpc``; where the runner is another
than the one they were written for, vLLM's own way stays, and only true draws are not to be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from journeyman.teacher import adapter, norms

if TYPE_CHECKING:
    import torch

WRITTEN_FOR = "0.29."
START = "journeyman_start"  # extra_args: first prompt position whose token is scored
SEED = "journeyman_seed"  # extra_args: 64 bits that decide a row's draws

# Logits projected at a time, in bytes: what bounds memory on a GPU. On a CPU, glibc hands memory of
# more than 32 MiB back to the kernel each time it is freed, and its page faults are dear: projected
# in chunks just below that, a position takes 115 us (576 wide, 49,152 words) and 16 us (64 wide);
# in larger chunks 142 and 48.
_CHUNK_GPU, _CHUNK_CPU = 256 << 20, 28 << 20
_BLOCK = 64  # entries of a vocabulary block


class Capture:
    """Mixed into vLLM's worker class; its methods are called over ``collective_rpc``."""

    def journeyman_capture(self, draws: int) -> str:
        """Take over capture in this worker; draws: of each position, 0 for top-k entries.

        Returns the reason why vLLM's own way stays, empty if it does not.
        """
        import vllm

        runner = self.model_runner  # type: ignore[attr-defined]
        adapter.take_over_logits(runner.model)
        if not vllm.__version__.startswith(WRITTEN_FOR):
            return f"vLLM {vllm.__version__}, written for {WRITTEN_FOR}x"
        if not hasattr(runner, "_get_prompt_logprobs_dict") or not hasattr(runner, "sampler"):
            return f"{type(runner).__module__}.{type(runner).__name__} is another model runner"
        if runner.model_config.logprobs_mode != "raw_logprobs":
            return f"logprobs_mode is {runner.model_config.logprobs_mode}"
        select = _Draws(draws) if draws else _TopK()
        runner._get_prompt_logprobs_dict = _PromptLogprobs(runner, select)
        runner.sampler.gather_logprobs = select.sampled
        if runner.device.type == "cpu":
            runner.sampler.greedy_sample = likeliest
            norms.fuse(runner.model)
        return ""


class _Piece(NamedTuple):
    """Consecutive positions of one request in this step."""

    rows: range  # of the step's hidden states
    out: range  # of the request's own arrays
    position: int  # in the prompt, of the first
    targets: list[int]
    seed: int
    tensors: Any  # the request's LogprobsTensors


class _PromptLogprobs:
    """In place of ``GPUModelRunner._get_prompt_logprobs_dict``: the same contract, but a request's
    arrays begin at its START, and all requests of a step are projected together."""

    def __init__(self, runner: Any, select: _TopK | _Draws) -> None:
        self._runner = runner
        self._select = select
        most = _CHUNK_CPU if runner.device.type == "cpu" else _CHUNK_GPU
        self._chunk = max(1, most // (4 * runner.model_config.get_vocab_size()))  # positions

    def __call__(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        runner = self._runner
        wanted = runner.num_prompt_logprobs
        if not wanted:
            return {}
        done: dict[str, Any] = {}
        by_k: dict[int, list[_Piece]] = {}
        for request_id, k in wanted.items():
            n_tokens = num_scheduled_tokens.get(request_id)
            request = runner.requests[request_id]
            if n_tokens is None or request.prompt_token_ids is None:
                continue  # preempted, or a prompt of embeddings
            piece, complete = self._piece(request_id, request, k, n_tokens)
            if complete:
                done[request_id] = piece.tensors
                request.in_progress_prompt_logprobs_cpu = None
            if piece.rows:
                by_k.setdefault(k, []).append(piece)
        for request_id in done:
            del wanted[request_id]
        for k, pieces in by_k.items():
            self._project(hidden_states, pieces, k)
        if done:
            runner._sync_device()
        return done

    def _piece(self, request_id: str, request: Any, k: int, n_tokens: int) -> tuple[_Piece, bool]:
        """This step's positions of a request, and whether they are its last."""
        from vllm.v1.outputs import LogprobsTensors

        prompt = request.prompt_token_ids
        extra = request.sampling_params.extra_args or {}
        first = extra.get(START, 1) - 1  # the position that predicts the first scored token
        tensors = request.in_progress_prompt_logprobs_cpu
        if tensors is None:
            tensors = LogprobsTensors.empty_cpu(len(prompt) - 1 - first, k + 1)
            request.in_progress_prompt_logprobs_cpu = tensors
        begin = request.num_computed_tokens
        complete = begin + n_tokens >= len(prompt)
        end = min(begin + n_tokens, len(prompt) - 1)
        low = max(begin, first)
        index = self._runner.input_batch.req_id_to_index[request_id]
        offset = self._runner.query_start_loc.np[index].item() - begin
        piece = _Piece(
            rows=range(offset + low, offset + max(low, end)),
            out=range(low - first, max(low, end) - first),
            position=low,
            targets=prompt[low + 1 : max(low, end) + 1],
            seed=extra.get(SEED, 0),
            tensors=tensors,
        )
        return piece, complete

    def _project(self, hidden_states: torch.Tensor, pieces: list[_Piece], k: int) -> None:
        import torch

        runner = self._runner
        rows = torch.tensor([r for p in pieces for r in p.rows], device=runner.device)
        targets = torch.tensor([t for p in pieces for t in p.targets], device=runner.device)
        noise = self._select.noise(pieces, k)
        parts = []
        for begin in range(0, len(rows), self._chunk):
            chunk = slice(begin, begin + self._chunk)
            logits = runner.model.compute_logits(hidden_states[rows[chunk]])
            logprobs = logits.to(torch.float32)
            torch.log_softmax(logprobs, -1, out=logprobs)
            uniform = None if noise is None else noise[chunk].to(runner.device)
            parts.append(self._select(logprobs, k, targets[chunk], uniform))
        token_ids, values = (torch.cat(p) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        begin = 0
        for piece in pieces:
            end, out = begin + len(piece.out), slice(piece.out.start, piece.out.stop)
            piece.tensors.logprob_token_ids[out].copy_(token_ids[begin:end], non_blocking=True)
            piece.tensors.logprobs[out].copy_(values[begin:end], non_blocking=True)
            begin = end


class _TopK:
    """The k most likely entries of each position, behind the target's own."""

    def noise(self, pieces: list[_Piece], k: int) -> None:
        return None

    def __call__(
        self, logprobs: torch.Tensor, k: int, targets: torch.Tensor, _: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 and float32[positions, 1 + k]; logprobs: float32[positions, vocabulary]."""
        import torch

        own = targets.unsqueeze(-1)
        values = logprobs.gather(1, own)
        if not k:
            return own.to(torch.int32), values
        top_values, top_ids = _top_k(logprobs, k)
        ids = torch.cat((own, top_ids), dim=1).to(torch.int32)
        return ids, torch.cat((values, top_values), dim=1)

    def sampled(self, logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        """In place of ``Sampler.gather_logprobs``, without the ranks."""
        from vllm.v1.outputs import LogprobsTensors

        ids, values = self(logprobs, num_logprobs, token_ids)
        return LogprobsTensors(ids, values, ids.new_zeros(len(ids)))


class _Draws(_TopK):
    """k true draws from the whole distribution of each position, with replacement."""

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._generator = np.random.default_rng()

    def noise(self, pieces: list[_Piece], k: int) -> torch.Tensor | None:
        """float64[positions, k], uniform; the same for a row wherever and whenever it is run."""
        import torch

        if k != self._draws:
            return None
        return torch.from_numpy(np.concatenate([uniform(p.seed, p.position, len(p.rows), k)
                                                for p in pieces]))  # fmt: skip

    def __call__(
        self, logprobs: torch.Tensor, k: int, targets: torch.Tensor, uniform: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if k != self._draws:
            return super().__call__(logprobs, k, targets)
        if uniform is None:  # while generating, whose own draws repeat no more than these
            uniform = torch.from_numpy(self._generator.random((len(logprobs), k)))
        own = targets.unsqueeze(-1)
        value = logprobs.gather(1, own)
        probabilities = logprobs.exp_()  # in place: nobody reads them after this
        drawn = draw(probabilities, uniform.to(logprobs.device))
        ids = torch.cat((own, drawn), dim=1).to(torch.int32)
        return ids, torch.cat((value, probabilities.gather(1, drawn).log_()), dim=1)


def uniform(seed: int, position: int, n_positions: int, k: int) -> np.ndarray:
    """float64[n_positions, k] in [0, 1): Philox in counter mode, so that a prompt taken in
    several pieces gets the numbers that it gets in one."""
    blocks = -(-k // 4)  # Philox makes four numbers a block
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position * blocks))
    return generator.random((n_positions, 4 * blocks))[:, :k]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """int64[n]: the first of the largest entries of each row, by way of block maxima: ``argmax`` of
    PyTorch 2.13 takes 20 to 38 us a row on a CPU, a ninth of generating with a small teacher, and
    this 3 to 8."""
    n, vocabulary = logits.shape
    if vocabulary % _BLOCK:
        return logits.argmax(-1)
    blocks = logits.view(n, -1, _BLOCK)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1)
    return best.squeeze(1) * _BLOCK + inside.argmax(-1)


def _top_k(logprobs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of the k largest entries, sorted. On a CPU by way of block maxima: the k
    largest entries lie in the k blocks with the largest maxima (17 against 28 us at k = 64)."""
    n, vocabulary = logprobs.shape
    n_blocks = vocabulary // _BLOCK
    if logprobs.device.type != "cpu" or vocabulary % _BLOCK or 4 * k > n_blocks:
        values, ids = logprobs.topk(k, dim=-1)
        return values, ids
    blocks = logprobs.view(n, n_blocks, _BLOCK)
    best = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, _BLOCK)).view(n, -1)
    values, at = candidates.topk(k, dim=-1)
    return values, best.gather(1, at // _BLOCK) * _BLOCK + at % _BLOCK


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64[positions, k]: inverse-CDF draws, block first, then inside it; sums in float64.

    probabilities: float32[positions, vocabulary]; uniform: float64[positions, k].
    """
    import torch

    n, vocabulary = probabilities.shape
    if pad := -vocabulary % _BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, pad))
    blocks = probabilities.view(n, -1, _BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    point = uniform * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, point, right=True).clamp_(max=blocks.shape[1] - 1)
    below = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).to(torch.float64)
    rest = (point - below).unsqueeze(-1)
    offset = (inside.cumsum(-1) <= rest).sum(-1).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + offset).clamp_(max=vocabulary - 1)
