"""ONNX files: a student's graph with any batch and length, and the same with int8 weights.

The one place that knows ``torch.onnx`` and ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from journeyman.errors import ModelError
from journeyman.student import models
from journeyman.student.formats.held_out import Answer

FILE = "model.onnx"
_MOST_BYTES = 1_800_000_000  # of weights in the file itself: a protobuf message ends at 2 GiB
_INPUTS, _OUTPUT = ("input_ids", "attention_mask"), "logits"


def check_packages() -> dict[str, str]:
    """Versions of what this needs; raises ModelError where some is missing."""
    found = {"torch": str(torch.__version__)}
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError as error:
            raise ModelError(
                f"exporting to ONNX needs the packages onnx, onnxscript and onnxruntime ({error}); "
                "pip install 'journeyman[export]'."
            ) from error
    return found


def write(model: Any, folder: Path) -> None:
    """Write ``model`` (a ``transformers`` one, on the CPU) to folder/model.onnx, float32.

    Inputs input_ids and attention_mask, int64[batch, time]; output logits, float32[batch, classes],
    of language models float32[batch, time, vocabulary], without a cache of keys and values.
    Large weights go to a second file beside it. Raises ModelError.
    """
    tokens = torch.arange(2 * 8).reshape(2, 8) % 8
    attended = torch.ones_like(tokens)
    attended[1, 6:] = 0
    axes = {0: "batch", 1: "time"}
    n_bytes = sum(p.nbytes for p in model.parameters())
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Plain(model).eval(),
                (tokens, attended),
                folder / FILE,
                input_names=_INPUTS,
                output_names=(_OUTPUT,),
                dynamic_shapes=dict.fromkeys(_INPUTS, axes),
                external_data=n_bytes > _MOST_BYTES,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be written as ONNX: torch's exporter says: {first}"
        ) from error


class _Plain(torch.nn.Module):
    """Tokens in, logits out: what an ONNX graph has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._options = models.no_cache(model)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **self._options
        ).logits
        return logits


def quantise(source: Path, folder: Path) -> None:
    """Write folder/model.onnx: the same with int8 weights (one scale a column) in matrix products
    and embeddings, whose inputs become int8 as they come (dynamic quantisation)."""
    quantization = importlib.import_module("onnxruntime.quantization")
    with _quiet():
        quantization.quantize_dynamic(
            source,
            folder / FILE,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            # Seven bits of them: on x86 without VNNI, ONNX Runtime adds two products in 16 bits,
            # which eight bits overflow.
            reduce_range=True,
            use_external_data_format=_bytes(source.parent) > _MOST_BYTES,
            # Products of two activations (attention) stay as they are.
            extra_options={"MatMulConstBOnly": True},
        )


def answers(path: Path) -> Answer:
    """The file in ONNX Runtime, on as many threads of the CPU as torch uses."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        fed = dict(zip(_INPUTS, (input_ids, mask), strict=True))
        logits: np.ndarray = session.run([_OUTPUT], fed)[0]
        return logits

    return answer


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(f"{FILE}*"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Spare the terminal notes on torchvision and on names of axes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
