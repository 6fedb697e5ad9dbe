"""Pretrained text encoders against the transformers library, SD3's three against diffusers' pipeline, in float32."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.parity.common import randomize
from trm_diffusion.data.text_encoders import PretrainedEncoder
from trm_diffusion.errors import UserError
from trm_diffusion.models.text import TextConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["a red circle left of a blue square", "", "stars " * 20, "stars " * 60]  # CLIP truncates two, T5 the last
SD3 = TextConfig(encoder="encoded", length=333, features=4096, pooled_features=2048, recipe="sd3")


def clip_tokenizer(**options):
    words = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **options)


def clip(kind, width: int, activation: str = "quick_gelu"):
    sizes = dict(hidden_size=width, projection_dim=width, intermediate_size=32, num_attention_heads=4)
    ids = dict(vocab_size=55, bos_token_id=53, eos_token_id=54, pad_token_id=54)
    return randomize(kind(CLIPTextConfig(num_hidden_layers=3, hidden_act=activation, **sizes, **ids)))


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)], extra_ids=0)


def t5(width: int):
    sizes = dict(d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=30)
    return randomize(T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Published widths and folders, few layers, random weights. CLIP-G pads with another token than CLIP-L."""
    parts = dict(transformer=None, vae=None, scheduler=None)
    parts |= dict(text_encoder=clip(CLIPTextModelWithProjection, 768), tokenizer=clip_tokenizer())
    parts |= dict(text_encoder_2=clip(CLIPTextModelWithProjection, 1280, "gelu"))
    parts |= dict(tokenizer_2=clip_tokenizer(pad_token="!"), text_encoder_3=t5(4096), tokenizer_3=t5_tokenizer())
    pipeline = StableDiffusion3Pipeline(**parts)
    directory = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(directory)
    return pipeline, directory


def test_sd3_equals_the_published_pipeline(pipeline):
    pipeline, directory = pipeline
    config = TextConfig(**{**vars(SD3), "pretrained": str(directory)})
    encoder = PretrainedEncoder(config)
    ours = encoder(TEXTS)
    with torch.no_grad():
        states, null, pooled, null_pooled = pipeline.encode_prompt(TEXTS, TEXTS, TEXTS)
    assert states.shape == (4, 333, 4096) and pooled.shape == (4, 2048)
    for found, wanted in ((ours.states, states), (ours.pooled, pooled)):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5 * float(wanted.abs().max()))
    np.testing.assert_allclose(ours.states[1], null[0].numpy(), atol=1e-4)  # guidance uses the empty text
    np.testing.assert_allclose(ours.pooled[1], null_pooled[0].numpy(), atol=1e-4)
    assert ours.mask.all() and ours.mask.dtype == bool and ours.states.dtype == np.float32
    assert [part["class"] for part in encoder.encoding["encoders"]] == [
        "CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"
    ]  # fmt: skip
    again = PretrainedEncoder(config)
    assert again.encoding == encoder.encoding and len(encoder.encoding["encoders"][0]["weights_sha256"]) == 64
    np.testing.assert_array_equal(again(TEXTS).states, ours.states)
    with pytest.raises(UserError, match="config.model.text.features is 2048; .* have 4096"):
        PretrainedEncoder(TextConfig(**{**vars(config), "features": 2048}))


def bert(directory):
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle"]))
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=7)
    return randomize(BertModel(BertConfig(**sizes))), BertTokenizer(str(directory / "vocab.txt"))


@pytest.mark.parametrize("kind", ["clip with projection", "clip", "t5", "bert"])
def test_single_encoders_equal_the_library(tmp_path, kind):
    """States and pooled vectors equal those of each text alone, without padding."""
    model, tokenizer = {
        "clip with projection": lambda: (clip(CLIPTextModelWithProjection, 16), clip_tokenizer()),
        "clip": lambda: (clip(CLIPTextModel, 16), clip_tokenizer()),
        "t5": lambda: (t5(16), t5_tokenizer()),
        "bert": lambda: bert(tmp_path),
    }[kind]()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = TextConfig(encoder="encoded", length=24, features=16, pooled_features=16, pretrained=str(tmp_path))
    texts = ["red circle", "", "circle"]
    ours = PretrainedEncoder(config)(texts)
    for row, text in enumerate(texts):
        with torch.no_grad():
            output = model(**{"input_ids": tokenizer(text, return_tensors="pt").input_ids})
        states = output.last_hidden_state[0].numpy()
        count = ours.mask[row].sum()
        assert count == len(states)
        np.testing.assert_allclose(ours.states[row, :count], states, atol=2e-5)
        pooled = {"clip with projection": "text_embeds", "t5": None}.get(kind, "pooler_output")
        wanted = getattr(output, pooled)[0].numpy() if pooled else states.mean(0)
        np.testing.assert_allclose(ours.pooled[row], wanted, atol=2e-5)


def test_what_is_no_encoder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="config.model.text.pretrained=.*absent: cannot load text encoders") as caught:
        PretrainedEncoder(TextConfig(encoder="encoded", pretrained=str(tmp_path / "absent")))
    assert "\n" not in str(caught.value)
