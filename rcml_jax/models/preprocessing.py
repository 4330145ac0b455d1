"""What a checkpoint's own files say about its inputs: images, pooling, the tokenizer's ids."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rcml_jax.data.images import Framing
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models.checkpoints import pretrained_directory
from rcml_jax.parsing import read_json as parse_json

CLIP_STATISTICS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
HALF_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: Mean and deviation of an image tower whose checkpoint does not give them, by `model_type`.
STATISTICS = {
    "clip_vision_model": CLIP_STATISTICS,
    "siglip_vision_model": HALF_STATISTICS,
    "vit": HALF_STATISTICS,
    "resnet": IMAGENET_STATISTICS,
}
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_BICUBIC, _BILINEAR, _RESAMPLE = 3, 2, range(6)  # as Pillow numbers its filters


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing(Framing):
    """How an image becomes the input of a tower: its framing, then mean and deviation.

    mean, std: of each channel of values in [0, 1]. A rescale factor f other than 1/255 is folded
    into them: (f x − m) / s = (x/255 − m/(255 f)) / (s/(255 f)).
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def image_statistics(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a tower's images: what `set_statistics` gave it, or the family's."""
    return getattr(config, "image_statistics", None) or STATISTICS[config.model_type]


def set_statistics(config: Any, found: ImagePreprocessing | None) -> None:
    """Give the configuration of an image tower the checkpoint's own mean and deviation."""
    if found is not None and found.mean:
        config.image_statistics = (tuple(found.mean), tuple(found.std))


def normalize(pixels: jax.Array, mean: tuple, std: tuple, dtype: DTypeLike) -> jax.Array:
    """uint8 images (n, H, W, 3) by mean and deviation of values in [0, 1]; floats as they are."""
    if pixels.dtype == jnp.uint8:
        shift, scale = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
        pixels = (pixels.astype(jnp.float32) / 255.0 - shift) / scale
    return pixels.astype(dtype)


# Images

# Defaults of the processors that transformers has for these towers, where a file leaves them out.
_CLIP_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "do_center_crop": True,
    "resample": _BICUBIC,
    "image_mean": CLIP_STATISTICS[0],
    "image_std": CLIP_STATISTICS[1],
}
_SQUARE_DEFAULTS: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "resample": _BILINEAR,
    "image_mean": HALF_STATISTICS[0],
    "image_std": HALF_STATISTICS[1],
}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP_DEFAULTS,
    "ChineseCLIP": _CLIP_DEFAULTS,
    "Bit": _CLIP_DEFAULTS,
    "ViT": _SQUARE_DEFAULTS,
    "Siglip": _SQUARE_DEFAULTS | {"resample": _BICUBIC},
    "DeiT": _SQUARE_DEFAULTS
    | {
        "size": {"height": 256, "width": 256},
        "crop_size": 224,
        "do_center_crop": True,
        "resample": _BICUBIC,
    },
    "ConvNext": _SQUARE_DEFAULTS | {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
}
# Of files that name no processor: that of the model type, and its statistics.
_BY_MODEL = {
    "clip": ("CLIP", CLIP_STATISTICS),
    "siglip": ("Siglip", HALF_STATISTICS),
    "vit": ("ViT", HALF_STATISTICS),
    "resnet": ("CLIP", IMAGENET_STATISTICS),
}
# What changes an image in ways that are not done here.
_UNSUPPORTED = ("do_pad", "do_flip_channel_order", "rescale_offset", "do_reduce_labels")
_CONVNEXT_SQUARE = 384  # From this size on its processor crops nothing.


def read_image_preprocessing(
    name: str, model_type: str, *, size: int | None = None
) -> ImagePreprocessing | None:
    """What the image processor of a checkpoint does, None where it has no file of one.

    name: a directory or a name on the hub. model_type: "clip", "siglip", "vit" or "resnet", whose
    processor is meant where the file names none. size: of the images that the tower takes, in
    pixels; None for any.

    Raises UserError for a file that is damaged, that asks for what is not done here, or whose
    images have another size.
    """
    options = _image_options(name)
    if options is None:
        return None
    return image_preprocessing(options, model_type, name, size=size)


