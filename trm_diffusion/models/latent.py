"""The latent format. A diffusion model and its autoencoder must agree on it, wherever either is stored."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Must be the same for preparing, training and decoding: z = (latent - shift) * scale."""

    vae_id: str  # weights that encoded the images and decode the samples
    scale: float
    shift: float
    channels: int
    size: int  # height and width in latent cells

    def normalize(self, latent):
        """The autoencoder's latents -> the z that the diffusion model denoises."""
        return (latent - self.shift) * self.scale

    def denormalize(self, z):
        """The inverse of `normalize`: z -> the latents that the decoder takes."""
        return z / self.scale + self.shift
