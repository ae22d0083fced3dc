"""G answers behind one prefix: who sees whom in a packed row, and attention that does not compute what nobody sees,
keys and values that stay where they are.

        prefix  a1 a1 a1  a2  a3 a3 ...     one row of P + sum of lengths tokens; positions restart behind the prefix

`video_llm.packed` and `video_llm.generate` lay rows out like this.
"""

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def positions(mask):
    """Position ids that start at 0 on the first real token of a left-padded row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def block_mask(owner, place, L, dtype, window=None):
    """Additive mask (B,1,L,K) of the last L of K tokens. owner (B,K): answer g >= 0, the prefix (-1), nobody (-2,
    padding); place (B,K): their positions. A token sees the prefix and its own past, never another answer, of these
    the last `window` where the decoder has one (Mistral). Padding sees itself: no empty softmax."""
    sees = (owner[:, None] == -1) | (owner[:, None] == owner[:, -L:, None])  # (B,L,K)
    sees &= torch.ones(sees.shape[1:], dtype=torch.bool, device=sees.device).tril(sees.shape[2] - L)
    if window:
        sees &= place[:, -L:, None] - place[:, None] < window
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def sdpa(module, query, key, value, attention_mask, prefix=None, **kwargs):
    """`sdpa` of transformers; packed rows go through it in two parts. prefix: (P, causal), the columns in which no row
    has an answer, and whether none of them is padding.

    With one mask it computes all (P + A)^2 pairs, A tokens of answers. Of the first P rows only the first P columns
    count, and without padding the kernel skips the upper triangle of these: P^2 / 2 + A (P + A).
    """
    part = lambda q, k, v, mask, **kw: sdpa_attention_forward(module, q, k, v, mask, **kw, **kwargs)[0]
    if prefix is None:
        return part(query, key, value, attention_mask), None
    P, causal = prefix
    first = part(*(x[:, :, :P] for x in (query, key, value)), None if causal else attention_mask[..., :P, :P])
    return torch.cat([first, part(query[:, :, P:], key, value, attention_mask[..., P:, :])], 1), None


AttentionInterface.register("sdpa", sdpa)


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer with room to grow by half: a token's are written in place, where a DynamicLayer copies
    all there are at every token."""

    def update(self, key_states, value_states, *args, **kwargs):
        states, have = (key_states, value_states), self.get_seq_length()
        count = have + key_states.shape[2]
        if not have:
            self.lazy_initialization(*states)
            self.room = states
        if have and count > self.room[0].shape[2]:
            self.room = [x.new_empty(*x.shape[:2], count * 3 // 2, x.shape[3]) for x in states]
            self.write(0, (self.keys, self.values))
        if have:
            self.write(have, states)
        self.keys, self.values = (x[:, :, :count] for x in self.room)
        return self.keys, self.values

    def write(self, at, states):
        for room, new in zip(self.room, states):
            room[:, :, at : at + new.shape[2]] = new

    def batch_select_indices(self, indices):
        count, self.room = self.keys.shape[2], [x[indices] for x in self.room]
        self.keys, self.values = (x[:, :, :count] for x in self.room)
