"""The scene judge: text following on compositions seen in training, and on held-out ones."""

from trm_diffusion.data.scenes.source import SceneSource
from trm_diffusion.metrics.judges import Evaluation, Judge, Picture
from trm_diffusion.metrics.scenes.score import evaluate_scenes

ROWS_SHOWN = 6


class SceneJudge(Judge):
    """Scores `num_samples` images of seen compositions and as many of held-out ones; only seen ones decide `passed`."""

    sources = ("scenes",)
    condition = "caption in words"

    def evaluate(self, generate):
        measures, pictures = {}, {}
        for split in ("seen", "held_out"):
            source = SceneSource(self.data.image_size, split)
            captions = [source.scene(index)[1] for index in range(self.settings.num_samples)]
            images = generate(captions)
            measures[split] = evaluate_scenes(images, source)
            shown = ROWS_SHOWN * self.per_class
            pictures[f"evaluation_{split}"] = Picture(images[:shown], captions[:shown])
        passed = measures["seen"]["strict"]["overall"] >= self.settings.min_strict_score
        return Evaluation(measures, passed, pictures)
