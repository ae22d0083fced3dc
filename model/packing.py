"""G answers after one prefix: who sees whom in a packed row, attention that does not compute what
nobody sees, and rows that grow in place while they are sampled, on a GPU as one CUDA graph a token.

        prefix  a1 a1 a1  a2  a3 a3 ...     one row of P + sum of lengths tokens

`video_llm.packed` and `video_llm.generate` lay rows out like this; B rows, b of them still running.
`tree_rows` shares more than the prefix: the comparisons that a judge reads have common beginnings.
"""

import gc
import math
from itertools import takewhile

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def positions(mask):
    """Position ids that start at 0 on the first real token of a left-padded row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def block_mask(owner, place, columns, dtype, window=None):
    """Additive mask (B,1,L,K) of the tokens in `columns` (L,) of K. owner (B,K): answer g >= 0, the
    prefix (-1), nobody (-2, padding); place (B,K): their positions. A token sees the prefix and its
    own past, never another answer, of these the last `window` where the decoder has one (Mistral).
    Padding sees itself: no empty softmax."""
    sees = (owner[:, None] == -1) | (owner[:, None] == owner[:, columns, None])  # (B,L,K)
    sees &= torch.arange(owner.shape[1], device=owner.device) <= columns[:, None]
    if window:
        sees &= place[:, columns, None] - place[:, None] < window
    return additive(sees, dtype)


def additive(sees, dtype):
    """(B,L,K) bool -> mask (B,1,L,K), 0 where a token sees another."""
    return torch.zeros(sees.shape, dtype=dtype,
                       device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


def whole_rows(head, inputs):
    """Hook before the head of words, which reads the end of every row. Such a slice is multiplied
    row by row where the weights want no gradient, and at once where they do: on CPUs with AVX2
    alone that gives other last digits, and the KL to one's own copy is not zero. As a tensor of its
    own it is done at once."""
    return (inputs[0].contiguous(),)


def sdpa(module, query, key, value, attention_mask, prefix=None, **kwargs):
    """`sdpa` of transformers; packed rows go through it in two parts. prefix: (P, causal), the
    columns in which no row has an answer, and whether none of them is padding.

    With one mask it computes all (P + A)^2 pairs, A tokens of answers. Of the first P rows only the
    first P columns count, and without padding the kernel skips the upper triangle of these: P^2 / 2
    + A (P + A)."""
    part = lambda q, k, v, mask, **kw: sdpa_attention_forward(module, q, k, v, mask, **kw,
                                                              **kwargs)[0]
    if prefix is None:
        return part(query, key, value, attention_mask), None
    P, causal = prefix
    first = part(*(x[:, :, :P] for x in (query, key, value)),
                 None if causal else attention_mask[..., :P, :P])
    return torch.cat([first, part(query[:, :, P:], key, value, attention_mask[..., P:, :])],
                     1), None


AttentionInterface.register("sdpa", sdpa)


# --------------------------------------------------------------------------------------------------
# Texts with common beginnings: trees
# --------------------------------------------------------------------------------------------------
class Tree:
    """Texts as a tree of tokens: what several of them begin with is there once.

        Response 1: red -- Response 2: blue   Which is better? -- red
                        |                                      `- blue
                        `- Response 2: green  Which is better? -- red
                                                               `- green

    texts: pairs (before, reply) of lists of ids. Only the replies are scored. Nodes are numbered
    depth first: the descendants of node n are n + 1, .., end[n] - 1. A reply's last token is no
    node, because what it predicts is not read. In a row the nodes that predict a reply come last,
    so that the other columns need no logits.

    ids, place, number, end   of every node, in the order of the row; place 0 follows the prefix
    read                      for every text: where in the row the tokens of its reply are
                              predicted, -1 at the prefix's last token
    """

    def __init__(self, texts):
        self.texts, paths = texts, {}
        ids, place, end, path, last = [], [], [], [], []
        for k in sorted(range(len(texts)), key=lambda k: sum(texts[k], [])):
            before, reply = texts[k]
            text = before + reply[:-1]
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(last, text))))
            path = [*path[:shared], *range(len(ids), len(ids) + len(text) - shared)]
            ids += text[shared:]
            place += range(shared, len(text))
            end += [0] * (len(text) - shared)
            for n in path:
                end[n] = len(ids)
            last, paths[k] = text, [-1, *path][len(before) :]
        read = set().union(*paths.values())
        self.number = sorted(range(len(ids)), key=lambda n: n in read)
        self.ids, self.place, self.end = ([x[n] for n in self.number] for x in (ids, place, end))
        at = {n: column for column, n in enumerate(self.number)} | {-1: -1}
        self.read = [[at[n] for n in paths[k]] for k in range(len(texts))]


def trees(texts, room):
    """The texts in one tree; where it has more than `room` nodes, in those of its halves."""
    tree, half = Tree(texts), len(texts) // 2
    if len(tree.ids) <= room or not half:
        return [tree]
    return trees(texts[:half], room) + trees(texts[half:], room)


def tree_rows(heads, trees, pad_id, dtype, window, device):
    """A batch of rows, each a head (ids) and the tree that follows it, padded on the left.

    -> the inputs of `VideoLLM` (without the videos) and (row, column, token), three tensors: where
    in its logits each token of each reply is predicted. Logits are kept from the first such column.
    """
    W = max(len(h) + len(t.ids) for h, t in zip(heads, trees))
    A = max(1, *(len(t.ids) for t in trees))
    rows = lambda fill, of_heads, of_trees: torch.tensor(
        [[fill] * (W - len(h) - len(t)) + [*h, *t] for h, t in zip(of_heads, of_trees)],
        device=device)
    ids = rows(pad_id, heads, [t.ids for t in trees])
    place = rows(0, [range(len(h)) for h in heads],
                 [[len(h) + n for n in t.place] for h, t in zip(heads, trees)])
    # A head is a chain before node 0, numbered -P..-1, and all nodes descend from it. So a token
    # sees itself and the tokens of a smaller number that end after it. Padding sees padding.
    number = rows(-W - 1, [range(-len(h), 0) for h in heads], [t.number for t in trees])
    end = rows(-W, [[W] * len(h) for h in heads], [t.end for t in trees])
    sees = (number[:, None] <= number[..., None]) & (number[..., None] < end[:, None])  # (B,W,W)
    if window:
        sees &= place[..., None] - place[:, None] < window
    causal = not window and bool((number[:, 0] > -W - 1).all())  # nothing is padded
    keep = max(len(t.ids) - min(map(min, t.read)) for t in trees)
    read = [(row, keep - len(tree.ids) + column, token) for row, tree in enumerate(trees)
            for (_, reply), columns in zip(tree.texts, tree.read)
            for column, token in zip(columns, reply)]
    inputs = dict(input_ids=ids, position_ids=place, attention_mask=additive(sees, dtype),
                  logits_to_keep=keep, prefix=(W - A, causal), use_cache=False)
    return inputs, torch.tensor(read, device=device).T


# --------------------------------------------------------------------------------------------------
# Rows that grow while they are sampled
# --------------------------------------------------------------------------------------------------
class GrowingLayer(DynamicLayer):
    """Keys and values of a layer with room to grow by half: a token's are written in place, where a
    DynamicLayer copies all there are at every token."""

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


class FixedLayer(GrowingLayer):
    """Keys and values with room for `length` tokens from the start; later ones are written to
    `columns`, a tensor."""

    def __init__(self, length, columns):
        super().__init__()
        self.length, self.columns = length, columns

    def update(self, key_states, value_states, *args, **kwargs):
        states, count = (key_states, value_states), key_states.shape[2]
        if self.is_initialized:
            for room, new in zip(self.room, states):
                room.index_copy_(2, self.columns, new)
            return self.room
        self.lazy_initialization(*states)
        self.room = [x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in states]
        self.write(0, states)
        self.keys, self.values = (x[:, :, :count] for x in self.room)
        return self.keys, self.values


class GrowingRow:
    """The rows of B groups while they are sampled. kind: dtype of masks, sliding window or None."""

    most_idle = 0.0  # of the groups may have ended and stay nevertheless

    def __init__(self, model, prefix, kind):
        mask = prefix.attention_mask
        self.model, self.kind = model, kind
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        self.owner, self.place = mask - 2, positions(mask)  # (b,K)
        # (b,1), later (b,A): positions of the tokens to come
        self.next = mask.sum(-1, keepdim=True)

    def read(self, prefix):
        """-> logits (B,1,V) of every answer's first token."""
        return self.model(input_ids=prefix.input_ids, attention_mask=prefix.attention_mask,
                          logits_to_keep=1,
                          position_ids=positions(prefix.attention_mask), past_key_values=self.cache,
                          use_cache=True,
                          **prefix.model_inputs()).logits

    def append(self, token, who):
        """token (b,A) of the answers who (b,A) -> logits (b,A,V) of their next ones."""
        place = self.next.expand_as(who)
        self.owner, self.place = torch.cat([self.owner, who], 1), torch.cat([self.place, place], 1)
        K = self.owner.shape[1]
        self.next = self.next + 1
        return self.forward(token, place, torch.arange(K - who.shape[1], K, device=who.device))

    def forward(self, token, place, columns):
        mask = block_mask(self.owner, self.place, columns, *self.kind)
        return self.model(input_ids=token, attention_mask=mask, position_ids=place,
                          past_key_values=self.cache,
                          use_cache=True).logits

    def select(self, some):
        """Only these groups go on, (b,) bool."""
        self.owner, self.place, self.next = (x[some] for x in (self.owner, self.place, self.next))
        self.cache.batch_select_indices(some.nonzero()[:, 0])


class FixedRow(GrowingRow):
    """The same with room for all T tokens of G answers from the start, and every tensor of a step
    where it was in the step before: so a GPU gets a step once, as a CUDA graph, and replays it for
    every other token, without Python and without launching kernels one by one. All G answers of a
    group go on to its end, and groups leave when more than half of them have ended: then there is
    another graph."""

    most_idle = 0.5

    def __init__(self, model, prefix, kind, G, T):
        super().__init__(model, prefix, kind)
        P, room = self.owner.shape[1], G * (T - 1)
        self.owner, self.place = F.pad(self.owner, (0, room), value=-2), F.pad(self.place,
                                                                               (0, room))
        self.next = self.next.repeat(1, G)
        self.columns = columns = torch.arange(P, P + G, device=self.owner.device)
        # with self: a cycle
        self.cache = Cache(layer_class_to_replicate=lambda: FixedLayer(P + room, columns))
        self.graph = self.token = self.logits = None

    def append(self, token, who):
        # the first step of these groups is taken as it is; it warms up what is captured
        if self.token is None:
            self.token, self.who = token.clone(), who.contiguous()
            return self.step()
        self.token.copy_(token)
        if not token.is_cuda:
            return self.step()
        if self.graph is None:
            self.graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
            gc.disable()  # what it frees meanwhile could end the capture
            try:
                # NCCL's threads may go on
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.logits = self.step()
            finally:
                gc.enable() if collects else None
        self.graph.replay()
        return self.logits

    def step(self):
        """What is captured: no number may come to the processor, nothing change its shape or
        place."""
        self.owner.index_copy_(1, self.columns, self.who)
        self.place.index_copy_(1, self.columns, self.next)
        logits = self.forward(self.token, self.next, self.columns)
        self.columns += self.columns.shape[0]
        self.next += 1
        return logits

    def select(self, some):
        super().select(some)
        self.graph = self.token = self.logits = None


def row_of(model, prefix, kind, G, T, cuda_graphs):
    """What `generate` appends tokens to. ValueError where a graph cannot hold the model."""
    if not cuda_graphs:
        return GrowingRow(model, prefix, kind)
    config = getattr(model, "module", model).config.text_config
    if "dynamic" in str(getattr(config, "rope_parameters", "")):
        raise ValueError("--cuda_graphs: dynamic RoPE asks the GPU how long a row is, which no "
                         "graph can hold")
    return FixedRow(model, prefix, kind, G, T)


def batches(tokens, budget, stretch=math.inf):
    """tokens (B,) of a packed row each -> lists of places, together each place once: rows of like
    length, as many as `budget` holds when padded to the longest, one at least. The longest has at
    most `stretch` times the tokens of the shortest."""
    parts, tokens = [], tokens.tolist()
    for i in sorted(range(len(tokens)), key=lambda row: tokens[row]):  # the last is the longest
        fits = parts and (len(parts[-1]) + 1) * tokens[i] <= budget
        if fits and tokens[i] <= stretch * tokens[parts[-1][0]]:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
