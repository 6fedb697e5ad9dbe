"""A visual question answering (VQA) model from the `transformers` library, such as BLIP, as an optional extra.

It needs `transformers` and `torch`, which are not in the default environment.
"""

import numpy as np

from trm_diffusion.errors import UserError


class TransformersVqa:
    """(image, question) -> answer, decoded greedily on the GPU if torch sees one, else on the CPU.

    Args:
      model: a local path or a hub id, such as "Salesforce/blip-vqa-capfilt-large".
    """

    def __init__(self, model: str):
        try:
            import torch
            from transformers import AutoProcessor, BlipForQuestionAnswering
        except ImportError as error:
            raise UserError(f"--vqa needs the packages transformers and torch: {error}") from None
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor = AutoProcessor.from_pretrained(model)
            self._model = BlipForQuestionAnswering.from_pretrained(model).to(self._device).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"--vqa={model}: {str(error).splitlines()[0]}") from None

    def __call__(self, image: np.ndarray, question: str) -> str:
        """Answers a question about an image, uint8 [H, W, 3]; lower case."""
        from PIL import Image

        inputs = self._processor(images=Image.fromarray(image), text=question, return_tensors="pt").to(self._device)
        with self._torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=10, do_sample=False)
        return self._processor.decode(tokens[0], skip_special_tokens=True).strip().lower()
