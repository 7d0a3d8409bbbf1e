"""Joint samples: everything from noise. Whether the modalities agree, and a picture of them side by side."""

import numpy as np
import torch
from PIL import Image

from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.draws import Ask
from mmdiff_ray.evaluation.grids import grid
from mmdiff_ray.evaluation.segmentation import foreground_iou
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register


@register("evaluator", "joint")
def evaluate_joint(context: Context) -> Findings:
    """Measure joint samples: IoU of a sample's two-class mask with the mask the model gives its image alone.

    The floor is the same with the masks of other samples: what chance agreement is worth.
    """
    drawn = context.sampled()
    findings = Findings(pictures={"joint": joint_picture(context)})
    masks = {
        name
        for name, modality in context.instances(MaskModality).items()
        if name in drawn.data and modality.prediction_channels == 2 and context.trained(name, context.anchor)
    }
    if masks and context.anchor in drawn.data:
        judged = _judged(context, drawn.data[context.anchor], masks)
        for name in sorted(masks):
            made, told = drawn.data[name].numpy(), judged[name].numpy()
            tallies = {
                "model": mean_of(foreground_iou(made, told)),
                "masks of other samples": mean_of(foreground_iou(np.roll(made, 1, axis=0), told)),
            }
            findings.figures.append(Figure.of(f"{name}/joint_iou", "higher", tallies, context.ids()))
    for name, share in drawn.agreement.items():
        findings.figures.append(Figure(f"{name}/code_agreement", share, "higher", len(context.batch)))
    return findings


def joint_picture(context: Context) -> Image.Image:
    """Return joint samples with all modalities side by side."""
    drawn = context.sampled()
    count = min(2 * context.config.evaluate.grid_rows, len(context.batch))
    names = [name for name in context.denoiser.modalities if name in drawn.data]
    panels = [context.panel(name, drawn.data[name][:count], "generated") for name in names]
    return grid(panels, title="joint samples", subtitle="every modality from noise", blocks=2)


def _judged(context: Context, images: torch.Tensor, masks: set[str]) -> dict[str, torch.Tensor]:
    """Return the masks that the model gives to images."""
    settings = context.config.evaluate
    asks = [
        Ask(
            start,
            len(part),
            context.roles([context.anchor]),
            {context.anchor: images[start : start + len(part)]},
            seed=context.config.seed + 1,
            steps=settings.steps,
            sampler=settings.sampler,
        )
        for start, part in context.parts()
    ]
    told = context.drawn(f"given sampled {context.anchor}", asks).data
    return {name: told[name] for name in masks}
