"""How given codes reach the network (`given.input`): what every channel of its input holds.

    z_only        z_t alone, the paper's way: a given code is heard as loudly as its kappa
    z_plus_code   z_t, and behind it the given codes in condition channels
    u_plus_code   u_t = z_t - B_t(given), and behind it the given codes in condition channels
    in_place      u_t where a channel carries something generated, the given code, free of noise, in its own
                  channels, 0 elsewhere; condition channels only for what has no channels to itself

The input is chosen after z_t is drawn: marginal, posterior and prior are the same for all four. `in_place`
and its exact visible cells are our own. Roles reach the network through their embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdiff_ray.diffusion.process import (
    GENERATED,
    GIVEN,
    Codes,
    Process,
    Roles,
    generated_channels,
    over_cells,
    place,
)
from mmdiff_ray.modalities.base import Modality


@dataclass(frozen=True)
class InputPath:
    """The layout of the network's input: the diffusion space, then the condition channels in order.

    conditions: instance -> how many condition channels it has, above 0. in_place: instances whose given code
    stands in their channels of the diffusion space. exact: masked images whose visible cells stand in the
    anchor's channels. zero_unused: whether channels that carry nothing generated are 0.
    """

    name: str
    layout: Mapping[str, slice]
    channels: int
    anchor: str
    conditions: Mapping[str, int]
    in_place: frozenset[str]
    exact: frozenset[str]
    zero_unused: bool

    @classmethod
    def of(
        cls, name: str, modalities: Mapping[str, Modality], process: Process, exact: bool, zero_unused: bool
    ) -> "InputPath":
        """Return the layout of a path for these modalities."""
        in_place: set[str] = set()
        shown: set[str] = set()
        if name == "in_place":
            shared = {instance for instance in modalities if _shares(instance, modalities, process.layout)}
            if exact and process.anchor not in shared:
                shown = {n for n, m in modalities.items() if m.shows_source and m.made_from == process.anchor}
            in_place = set(modalities) - shared - shown
        counts = {}
        for instance, modality in modalities.items():
            placed = instance in in_place | shown
            counts[instance] = modality.condition_channels - (modality.code_channels if placed else 0)
            if modality.context_shape:
                counts[instance] = 0  # the network attends to its tokens
        if name == "z_only":
            counts = {}
        return cls(
            name,
            process.layout,
            process.channels,
            process.anchor,
            {instance: count for instance, count in counts.items() if count},
            frozenset(in_place),
            frozenset(shown),
            zero_unused or name == "in_place",
        )

    def groups(self) -> dict[str, list[int]]:
        """Return every instance's channels of the network's input: its code's, then its condition's."""
        groups = {name: list(range(where.start, where.stop)) for name, where in self.layout.items()}
        start = self.channels
        for name, count in self.conditions.items():
            groups[name] += range(start, start + count)
            start += count
        return groups

    @property
    def width(self) -> int:
        """Return the number of channels of the network's input."""
        return self.channels + sum(self.conditions.values())

    def condition(self, name: str, data: Tensor, modalities: Mapping[str, Modality]) -> Tensor | None:
        """Return what an instance's data adds to the network's input, (B, k, H, W), None for nothing.

        An exact masked image has the anchor's code of what it shows in front; the code is 0 elsewhere.
        """
        if name in self.exact:
            anchor = modalities[self.anchor]
            rest = modalities[name].condition(data)[:, modalities[name].code_channels :]
            visible = modalities[name].visible(data)
            assert visible is not None, f"{name} shows no cells"
            code = anchor.encode(data[:, : anchor.data_shape[0]]) * visible[:, None]
            return torch.cat([code, visible[:, None].to(code), rest], dim=1)
        if name not in self.conditions:
            return None
        condition = modalities[name].condition(data)
        return condition[:, modalities[name].code_channels :] if name in self.in_place else condition

    def network_input(
        self, z_t: Tensor, u_t: Tensor, roles: Roles, codes: Codes, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the network's input, (B, width, H, W).

        z_t, u_t: (B, C, H, W); codes and conditions: of the given instances at least.
        """
        space = z_t if self.name in ("z_only", "z_plus_code") else u_t
        if self.zero_unused:
            carried = generated_channels(roles, self.layout, self.channels)
            space = space * carried.to(space.dtype)[:, :, None, None]
        if placed := {name: codes[name] for name in codes if name in self.in_place}:
            given = {name: roles[name] == GIVEN for name in placed}
            space = space + place(placed, given, self.layout, self.channels)
        shown = self.shown(roles, conditions)
        if shown is not None:
            visible, code = shown
            where = self.layout[self.anchor]
            mine = visible & (roles[self.anchor] != GIVEN)[:, None, None, None]
            space[:, where] = torch.where(mine, code, space[:, where])
        parts = [space]
        for name, count in self.conditions.items():
            if name in conditions:
                condition = conditions[name][:, -count:].float()
                parts.append(condition * over_cells(roles[name] == GIVEN, space))
            else:
                parts.append(space.new_zeros(len(space), count, *space.shape[2:]))
        return torch.cat(parts, dim=1)

    def shown(self, roles: Roles, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the cells of the anchor that given masked images show: bool (B, 1, H, W), and their code.

        None where no instance can show any. The code is the anchor's, (B, c, H, W), anything elsewhere.
        """
        found: tuple[Tensor, Tensor] | None = None
        where = self.layout[self.anchor]
        channels = where.stop - where.start
        for name in sorted(self.exact & conditions.keys()):
            code, seen = conditions[name][:, :channels].float(), conditions[name][:, channels : channels + 1]
            visible = (seen > 0) & (roles[name] == GIVEN)[:, None, None, None]
            if found is None:
                found = visible, code
            else:
                found = found[0] | visible, torch.where(visible, code, found[1])
        return found

    def known(self, roles: Roles, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return the cells in which E[z_0 | z_t] is known, bool (B, 1, H, W), and z_0 there; or None."""
        shown = self.shown(roles, conditions)
        if shown is None:
            return None
        return shown[0] & (roles[self.anchor] == GENERATED)[:, None, None, None], shown[1]


def _shares(name: str, modalities: Mapping[str, Modality], layout: Mapping[str, slice]) -> bool:
    """Return whether another instance that may be generated lies in an instance's channels."""
    where = layout[name]
    return any(
        other != name
        and not modality.only_given
        and layout[other].start < where.stop
        and layout[other].stop > where.start
        for other, modality in modalities.items()
    )
