"""The yes/no answers of DPG-Bench from a model of the transformers library."""

import numpy as np
import pytest
import transformers

from trm_diffusion.errors import UserError
from trm_diffusion.metrics.vqa import TransformersVqa


def test_a_blip_model_answers(tmp_path):
    """A tiny random model, saved and loaded like a user's, gives the same text each time."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "is", "it", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    processor = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(processor, tokenizer).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "encoder_hidden_size": 8, "bos_token_id": 5, "eos_token_id": 3}
    text |= {"sep_token_id": 3, "pad_token_id": 0}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.BlipForQuestionAnswering(config).save_pretrained(tmp_path)

    vqa = TransformersVqa(str(tmp_path))
    image = np.full((20, 20, 3), 128, np.uint8)
    answer = vqa(image, "is it red")
    assert isinstance(answer, str) and answer == vqa(image, "is it red")
    with pytest.raises(UserError, match="--vqa="):
        TransformersVqa(str(tmp_path / "absent"))
