"""Every source of training records, by its name in the config.

A source is a class that follows the contract of data/base.py and is built by `from_config(config: DataConfig)`. To add
one, write a file with its class and add a line here.
"""

SOURCES = {  # `data.source`: its class
    "digits": "trm_diffusion.data.digits:DigitsSource",
    "synthetic": "trm_diffusion.data.synthetic:SyntheticSource",
    "image_folder": "trm_diffusion.data.images:ImageFolderSource",
    "image_tars": "trm_diffusion.data.tars:ImageTarSource",
    "tfds": "trm_diffusion.data.images:TfdsSource",
    "latents": "trm_diffusion.data.latents:LatentSource",
    "scenes": "trm_diffusion.data.scenes.source:SceneSource",
    "emoji": "trm_diffusion.data.emoji:EmojiSource",
    "caption_folder": "trm_diffusion.data.captions:CaptionFolderSource",
    "tfds_captions": "trm_diffusion.data.captions:TfdsCaptionSource",
    "mazes": "trm_diffusion.data.mazes:MazeSource",
    "image_pairs": "trm_diffusion.data.contexts:ImagePairSource",
    "captioned_pairs": "trm_diffusion.data.contexts:CaptionedPairSource",
    "frozen_lake": "trm_diffusion.data.frozen_lake:FrozenLakeSource",
}
