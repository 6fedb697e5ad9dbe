"""What latents are: a diffusion model and the autoencoder under it must agree on this, wherever either is stored."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """What must agree between preparing, training and decoding: z = (latent - shift) * scale."""

    vae_id: str  # which weights encoded the images, and decode the samples
    scale: float
    shift: float
    channels: int
    size: int  # latent cells a side

    def normalize(self, latent):
        """What the autoencoder's encoder gives -> what the diffusion model denoises."""
        return (latent - self.shift) * self.scale

    def denormalize(self, z):
        """The inverse of `normalize`: what the decoder takes."""
        return z / self.scale + self.shift
