"""What folders and streamed sources share: options of pictures, captions and embeddings."""

from dataclasses import dataclass
from typing import Any

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.base import Options, Pipeline, Stage, is_off, look_stages
from mmdiff_ray.datasets.embedders import make_embedder
from mmdiff_ray.datasets.maps import Stated
from mmdiff_ray.datasets.pictures import DEPTHS, make_frame
from mmdiff_ray.datasets.vectors import own_vectors


@dataclass(frozen=True)
class PictureOptions(Options):
    """How pictures are read.

    size: pixels a side, or HEIGHTxWIDTH. fit: crop uses the middle of each picture, pad adds borders, stretch
    distorts. depth: scale brings pictures of 16 bits or floats in [0, 1] to 8 bits, refuse leaves them out.
    map_content: values, normals or flow, for all maps or COLUMN=VALUE. map_unit: what their numbers are
    multiplied by, such as 0.001. map_void: the number that says unknown, such as 0; NaN always does.
    labels_separator: what lies between several labels in a text. look: embedder of the picture over white,
    which makes the column look: efficientnet-lite0, open_clip:MODEL[:weights] or off. embed_captions:
    embedder of the first caption, which makes the column caption: minilm, open_clip:MODEL[:weights], on
    (minilm) or off. embeddings: your own vectors: COLUMN=FILE.npy,KEYS, where KEYS is a text, .csv or .json
    file with the picture or row of each; or COLUMN=FILE.npz with both; several separated by semicolons.
    """

    source: str = ""
    size: str = "64"
    fit: str = "crop"
    depth: str = "refuse"
    map_content: str = ""
    map_unit: str = ""
    map_void: str = ""
    map_range: str = ""
    labels_separator: str = "|"
    look: str = "off"
    embed_captions: str = "off"
    embeddings: str = ""
    bad_limit: str = "1%"


class Pictured(Pipeline):
    """A source of pictures that others made."""

    Options = PictureOptions
    options: Any

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        if not options.source:
            raise ConfigError("source is missing; name the folder or files, for example source=photos")
        if options.depth not in DEPTHS:
            raise ConfigError(f"depth: got {options.depth!r}, want one of {', '.join(DEPTHS)}")
        self.frame = make_frame(options.size, options.fit)
        self.stated = Stated(options.map_content, options.map_unit, options.map_void, options.map_range)
        self.own_vectors = own_vectors(options.embeddings)

    def stages(self) -> list[Stage]:
        stages, captions, known = look_stages(self.options.look), self.options.embed_captions, self.columns()
        if not is_off(captions):
            if "text" not in known:
                raise ConfigError(
                    f"embed_captions={captions}, but no picture has a caption; give metadata=FILE with one, "
                    "or map text=FIELD"
                )
            spec = "minilm" if captions.lower() in ("on", "true", "yes") else captions
            stages.append(Stage("caption", "text", make_embedder(spec, "text")))
        made = [*known, *(stage.column for stage in stages)]
        for own in self.own_vectors:
            if own.column in made:
                raise ConfigError(
                    f"embeddings: the column {own.column} is taken; those are: {', '.join(made)}"
                )
            made.append(own.column)
        return stages
