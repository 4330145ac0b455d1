"""CLIP's towers in the files and under the names that Hugging Face's PyTorch classes read."""

import copy
import json
import math
import pathlib
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from rcml_jax.data.images import Framing
from rcml_jax.errors import UserError
from rcml_jax.models.checkpoints import to_torch
from rcml_jax.models.preprocessing import image_statistics
from rcml_jax.models.towers.clip import end_token
from rcml_jax.models.two_towers import towers_shapes
from rcml_jax.search.exported import MARK


def save_clip(
    directory: pathlib.Path,
    config: Any,
    params: Any,
    *,
    start_id: int | None,
    end_id: int,
    pad_id: int,
    temperature: float,
    framing: Framing | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` of a `CLIPModel`.

    params: those of `TwoTowers(config)`; the ids are the tokenizer's, and the logit scale is that
    of the temperature. framing: of the run's images, by default CLIP's; about: what
    `rcml_jax.search.exported` reads again. Torch is not needed. Raises
    UserError for towers that are not CLIP's, for parameters of another configuration, and where
    PyTorch would look for another end token than the tokenizer has.
    """
    _check_clip(config, params)
    _check_end(config.text_config, end_id)
    framing = framing or Framing(config.vision_config.image_size)
    processor = _processor(framing, *image_statistics(config.vision_config))
    config = copy.deepcopy(config)
    config.architectures = ["CLIPModel"]
    ids = {"bos_token_id": start_id, "eos_token_id": end_id, "pad_token_id": pad_id}
    config.text_config.update(ids)
    # In preprocessor_config.json, where others look for it.
    vars(config.vision_config).pop("image_statistics", None)
    said = json.loads(config.to_json_string()) | ({MARK: about} if about else {})
    (directory / "config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    scale = np.float32(-math.log(temperature))
    tensors = to_torch({**params, "logit_scale": scale})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(processor, indent=2) + "\n"
    (directory / "preprocessor_config.json").write_text(text, "utf-8")


def _check_clip(config: Any, params: Any) -> None:
    if getattr(config, "model_type", "") != "clip":
        raise UserError(
            "only CLIP's own towers are exported, and this run has another in the place of one; "
            "train it without text= and image=, from scratch or with pretrained="
        )
    expected = {name: x.shape for name, x in flatten_dict(towers_shapes(config)).items()}
    found = {name: np.shape(x) for name, x in flatten_dict(params).items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the checkpoint is of another model than config.json describes: towers."
                f"{'.'.join(name)} has the shape {found.get(name)}, not {expected.get(name)}; "
                "restore that file, or train anew in another --workdir"
            )


def _check_end(text: Any, end_id: int) -> None:
    """The end token of the towers, of the tokenizer and of PyTorch must be the same one."""
    if end_token(text) != end_id:
        raise UserError(
            f"the towers end a text at token {end_token(text)}, the tokenizer with token {end_id}; "
            "give both the same end token (eos_token_id in the checkpoint's config.json) and train "
            "anew"
        )


def _processor(framing: Framing, mean: tuple, std: tuple) -> dict:
    """What `data.images.to_array` and the towers do to an image, for `CLIPImageProcessor`."""
    side = framing.resize or framing.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if framing.squash else {"shortest_edge": side},
        "resample": framing.resample,
        "do_center_crop": True,
        "crop_size": {"height": framing.size, "width": framing.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
