"""CLIPSeg's weights: decoder files, and Hugging Face's layout.

The authors' files (``rd64-uni.pth``, ``rd16-uni.pth``, ``rd64-uni-refined.pth``) and this project's own files
hold only the decoder, and need a CLIP (``decoder_file``). Hugging Face's layout, a folder or hub repository
with ``config.json`` and ``model.safetensors``, holds both (``hugging_face``). ``load_clipseg`` reads all of
them.
"""

from models.clipseg.weights.decoder_file import load_baseline, read_decoder, save_decoder
from models.clipseg.weights.hugging_face import hugging_face_config, hugging_face_state, save_clipseg
from models.clipseg.weights.loading import load_clipseg

__all__ = [
    "hugging_face_config",
    "hugging_face_state",
    "load_baseline",
    "load_clipseg",
    "read_decoder",
    "save_clipseg",
    "save_decoder",
]
