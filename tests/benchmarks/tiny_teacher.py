"""A teacher so small that capture is what takes the time: two layers, 64 wide, random weights,
with the whole vocabulary and the tokenizer of the demo's teacher."""

from __future__ import annotations

from pathlib import Path

from journeyman.models import Model


def make(folder: Path, like: Model) -> Path:
    """Write the model's folder, unless it is there; returns it."""
    import torch
    import transformers

    if (folder / "config.json").exists():
        return folder
    config = transformers.AutoConfig.from_pretrained(like.path)
    # The CPU attention of vLLM needs heads of 32 at least.
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)  # neither flat nor all on one token
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(like.path).save_pretrained(folder)
    return folder
