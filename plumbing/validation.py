"""What PPO measures on held-out questions, and when another oracle ends the run."""

import sys

from plumbing import processes
from plumbing.api_client import ApiError
from plumbing.text import is_correct
from video_llm import answer


class Validation:
    """Greedy answers to held-out questions, shared out over the processes.

    eval/accuracy   of the questions that have a label
    eval/margin     with an oracle: its score of an answer less its score of the start's answer

    The policy with the largest margin is kept in best.safetensors. `state` goes into checkpoints.
    It holds the best margin, the step of it, and for how many steps since then the oracle had
    nothing to compare, or could not. `differ` says which answers need an order (oracle.py).
    """

    def __init__(self, run, roles, records, cache, oracle, differ, state):
        self.run, self.roles, self.cache = run, roles, cache
        self.oracle, self.differ, self.state = oracle, differ, state
        self.records, self.wanted = records[run.rank :: run.world], bool(records)
        if oracle and len(records) < run.world:
            sys.exit(f"{run.args.eval_data}: {len(records)} usable questions; --stop_oracle needs "
                     "one for each process")
        if oracle:
            with roles.reference() as start:
                self.answers_of_start = self.answers_of(start)

    def answers_of(self, model):
        longest = self.run.args.max_new_tokens
        return answer(model, self.roles.processor, self.cache, self.records, longest)

    def __call__(self, step):
        """Before the first step, after every --eval_steps and after the last one.
        -> True: the oracle saw no progress in --patience evaluations."""
        args, log = self.run.args, self.run.log
        if not self.wanted or step % args.eval_steps and step < args.steps:
            return False
        with self.roles.as_("policy") as policy:
            answers = self.answers_of(policy)
        labelled = [(a, r["answer"]) for a, r in zip(answers, self.records) if r["answer"]]
        log.add("eval/accuracy", sum(is_correct(a, label) for a, label in labelled), len(labelled))
        if not self.oracle:
            return False
        with processes.one_line_errors(ApiError):
            return self.no_progress(step, answers)

    def no_progress(self, step, answers):
        args, log, state = self.run.args, self.run.log, self.state
        clips, questions = ([r[key] for r in self.records] for key in ("clip", "question"))
        pairs = [list(pair) for pair in zip(answers, self.answers_of_start)]
        scores, ok = self.oracle.score(clips, questions, pairs)
        differ = self.differ(pairs)
        asked = processes.all_sum(differ.sum().double())
        scored = self.run.scored_or_stop(step, ok, differ, "--stop_oracle")
        total, count = ((scores[:, 0] - scores[:, 1]) * ok).sum().double(), ok.sum().double()
        if scored:
            log.add("eval/margin", total, count)
        # answers that are all the start's are tied unasked: no lack of progress
        if not scored or not asked and state["best"] is not None:
            state["unscored"] = state.get("unscored", 0) + args.eval_steps
            return False
        margin = (processes.all_sum(total) / processes.all_sum(count).clamp(min=1)).item()
        if state["best"] is None or margin > state["best"]:
            state["best"], state["best_step"], state["unscored"] = margin, step, 0
            if self.run.rank == 0:
                self.roles.save_policy(self.run.folder / "best.safetensors")
        silent = state.get("unscored", 0)
        return step - state["best_step"] - silent >= args.patience * args.eval_steps
