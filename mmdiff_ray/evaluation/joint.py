"""Joint samples, with every modality from noise: agreement between modalities, and a picture."""

import numpy as np

from mmdiff_ray.evaluation.context import Context, Figure, Findings
from mmdiff_ray.evaluation.grids import Panel, grid
from mmdiff_ray.evaluation.segmentation import foreground_iou
from mmdiff_ray.evaluation.statistics import mean_of
from mmdiff_ray.modalities.mask import MaskModality
from mmdiff_ray.registry import register


@register("evaluator", "joint")
def evaluate_joint(context: Context) -> Findings:
    """Measure the IoU of a sample's two-class mask with the mask that the model predicts from its image.

    Rule: the masks of other samples, which gives the agreement by chance. `code_agreement` is the fraction of
    cells whose predicted class is also the class nearest to their code in z.
    """
    drawn, anchor = context.sampled(), context.anchor
    count = min(2 * context.config.evaluate.grid_rows, len(context.batch))
    panels = [
        Panel.of(modality, name, drawn.data[name][:count], "generated")
        for name, modality in context.denoiser.modalities.items()
        if name in drawn.data
    ]
    picture = grid(panels, title="joint samples", subtitle="every modality from noise", blocks=2)
    findings = Findings(pictures={"joint": picture})
    masks = [
        name
        for name, modality in sorted(context.instances(MaskModality).items())
        if name in drawn.data and modality.prediction_channels == 2 and context.trained(name, anchor)
    ]
    if masks and anchor in drawn.data:
        requests = context.requests({anchor: drawn.data[anchor]}, seed=context.config.seed + 1)
        predicted = context.sample(f"given sampled {anchor}", requests).data
        for name in masks:
            joint, conditional = drawn.data[name].numpy(), predicted[name].numpy()
            tallies = {
                "model": mean_of(foreground_iou(joint, conditional)),
                "masks of other samples": mean_of(foreground_iou(np.roll(joint, 1, axis=0), conditional)),
            }
            findings.add(f"{name}/joint_iou", "higher", tallies, context.ids())
    for name, share in drawn.agreement.items():
        findings.figures.append(Figure(f"{name}/code_agreement", share, "higher", len(context.batch)))
    return findings
