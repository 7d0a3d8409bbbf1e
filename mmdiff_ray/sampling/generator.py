"""Use of a trained model: sample any modalities from any others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff_ray.config import Config, ConfigError
from mmdiff_ray.diffusion import rng
from mmdiff_ray.diffusion.process import ABSENT, GENERATED, GIVEN, Prediction, Roles
from mmdiff_ray.diffusion.repaint import repaint
from mmdiff_ray.diffusion.samplers import guided, walk
from mmdiff_ray.modalities.base import Modality
from mmdiff_ray.models.denoiser import Denoiser
from mmdiff_ray.registry import look_up


@dataclass(frozen=True)
class Samples:
    """What was sampled.

    data: instance -> (B, ...), given instances unchanged; heads: the generated instances' last predictions;
    agreement: instance -> share of rows (or cells) whose answer is also the nearest to its code in z.
    """

    data: dict[str, Tensor]
    heads: dict[str, Tensor]
    agreement: dict[str, float]


@dataclass(frozen=True)
class Known:
    """Cells of the anchor that are known, given or not: they are kept by `diffusion.repaint`.

    data: the anchor's, (B, ...), anything where it is not known; visible: bool (B, H, W); repeats: how often
    each step is taken.
    """

    data: Tensor
    visible: Tensor
    repeats: int = 4


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    roles: Roles,
    given: Mapping[str, Tensor],
    *,
    ids: Tensor,
    seed: int,
    steps: int = 25,
    sampler: str = "ancestral",
    guidance: float | Mapping[str, float] = 1.0,
    known: Known | None = None,
    likely: bool = False,
) -> Samples:
    """Sample the generated instances of every row.

    roles: instance -> (B,); given: instance -> data (B, ...), for instances given in any row; ids: (B,)
    int64, which with the seed key the noise; guidance: one scale for all given instances, or one for each;
    known: cells of the anchor to keep (the sampler is then RePaint's ancestral one). likely: answer with the
    most likely data: `steps` noiseless steps by DDIM from the mean of the prior. Such answers are smoother
    than samples and all alike: good against one truth, useless as a set.
    """
    process, device = denoiser.process, ids.device
    shape = (process.channels, *denoiser.size)
    visits = torch.zeros_like(ids)
    codes, conditions = denoiser.encode(given), denoiser.conditions(given)
    scales = guidance if isinstance(guidance, Mapping) else dict.fromkeys(given, guidance)

    def predict(z: Tensor, t: Tensor, roles: Roles) -> Prediction:
        return denoiser(z, t, roles, codes, conditions)

    def noise(purpose: str) -> Tensor:
        if likely:
            return torch.zeros(len(ids), *shape, device=device)
        return rng.normal(seed, f"sample {purpose}", visits, ids, shape).to(device)

    def expected_codes(heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: denoiser.modalities[name].expected_code(head) for name, head in heads.items()}

    pulled = guided(predict, process, codes, scales, expected_codes)

    def predict_guided(z: Tensor, t: Tensor, roles: Roles) -> Prediction:
        return denoiser.with_known(pulled(z, t, roles), roles, conditions)  # guidance moves known cells, too

    was_training = denoiser.training
    denoiser.eval()
    if known is None:
        way = "ddim" if likely else sampler
        last, z = walk(process, predict_guided, noise, codes, roles, steps, way)
    else:
        code = denoiser.modalities[process.anchor].encode(known.data)
        last, z = repaint(
            process, predict_guided, noise, roles, code, known.visible, steps, known.repeats, codes
        )
    denoiser.train(was_training)
    data = dict(given)
    for name, role in roles.items():
        if bool((role == GENERATED).any()):
            answer = denoiser.modalities[name].answer(last.heads[name])
            data[name] = _where_given(role, given.get(name), answer)
    if known is not None:
        image = data[process.anchor]
        data[process.anchor] = torch.where(known.visible[:, None], known.data, image)
    return Samples(data, last.heads, _agreement(denoiser, z, roles, data, steps))


def _where_given(role: Tensor, given: Tensor | None, answer: Tensor) -> Tensor:
    if given is None:
        return answer
    return torch.where((role == GIVEN).reshape(-1, *[1] * (answer.ndim - 1)), given, answer)


def _agreement(
    denoiser: Denoiser, z: Tensor, roles: Roles, data: Mapping[str, Tensor], steps: int
) -> dict[str, float]:
    """Return how often the head's answer is also the data nearest to the code channels of the last noisy z.

    Only for instances with channels of their own that are generated in every row, and with discrete data.
    """
    found = {}
    t = torch.full((len(z),), 1 / steps, dtype=torch.float64, device=z.device)
    betas = denoiser.process.betas(t, roles)
    for name, role in roles.items():
        where = denoiser.process.layout[name]
        alone = sum(
            other.start < where.stop and other.stop > where.start
            for other in denoiser.process.layout.values()
        )
        if alone > 1 or not bool((role == GENERATED).all()) or data[name].is_floating_point():
            continue
        code = z[:, where] / betas[name].float().clamp_min(1e-6)[:, None, None, None]
        if name != denoiser.anchor:
            nearest = denoiser.modalities[name].from_code(code)
            found[name] = float((nearest == data[name]).float().mean())
    return found


class Generator:
    """A trained model for use: sample modalities from given values, `num` at a time."""

    def __init__(self, config: Config, denoiser: Denoiser) -> None:
        self.config = config
        self.denoiser = denoiser.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def generated(self) -> set[str]:
        """Return the instances that some task generates: the model has learned to answer these."""
        return {
            name
            for task in self.config.tasks.values()
            for name in task.roles
            if task.frequency > 0 and task.can_be(name, "generated")
        }

    def roles_for(self, given: Sequence[str], num: int) -> dict[str, Tensor]:
        """Return roles: what is named is given, all else that some task generates is generated."""
        roles = {}
        for name in self.denoiser.modalities:
            role = GIVEN if name in given else GENERATED if name in self.generated else ABSENT
            roles[name] = torch.full((num,), role, device=self.device)
        return roles

    def draw(
        self,
        given: Mapping[str, np.ndarray],
        num: int,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | Mapping[str, float] = 1.0,
        seed: int = 0,
        batch: int = 64,
        likely: bool | None = None,
        ids: Sequence[int] | None = None,
    ) -> Samples:
        """Return num samples. given: instance -> one row's data, or one for each of num rows.

        What a given masked image shows stands unchanged in the image it was made from, if that is sampled.
        ids: of the samples, by default 0, 1, ...; with the seed they key the noise, so that a sample does not
        depend on what it is drawn with. steps, sampler: as the configuration says where they are None;
        likely: as the task's `readout` says (`is_likely`). Raises ConfigError for an instance the model does
        not have, data of another shape or kind, an unknown sampler, and numbers below 1.
        """
        likely = self.is_likely(list(given)) if likely is None else likely
        steps = self.steps(likely) if steps is None else steps
        sampler = self.config.evaluate.sampler if sampler is None else sampler
        _check_settings(num, steps, sampler)
        rows = {name: self._rows(name, value, num) for name, value in given.items()}
        numbers = torch.tensor(range(num) if ids is None else ids, device=self.device)
        parts = []
        for start in range(0, num, batch):
            stop = min(num, start + batch)
            parts.append(
                sample(
                    self.denoiser,
                    self.roles_for(list(given), stop - start),
                    {name: value[start:stop] for name, value in rows.items()},
                    ids=numbers[start:stop],
                    seed=seed,
                    steps=steps,
                    sampler=sampler,
                    guidance=guidance,
                    likely=likely,
                )
            )
        drawn = join(parts)
        for name, value in rows.items():
            visible, source = self.modality(name).visible(value), self.modality(name).made_from
            if visible is not None and source in drawn.data and source not in rows:
                image = drawn.data[source]
                drawn.data[source] = torch.where(visible[:, None], value[:, : image.shape[1]], image)
        return drawn

    def is_likely(self, given: Sequence[str]) -> bool:
        """Return whether a request is answered with the most likely data where nobody says otherwise.

        So says the `readout` of the first task that is trained with exactly these instances given.
        """
        for task in self.config.tasks.values():
            roles = {name: np.atleast_1d(role).tolist() for name, role in task.roles.items()}
            must = {name for name, role in roles.items() if role == ["given"]}
            if task.frequency > 0 and must == set(given):
                return task.readout == "likely"
        return False

    def steps(self, likely: bool) -> int:
        """Return how many steps an answer takes: `evaluate.steps`, or at most `likely_steps` of them."""
        settings = self.config.evaluate
        return min(settings.likely_steps, settings.steps) if likely else settings.steps

    def probabilities(
        self, name: str, given: Mapping[str, np.ndarray], num: int, draws: int = 4, seed: int = 0
    ) -> np.ndarray:
        """Return the head's probabilities of a label's or mask's classes, (num, K) or (num, K, H, W), or of
        each of a set of labels, (num, K).

        given: as for `draw`. The mean over `draws` draws of the noise at t = 1, where z_t says nothing of the
        answer. Raises ConfigError for an instance without classes.
        """
        likelihoods = {"categorical": lambda head: head.softmax(1), "Bernoulli": torch.sigmoid}
        probability = likelihoods.get(self.modality(name).likelihood)
        if probability is None:
            raise ConfigError(f"{name} has no classes, so no probabilities")
        rows = {other: self._rows(other, value, num) for other, value in given.items()}
        roles, ids = self.roles_for(list(given), num), torch.arange(num, device=self.device)
        heads = [
            sample(self.denoiser, roles, rows, ids=ids, seed=seed + draw, steps=1).heads[name]
            for draw in range(draws)
        ]
        return torch.stack([probability(head) for head in heads]).mean(0).cpu().numpy()

    def _rows(self, name: str, value: np.ndarray, num: int) -> Tensor:
        shape, kind = self.modality(name).data_shape, np.dtype(self.modality(name).data_type)
        array = np.asarray(value)
        if (array.dtype.kind == "f") != (kind.kind == "f"):
            raise ConfigError(f"given {name}: got values of type {array.dtype}, want {kind}")
        rows = torch.from_numpy(np.asarray(array.astype(kind)))
        if tuple(rows.shape) == tuple(shape):
            rows = rows[None].expand(num, *shape)
        if tuple(rows.shape) != (num, *shape):
            raise ConfigError(
                f"given {name}: got shape {tuple(rows.shape)}, want {tuple(shape)} or {(num, *shape)}"
            )
        return rows.contiguous().to(self.device)

    def sample(
        self,
        given: Mapping[str, Sequence[Any]],
        num: int,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        likely: bool | None = None,
        ids: Sequence[int] | None = None,
    ) -> dict[str, list[Any]]:
        """Return num samples as plain values: labels by name, all else as arrays.

        given: instance -> num values: arrays, or what `mmdiff sample --given` takes (a name, a file). The
        rest: as for `draw`.
        """
        rows = {
            name: np.stack([self._row(name, value) for value in values]) for name, values in given.items()
        }
        drawn = self.draw(
            rows, num, steps=steps, sampler=sampler, guidance=guidance, seed=seed, likely=likely, ids=ids
        )
        return {name: self._plain(name, value.cpu()) for name, value in drawn.data.items()}

    def _row(self, name: str, value: Any) -> np.ndarray:
        modality = self.modality(name)
        return (
            modality.parse(value) if isinstance(value, str) else np.asarray(value, dtype=modality.data_type)
        )

    def _plain(self, name: str, data: Tensor) -> list[Any]:
        if (pixels := self.denoiser.modalities[name].pixels(data)) is not None:
            return list(pixels.numpy())
        shown = self.denoiser.modalities[name].picture(data)
        is_text = isinstance(shown, list) and not data.is_floating_point()
        return shown if is_text else list(data.numpy())

    def untrained(self, given: Sequence[str], guidance: float = 1.0) -> list[str]:
        """Return what was never trained in a request, one sentence each: answers to it mean little."""
        tasks = [task for task in self.config.tasks.values() if task.frequency > 0]
        found = []
        for name in given:
            giving = [task for task in tasks if task.can_be(name, "given")]
            if not giving:
                found.append(f"no task of this model was trained with {name} given; expect nonsense")
            elif guidance != 1 and not any(task.drop > 0 for task in giving):
                found.append(f"{name} was never dropped in training (tasks.*.drop): guidance means little")
        return found

    def instance(self, name: str) -> str:
        """Return the instance of a name, or the only instance of a type of that name (`label`).

        Raises ConfigError if the model has neither.
        """
        options = self.config.modalities
        of_type = [instance for instance in options if options[instance].type == name]
        if name not in options and len(of_type) != 1:
            raise ConfigError(f"the model has no modality {name!r}; it has: {', '.join(options)}")
        return name if name in options else of_type[0]

    def modality(self, name: str) -> Modality:
        """Return an instance. Raises ConfigError if the model does not have it."""
        if name not in self.denoiser.modalities:
            raise ConfigError(
                f"the model has no modality {name!r}; it has: {', '.join(self.denoiser.modalities)}"
            )
        return self.denoiser.modalities[name]


def _check_settings(num: int, steps: int, sampler: str) -> None:
    for name, value in (("num", num), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} ({value}) must be at least 1")
    check_sampler(sampler)


def check_sampler(sampler: str) -> None:
    """Raise ConfigError for an unknown sampler."""
    try:
        look_up("sampler", sampler)
    except KeyError as error:
        raise ConfigError(f"sampler: {error.args[0]}") from None


def join(parts: Sequence[Samples]) -> Samples:
    """Return the samples of several chunks of rows as one."""
    return Samples(
        data={name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data},
        heads={name: torch.cat([part.heads[name] for part in parts]) for name in parts[0].heads},
        agreement={
            name: float(
                np.average([p.agreement[name] for p in parts], weights=[len(p.data[name]) for p in parts])
            )
            for name in parts[0].agreement
        },
    )