def image_preprocessing(
    options: Mapping[str, Any], model_type: str, name: str, *, size: int | None = None
) -> ImagePreprocessing:
    """As `read_image_preprocessing`, of what is in the file; `name` is for errors."""

    def refuse(what: str) -> UserError:
        return UserError(
            f"the image processor of {name!r} {what}, which is not supported; prepare the images "
            "another way and correct its preprocessor_config.json, or use another checkpoint"
        )

    given = str(options.get("image_processor_type") or options.get("feature_extractor_type") or "")
    own = {option: value for option, value in options.items() if value is not None}
    if given:
        kind = given
        for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
            kind = kind.removesuffix(suffix)
        if kind not in _PROCESSORS:
            raise refuse(f"is a {given}")
        options = _PROCESSORS[kind] | own
    else:
        kind, (mean, std) = _BY_MODEL[model_type]
        options = _PROCESSORS[kind] | {"image_mean": mean, "image_std": std} | own
        if "size" in own:
            options["crop_size"] = own.get("crop_size", own["size"])
    for option in _UNSUPPORTED:
        if options.get(option):
            raise refuse(f"has {option} set")
    if not options.get("do_resize", True):
        raise refuse("does not resize")
    resample = options["resample"]
    if resample not in _RESAMPLE:
        raise refuse(f"resizes with resample={resample!r}")
    crop: int | None
    side, squash = _resized(options["size"], kind in ("CLIP", "ChineseCLIP", "Bit", "ConvNext"))
    if side is None:
        raise refuse(f"resizes to size={options['size']!r}")
    crop = side
    if options["do_center_crop"]:
        crop, _ = _resized(options["crop_size"], True)
        if crop is None or crop > side:
            raise refuse(f"crops {options['crop_size']!r} out of size={options['size']!r}")
    elif kind == "ConvNext":
        share = options["crop_pct"]
        if not _is_finite(share) or not 0 < share <= 1:
            raise refuse(f"has crop_pct={share!r}")
        squash = side >= _CONVNEXT_SQUARE
        side = side if squash else int(side / share)
    elif not squash:
        raise refuse("keeps the proportions of an image without a crop")
    if size is not None and crop != size:
        raise UserError(
            f"the image processor of {name!r} makes images of {crop} pixels, its tower takes "
            f"{size}; correct preprocessor_config.json or config.json"
        )
    return ImagePreprocessing(crop, side, squash, int(resample), *_statistics(options, refuse))


def _resized(size: Any, shortest: bool) -> tuple[int | None, bool]:
    """The side that `size` or `crop_size` names, and whether it is of both sides; None: neither.

    shortest: whether a bare number is that of the short side.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, not shortest
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return _resized(size["shortest_edge"], True)
        if set(size) == {"height", "width"} and size["height"] == size["width"]:
            return _resized(size["height"], False)
    return None, False


def _statistics(options: Mapping[str, Any], refuse: Any) -> tuple[tuple, tuple]:
    """Mean and deviation of values in [0, 1], with the rescale factor folded into them."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if options.get("do_normalize", True):
        mean, std = (tuple(_channels(options[name])) for name in ("image_mean", "image_std"))
    factor = options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
    numbers = (*mean, *std, factor)
    if len(mean) != 3 or len(std) != 3 or not all(_is_finite(x) for x in numbers):
        raise refuse(f"has image_mean={mean}, image_std={std} and rescale_factor={factor}")
    if factor <= 0 or min(std) <= 0:
        raise refuse(f"has image_std={std} and rescale_factor={factor}")
    # 255 (1/255) is not 1 in floating point: without a factor of its own nothing changes.
    scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 255 * factor
    return tuple(float(x) / scale for x in mean), tuple(float(x) / scale for x in std)


def _channels(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value] * 3


def _is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _image_options(name: str) -> dict | None:
    for file in _IMAGE_FILES:
        found = read_json(name, file, _IMAGE_FILES)
        if found is not None and file == _IMAGE_FILES[1]:
            found = found.get("image_processor")
        if isinstance(found, dict):
            return found
    return None


