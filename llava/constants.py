"""Names and numbers that the text side, the image side and the model agree on."""

IGNORE_INDEX = -100
"""Label of a position that does not count in the loss."""

IMAGE_TOKEN_INDEX = -200
"""Id that stands for one whole image in a prompt; the model replaces it by that image's vision tokens."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_VIDEO_TOKEN = "<video>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

PROTOCOLS = "model", "flat"
"""How a LLaVA-NeXT lays out images: as the model does, or the 2880 tokens of papers, see `load_pretrained_model`."""

FRAMES = 8
"""Frames of a video that a model sees, as Video-LLaVA was trained."""
