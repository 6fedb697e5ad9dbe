"""The PyTorch side of benchmarks/train_step.py --vs-torch: the parity tests' DiT and a training step for it.

Needs PyTorch; bash launch/test.sh --parity creates an environment with it.
"""

import copy
import os
from collections.abc import Callable

import torch

from tests.parity.common import randomize
from tests.parity.official_dit import DiT

DECAY, LR = 0.9999, 1e-4


class TorchPrograms:
    """forward and train_step map names to programs: "pytorch" and, if torch.compile works, "pytorch_compiled"."""

    def __init__(self, *, depth, width, heads, patch, size, channels, classes, images):
        torch.set_num_threads(os.cpu_count())
        generator = torch.Generator().manual_seed(0)
        model = randomize(DiT(depth, width, heads, patch, size, channels, channels, classes)).train()
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.about = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
        self._images = torch.randn(images, channels, size, size, generator=generator)
        self._labels = torch.arange(images) % classes
        self._generator, self._classes = generator, classes
        self.forward = {"pytorch": self._forward(model)}
        self.train_step = {"pytorch": self._train_step(copy.deepcopy(model), lambda module: module)}
        try:
            compiled = self._forward(torch.compile(model)), self._train_step(copy.deepcopy(model), torch.compile)
            for program in compiled:
                program()
        except Exception as error:  # noqa: BLE001  it needs a C++ compiler and more that may be missing
            self.about["torch_compile"] = (
                f"does not work here: {(str(error).splitlines() or [type(error).__name__])[0]}"
            )
        else:
            self.forward["pytorch_compiled"], self.train_step["pytorch_compiled"] = compiled

    def _forward(self, model) -> Callable[[], None]:
        times = torch.full((len(self._images),), 500.0)

        def run():
            with torch.inference_mode():
                model(self._images, times, self._labels)

        return run

    def _train_step(self, model, wrap: Callable) -> Callable[[], None]:
        """As our step: rectified flow with a tenth of the labels dropped, AdamW, and one EMA."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
        images, labels, generator, network = self._images, self._labels, self._generator, wrap(model)

        def run():
            t = torch.sigmoid(torch.randn(len(images), generator=generator))
            noise = torch.randn(images.shape, generator=generator)
            dropped = torch.rand(len(labels), generator=generator) < 0.1
            given = torch.where(dropped, self._classes, labels)
            mixed = t[:, None, None, None]
            velocity = network((1 - mixed) * images + mixed * noise, 1000 * t, given)
            loss = torch.mean((velocity - (noise - images)) ** 2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - DECAY)

        return run