def preprocessing_of(
    model: Any, *, image: tuple[str, str] | None = None, text: str = ""
) -> dict[str, Any]:
    """What the checkpoints of a configuration ask of their inputs: "image" and "pooling".

    model: `config.model`; its `preprocessing` is what a run wrote into its `config.json`. Where it
    is empty the files of the checkpoints are read; where there is none the run is older than the
    reading of these files, and its towers have the family's habits. image: name and `model_type`
    of the image tower's checkpoint; text: name of a BERT's or RoBERTa's.
    """
    written = model.get("preprocessing")
    if written is None:
        return {"image": None, "pooling": ""}
    if written:
        own = dict(written.image)
        if own:
            own |= {name: tuple(own[name]) for name in ("mean", "std")}
        return {
            "image": ImagePreprocessing(**own) if own else None,
            "pooling": written.pooling,
        }
    found = read_image_preprocessing(*image) if image else None
    return {"image": found, "pooling": read_pooling(text) if text else ""}


def with_preprocessing(config: Any, found: Mapping[str, Any]) -> Any:
    """A copy of a configuration with what `preprocessing_of` found in its `model.preprocessing`."""
    image = found["image"]
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.preprocessing = {
            "image": dataclasses.asdict(image) if image else {},
            "pooling": found["pooling"],
        }
    return config


# Texts

_POOLING = "pooling_mode"
_MODES = {"cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def read_pooling(name: str) -> str:
    """How a sentence model's files say that its token states are pooled: "mean", "cls", or "".

    "" stands for a checkpoint that says nothing, as those that are not of sentence-transformers.
    Raises UserError for a damaged file, another way of pooling, and a model with further layers.
    """
    files = ("modules.json", "1_Pooling/config.json")
    modules = read_json(name, "modules.json", files, list)
    path = "1_Pooling"
    for module in modules or []:
        if not isinstance(module, dict):
            raise UserError(f"modules.json of {name!r} is damaged; copy the checkpoint anew")
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise UserError(
                f"{name!r} has a layer {kind} behind its transformer, which is not supported; use "
                f"a sentence model of {', '.join(_MODULES)} alone"
            )
        if kind == "Pooling":
            path = str(module.get("path", path))
    options = read_json(name, f"{path}/config.json", (f"{path}/config.json",))
    if options is None:
        return ""
    modes = [k.removeprefix(f"{_POOLING}_") for k, v in options.items() if _mode(k) and v is True]
    if isinstance(options.get(_POOLING), str):
        modes = [options[_POOLING]]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"{name!r} pools its tokens by {' and '.join(modes) or 'nothing'}, which is not "
            "supported; use a sentence model that takes the mean or the CLS token"
        )
    return _MODES[modes[0]]


def _mode(key: str) -> bool:
    return key.startswith(f"{_POOLING}_")


def check_tokenizer(name: str, config: Any, tokenizer: Tokenizer, end: int | None = None) -> None:
    """Raise UserError for a tokenizer that does not belong to the text tower.

    config: of the text tower; end: the id at which it looks for the end of a text, if it does. An
    id beyond the embeddings would be NaN, and another end token would pool the first token.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {name!r} has {tokenizer.vocab_size} ids, its text tower embeds "
            f"{config.vocab_size}; save both again into one directory"
        )
    if end is not None and end != tokenizer.end_id:
        raise UserError(
            f"the text tower of {name!r} ends a text at token {end}, its tokenizer "
            f"with token {tokenizer.end_id}; give both the same end token (eos_token_id in "
            "config.json)"
        )
    if config.model_type in ("bert", "roberta") and tokenizer.pad_id != config.pad_token_id:
        raise UserError(
            f"the tokenizer of {name!r} pads with token {tokenizer.pad_id}, its text tower with "
            f"{config.pad_token_id}; save both again into one directory"
        )


def read_json(name: str, file: str, files: tuple[str, ...], kind: type = dict) -> Any:
    """A small file of a checkpoint, None where it has none; files: those to fetch with it.

    Raises UserError for a damaged one, and where it holds anything but an object, or `kind`.
    """
    path = pretrained_directory(name, files=files) / file
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {'list' if kind is list else 'object'}")
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the checkpoint anew") from error
