"""The parts that backbones share."""

import torch
import torch.nn.functional as F

from mmdiff_ray.models.layers import Attention, group_norm


def test_attention_is_the_softmax_of_scaled_unit_queries_and_keys():
    torch.manual_seed(0)
    attention = Attention(8, 8, context_channels=6, zero=False)
    with torch.no_grad():
        attention.scale.mul_(torch.rand(8) + 0.5)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    query, (key, value) = attention.query(x), attention.key_value(context).chunk(2, dim=-1)
    query = query / query.square().mean(-1, keepdim=True).sqrt() * attention.scale
    key = key / key.square().mean(-1, keepdim=True).sqrt()
    expected = attention.out((query @ key.mT / 8**0.5).softmax(-1) @ value)
    torch.testing.assert_close(attention(x, context), expected)


def test_heads_attend_each_to_their_own_channels():
    torch.manual_seed(0)
    attention = Attention(8, 4, zero=False)
    x = torch.randn(1, 5, 8)
    whole = attention(x)
    with torch.no_grad():
        attention.out.weight[:, 4:] = 0  # what the second head read is no longer used ...
        first = attention(x)
        attention.query.weight[4:] = 0  # ... so its queries no longer matter
    assert not torch.allclose(whole, first)
    torch.testing.assert_close(attention(x), first)


def test_any_width_is_cut_into_heads_of_at_least_the_asked_size():
    heads = {channels: Attention(channels, 64).heads for channels in (32, 64, 96, 128, 160, 192, 200)}
    assert heads == {32: 1, 64: 1, 96: 1, 128: 2, 160: 2, 192: 3, 200: 2}


def test_attention_adds_nothing_before_the_first_step():
    assert torch.equal(Attention(8, 4)(torch.randn(1, 5, 8)), torch.zeros(1, 5, 8))


def test_logits_stay_bounded_however_large_the_input():
    torch.manual_seed(0)
    attention = Attention(8, 8, zero=False)
    x = torch.randn(1, 64, 8)
    assert torch.isfinite(attention(x * 1e15)).all()
    bound = F.softmax(torch.tensor([8**0.5, *[-(8**0.5)] * 63]), 0)[0]
    query, key = attention.query(x * 1e6), attention.key_value(x * 1e6)[..., :8]
    logits = F.rms_norm(query, (8,)) @ F.rms_norm(key, (8,)).mT / 8**0.5
    assert logits.softmax(-1).max() <= bound


def test_a_group_norm_has_at_most_32_groups_of_at_least_4_channels():
    groups = {channels: group_norm(channels).num_groups for channels in (2, 16, 20, 32, 64, 128, 200, 1024)}
    assert groups == {2: 1, 16: 4, 20: 5, 32: 8, 64: 16, 128: 32, 200: 25, 1024: 32}
