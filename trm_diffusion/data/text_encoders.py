"""Pretrained text encoders of the `transformers` library, as an optional extra (requirements-text.txt).

Two recipes combine their outputs into one `Text`:

single  one encoder (CLIP's text model, T5's encoder, BERT and similar): its last states; pooled is CLIP's projected
        text, else the encoder's own pooled output, else the mean state of the tokens that are not padding.
sd3     Stable Diffusion 3's three (arXiv 2403.03206), in the folders of its published pipeline. The penultimate states
        of both CLIPs are concatenated by features and zero-padded to T5's width; T5's states follow as further tokens.
        pooled is the concatenation of both CLIPs' projected texts. Padding is attended to, so the mask is all True.
"""

import importlib.metadata
import json
from collections.abc import Sequence

import numpy as np

from trm_diffusion.errors import UserError
from trm_diffusion.files import sha256_of_arrays, sha256_of_text
from trm_diffusion.models.text import CLIP_LENGTH, Text, TextConfig

TEXTS_AT_ONCE = 16
SD3_PARTS = (  # class, folder of the encoder, folder of its tokenizer
    ("CLIPTextModelWithProjection", "text_encoder", "tokenizer"),
    ("CLIPTextModelWithProjection", "text_encoder_2", "tokenizer_2"),
    ("T5EncoderModel", "text_encoder_3", "tokenizer_3"),
)


class PretrainedEncoder:
    """Texts -> `Text` of NumPy arrays: states float32 [B, L, C], mask bool [B, L], pooled float32 [B, P].

    Runs on torch's GPU if there is one, else on the CPU. Texts that are too long are truncated.

    Attributes:
      encoding: what determines the encoded values, for JSON: recipe, sizes, dtype, and weight and tokenizer checksums.
      origin: where the encoders came from, for JSON.

    Raises:
      UserError: packages or encoders are missing, or the encoders' sizes differ from the config's.
    """

    def __init__(self, config: TextConfig):
        if not config.pretrained:
            raise UserError(
                "config.model.text.pretrained is empty: set it to text encoders for the transformers library, as a "
                "local path or a hub id"
            )
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"pretrained text encoders need packages ({error}): run "
                "pip install -r requirements-text.txt -r requirements-torch.txt"
            ) from None
        self._torch, self._transformers, self._config = torch, transformers, config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._from = dict(pretrained_model_name_or_path=config.pretrained, revision=config.revision or "main")
        try:
            self._parts = self._load()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"config.model.text.pretrained={config.pretrained}: cannot load text encoders ({reason})"
            ) from None
        # Before the tokenizers are used, because that changes them.
        tokenizers = [_tokenizer_sha256(tokenizer) for _, tokenizer in self._parts]
        self._check_sizes()
        self.encoding = {
            "recipe": config.recipe,
            "length": config.length,
            "features": config.features,
            "pooled_features": config.pooled_features,
            "dtype": config.pretrained_dtype,
            "encoders": [
                {
                    "class": type(model).__name__,
                    "weights_sha256": _weights_sha256(torch, model),
                    "tokenizer_sha256": sha,
                }
                for (model, _), sha in zip(self._parts, tokenizers, strict=True)
            ],
        }
        commit = getattr(self._parts[0][0].config, "_commit_hash", None)
        self.origin = {"pretrained": config.pretrained, "revision": config.revision, "commit": commit}

    def __call__(self, texts: Sequence[str]) -> Text:
        encode = self._encode_sd3 if self._config.recipe == "sd3" else self._encode_single
        batches = [list(texts[first : first + TEXTS_AT_ONCE]) for first in range(0, len(texts), TEXTS_AT_ONCE)]
        with self._torch.inference_mode():
            encoded = [[np.asarray(leaf.cpu()) for leaf in encode(batch)] for batch in batches]
        return Text(*(np.concatenate(leaves) for leaves in zip(*encoded, strict=True)))

    def _load(self) -> list:
        """The encoders, each with its tokenizer."""
        transformers = self._transformers
        if self._config.recipe == "sd3":
            parts = [(getattr(transformers, name), *folders) for name, *folders in SD3_PARTS]
        else:
            parts = [(self._single_class(), "", "")]
        dtype = getattr(self._torch, self._config.pretrained_dtype)
        return [
            (
                model.from_pretrained(**self._from, subfolder=folder, dtype=dtype).to(self._device).eval(),
                transformers.AutoTokenizer.from_pretrained(**self._from, subfolder=tokenizer_folder),
            )
            for model, folder, tokenizer_folder in parts
        ]

    def _single_class(self):
        transformers = self._transformers
        config = transformers.AutoConfig.from_pretrained(**self._from)
        if config.model_type in ("clip", "clip_text_model"):
            plain = config.architectures == ["CLIPTextModel"]
            return transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
        return transformers.AutoModelForTextEncoding

    def _check_sizes(self) -> None:
        """Encodes the empty text to find the encoders' sizes. Raises UserError if they differ from the config's."""
        text = self([""])
        found = dict(zip(("features", "pooled_features"), (text.states.shape[2], text.pooled.shape[1]), strict=True))
        for name, size in found.items():
            if size != getattr(self._config, name):
                raise UserError(
                    f"config.model.text.{name} is {getattr(self._config, name)}; the encoders of "
                    f"{self._config.pretrained} have {size}"
                )

    def _tokens(self, tokenizer, texts: list[str], length: int):
        """Ids and mask [B, length] on the encoder's device."""
        options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        tokens = tokenizer(texts, return_attention_mask=True, **options)
        return tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)

    def _encode_single(self, texts: list[str]) -> tuple:
        ((model, tokenizer),) = self._parts
        ids, mask = self._tokens(tokenizer, texts, self._config.length)
        output = model(input_ids=ids, attention_mask=mask)
        states = output.last_hidden_state.float()
        pooled = output.get("text_embeds", output.get("pooler_output"))
        if pooled is None:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return states, mask.bool(), pooled.float()

    def _encode_sd3(self, texts: list[str]) -> tuple:
        torch = self._torch
        states, pooled = [], []
        *clips, (t5, t5_tokenizer) = self._parts
        for model, tokenizer in clips:
            output = model(input_ids=self._tokens(tokenizer, texts, CLIP_LENGTH)[0], output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
            pooled.append(output.text_embeds.float())
        last = t5(input_ids=self._tokens(t5_tokenizer, texts, self._config.length - CLIP_LENGTH)[0])
        last = last.last_hidden_state.float()
        both = torch.cat(states, dim=2)
        if both.shape[2] > last.shape[2]:
            raise UserError(f"the CLIP encoders' {both.shape[2]} features are more than T5's {last.shape[2]}")
        both = torch.nn.functional.pad(both, (0, last.shape[2] - both.shape[2]))
        joined = torch.cat([both, last], dim=1)
        return joined, torch.ones(joined.shape[:2], dtype=torch.bool), torch.cat(pooled, dim=1)

    def written_by(self) -> dict:
        """Package versions, for a manifest."""
        return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}


def _tokenizer_sha256(tokenizer) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return sha256_of_text(text)


def _weights_sha256(torch, model) -> str:
    """The hash of all parameters and buffers as loaded, in the order of their names."""

    def data(tensor) -> np.ndarray:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

    return sha256_of_arrays(
        (f"{name} {tensor.dtype} {list(tensor.shape)}\n", data(tensor))
        for name, tensor in sorted(model.state_dict().items())
    )
