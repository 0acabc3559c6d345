"""GGUF files of Llama-architecture students, as llama.cpp and its kin read them.

The one place that knows the package ``gguf``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from journeyman.errors import ModelError
from journeyman.student import models

Precision = Literal["f32", "f16", "q8_0"]
PRECISIONS: tuple[Precision, ...] = ("f32", "f16", "q8_0")
FILE = "model.gguf"

# How llama.cpp splits text before it merges bytes: its names of what a tokenizer.json says.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_packages() -> dict[str, str]:
    """Versions of what this needs; raises ModelError where some is missing."""
    from importlib import metadata

    for name in ("gguf", "accelerate"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ModelError(
                f"exporting to GGUF needs the packages gguf and accelerate ({error}); "
                "pip install 'journeyman[export]'."
            ) from error
    return {"gguf": metadata.version("gguf")}


def write(model: Any, student_dir: Path, folder: Path, name: str, precision: Precision) -> None:
    """Write ``model``, float32, to folder/model.gguf with the tokenizer of student_dir.

    precision: of matrices; vectors stay float32. Raises ModelError for what is no Llama, or has a
    tokenizer that llama.cpp would read otherwise.
    """
    import gguf

    check_architecture(model.config)
    tokenizer = _Tokenizer(student_dir, model.config.vocab_size)
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(name)
    _add_settings(writer, model.config)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[precision]
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer.add_to(writer)
    for tensor_name, values in tensors(model):
        kind = gguf.GGMLQuantizationType[_precision(values, precision)]
        writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_architecture(config: Any) -> None:
    """Raises ModelError for models that the file's ``llama`` architecture does not describe."""
    if config.model_type != "llama":
        raise ModelError(
            f"GGUF is written of Llama-architecture language models, and this student is "
            f"{config.model_type}; export it to onnx or int8."
        )
    rope = config.rope_parameters["rope_type"]
    odd = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if rope != "default":
        odd.append(f"rope_type {rope}")
    if odd:
        raise ModelError(
            f"GGUF is written of plain Llamas, and this student has {' and '.join(odd)}; export "
            "it to onnx or int8."
        )


def _add_settings(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, float32, as the file has them; a shared output projection is left out."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        layer = name.split(".")[-2]
        if layer in heads:
            values = _interleaved(values, heads[layer])
        yield names.get_name(name, try_suffixes=(".weight",)), values


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of each head's two halves in turns: llama.cpp's ``llama`` rotates neighbours, where
    ``transformers`` rotates a head's first half with its second."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _precision(values: np.ndarray, wanted: Precision) -> str:
    if values.ndim == 1 or (wanted == "q8_0" and values.shape[-1] % 32):  # a block is 32 values
        return "F32" if values.ndim == 1 else "F16"
    return wanted.upper()


class _Tokenizer:
    """A byte-level BPE tokenizer, read from its tokenizer.json."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._pre = _pre_tokenizer(content)
        if content.get("model", {}).get("type") != "BPE" or not self._pre:
            raise ModelError(
                f"{folder}: GGUF is written with byte-level BPE tokenizers that split text as "
                "GPT-2's, SmolLM's or Llama 3's does, and this student's is another; export it to "
                "onnx or int8."
            )
        self._folder, self._vocab_size = folder, vocab_size
        self._vocab: dict[str, int] = content["model"]["vocab"]
        self._added: list[dict[str, Any]] = content.get("added_tokens", [])

    def add_to(self, writer: Any) -> None:
        import gguf

        kinds = gguf.TokenType
        # Ids that no text gives stand for themselves.
        tokens = [f"[PAD{i}]" for i in range(self._vocab_size)]
        types = [kinds.UNUSED] * self._vocab_size
        for token, number in self._vocab.items():
            tokens[number], types[number] = token, kinds.NORMAL
        for added in self._added:
            special = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], special
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self._pre)
        writer.add_add_space_prefix(False)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(self._folder, load_merges=True, n_vocab=self._vocab_size)
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text; empty if it has none that we know."""
    if content.get("normalizer"):
        return ""
    found = content.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    if parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return ""
    by_regex = parts[-1].get("use_regex", True)
    match parts[:-1]:
        case [] if by_regex:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}] if by_regex:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}] if (
            not by_regex and regex == _LLAMA_3
        ):
            return "llama-bpe"
    return ""


def read(path: Path) -> Any:
    """The file as ``transformers`` reads it: a model, float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    # Its bar of tensors is tqdm's own, which transformers' logging (5.23) does not know.
    with models.quiet(), contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
