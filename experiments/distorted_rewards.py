"""GRPO_rank on a reward that is a distortion of the truth, another one for every question: what are
ranks good for?

    python experiments/distorted_rewards.py --distortion tail --advantage score --name tail_score

All flags but --distortion are those of grpo_rank.py, whose oracle is token F1 with the label
(--oracle reference) seen through one of these; the numbers drawn belong to a question and are the
same whenever it is asked:

    saturation  tanh(k r)                  k ~ U(2, 8): what is good and what is best look alike
    tail        exp(k r) - 1               k ~ U(2, 8): the best answer dwarfs all others
    flip10/20/30  each answer changes its score with another one of its group with probability 0.1 /
                  0.2 / 0.3

The first two are monotone within a question: the ranks are those of r, as `grpo_rank.py --oracle
reference` sees them. Equal answers have equal scores. An offset or a factor for every question is
not among them: GRPO's (r - mean) / std takes both out exactly (a test shows it). `bash
experiments/distorted_rewards.sh` runs all with `oracle_rank` and `score` on three seeds;
distortions.py makes the table and the picture.
"""

import sys
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_rank  # noqa: E402
from oracle import (
    ReferenceOracle,  # noqa: E402
    one_of_equals,  # noqa: E402
)
from plumbing.flags import parse_args  # noqa: E402

DISTORTIONS = ("saturation", "tail", "flip10", "flip20", "flip30")


class DistortedOracle(ReferenceOracle):
    def __init__(self, records, distortion, seed):
        super().__init__(records)
        self.distortion, self.seed = distortion, seed

    def score(self, videos, questions, answers):
        scores, ok = super().score(videos, questions, answers)
        rows = [distort(self.distortion, row, one,
                        np.random.default_rng([self.seed, zlib.crc32(f"{v} {q}".encode())]))
                for row, one, v, q in zip(scores.tolist(), one_of_equals(answers), videos,
                                          questions)]
        return torch.tensor(rows), ok


def distort(kind, rewards, one, rng):
    """Rewards [G] in [0,1] of one question, `one` [G]: the place of the answer that each is a copy
    of. -> [G]."""
    r = np.array(rewards)
    if kind == "saturation":
        r = np.tanh(rng.uniform(2, 8) * r)
    elif kind == "tail":
        r = np.expm1(rng.uniform(2, 8) * r)
    else:  # flip10, flip20, flip30
        kinds = sorted(set(one))  # different answers
        for i in kinds:
            j = int(rng.choice(kinds))
            if rng.random() < int(kind[4:]) / 100:
                r[[i, j]] = r[[j, i]]
        r = r[one]
    return r.tolist()


if __name__ == "__main__":
    if "--distortion" not in sys.argv or sys.argv[-1] == "--distortion":
        sys.exit(f"--distortion: choose one of {', '.join(DISTORTIONS)}")
    at = sys.argv.index("--distortion")
    kind = sys.argv[at + 1]
    if kind not in DISTORTIONS:
        sys.exit(f"--distortion {kind}: choose one of {', '.join(DISTORTIONS)}")
    sys.argv[at : at + 2] = ["--oracle", "reference"]
    args = parse_args(grpo_rank.Args)
    grpo_rank.make_oracle = lambda args, records, device: DistortedOracle(records, kind, args.seed)
    grpo_rank.main(args)
