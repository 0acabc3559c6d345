"""What a student's model is checked for before it trains."""

from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config

from journeyman.errors import ModelError
from journeyman.student.models import check_positions

FOLDER = Path("student")


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (BertConfig(max_position_embeddings=512), 512),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (GPT2Config(n_positions=1024), 1024),
    ],
)
def test_inputs_longer_than_a_students_positions_are_refused(config: object, most: int):
    check_positions(config, most, FOLDER)
    with pytest.raises(ModelError, match=f"student reads {most} tokens at most, and {most + 1}"):
        check_positions(config, most + 1, FOLDER)


def test_a_model_without_positions_reads_any_length():
    check_positions(T5Config(), 100_000, FOLDER)
