"""Turns the metrics of single updates into logged lines: means over the updates since the last line."""

import time

import jax.numpy as jnp
import numpy as np

from trm_diffusion.models.recursion.report import RoutingReport

MEANS = ("loss", "gradient_norm", "drop_fraction", "gate_entropy")  # averaged over updates
QUARTERS = 4  # of the normalized diffusion time, cleanest first


def routing_metrics(reports: RoutingReport | None) -> dict:
    """Scalars, and the load per expert [P * M], of reports [R, T, ...]: means over the latent steps that ran."""
    if reports is None:
        return {}
    share = reports.ran / jnp.sum(reports.ran)  # [R, T]
    return {
        "expert_load": jnp.einsum("rt,rtpm->pm", share, reports.load).reshape(-1),
        "drop_fraction": jnp.sum(share * reports.drop_fraction),
        "gate_entropy": jnp.sum(share * reports.entropy),
    }


class Window:
    """Sums over the updates since the last line. `record` is everything that a resume needs, as JSON."""

    def __init__(self, record: dict, batch_size: int):
        self._sums = {name: np.asarray(value) for name, value in record.get("sums", {}).items()}
        self._updates = record.get("updates", 0)
        self._skipped = record.get("skipped", 0)
        self._learning_rate = record.get("learning_rate", 0.0)
        self.skipped_in_a_row = record.get("skipped_in_a_row", 0)
        self._batch_size = batch_size
        self._since = time.perf_counter()
        self._timed_updates = 0
        self.data_wait_seconds = 0.0

    def add(self, metrics: dict) -> None:
        """Adds one update's metrics (NumPy). A skipped update is counted, but does not enter the means."""
        self._updates += 1
        self._timed_updates += 1
        self._learning_rate = float(metrics["learning_rate"])
        if metrics["skipped"]:
            self._skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        for name in (*MEANS, "expert_load", "quarter_loss_sum", "quarter_images"):
            if name in metrics:
                self._sums[name] = self._sums.get(name, 0.0) + metrics[name].astype(np.float64)

    def line(self) -> dict:
        """Returns the fields of one line and starts a new window. A mean over no updates, or no images, is None."""
        kept = self._updates - self._skipped
        line = {"updates": self._updates, "skipped": self._skipped, "learning_rate": self._learning_rate}
        for name in MEANS:
            if name in self._sums or name == "loss":
                line[name] = float(self._sums[name] / kept) if kept else None
        for quarter in range(QUARTERS):
            images = self._sums["quarter_images"][quarter] if kept else 0
            loss = float(self._sums["quarter_loss_sum"][quarter] / images) if images else None
            line[f"loss_quarter_{quarter + 1}"] = loss
        if "expert_load" in self._sums and kept:
            line["expert_load"] = (self._sums["expert_load"] / kept).tolist()
        seconds = time.perf_counter() - self._since
        line["images_per_second"] = self._timed_updates * self._batch_size / seconds
        line["data_wait_share"] = min(1.0, self.data_wait_seconds / seconds)
        line["seconds"] = seconds
        self._sums, self._updates, self._skipped = {}, 0, 0
        self._since = time.perf_counter()
        self._timed_updates = 0
        self.data_wait_seconds = 0.0
        return line

    def record(self) -> dict:
        return {
            "sums": {name: value.tolist() for name, value in self._sums.items()},
            "updates": self._updates,
            "skipped": self._skipped,
            "learning_rate": self._learning_rate,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
