"""Policy, reference, value model and reward model of PPO: four networks, or with LoRA one network in four roles.

Without LoRA (`tiny`) every role has weights of its own: policy and value model train all of theirs, the reference is a
frozen copy of the start, the reward model is the oracle's. With LoRA all stand on *one* base network, quantised or not,
and the adapter in use says which role it plays:

    base + adapter "default"    the policy          trained
    base + adapter "value"      the value model     trained, with a head of its own; from the reward model's adapter
    base + adapter "reward"     the reward model    frozen; only where it was trained on the same base
    base, adapters off          the reference       so the KL is exactly 0 before the first step

So the memory is that of one model and three adapters (VLM-RLAIF, LLaVA-RLHF do the same), and the roles take turns.
"""

import copy
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data import FeatureCache
from harness import load_options
from oracle import JudgeOracle
from preferences import reward_prompt
from video_llm import Prefix, add_lora, add_scalar_head, load_model, reference_of, unwrap


class Roles:
    """`with roles.as_("policy") as model`, `as_("value")`, `as_("reward")`, and `with roles.reference() as model`.

    args: model, value_model ("sft": the policy's start and a zero head), raters, reward_model, lora_r, lora_alpha,
    quantize. A value model from a reward model keeps its head.
    """

    def __init__(self, args, checkpoint, device):
        load = lambda path: load_model(path, **load_options(args, device))
        self.adapters = {}  # role -> adapter, with LoRA
        self.policy, self.processor = load(checkpoint or args.model)
        self.value, self.value_processor = self.policy, self.processor
        from_reward_model = args.value_model != "sft"
        if args.lora_r:
            if not checkpoint:
                self.policy = self.value = add_lora(self.policy, args.lora_r, args.lora_alpha)
            self.adapters = dict(policy="default", value="value")
            add_scalar_head(unwrap(self.policy))
            if from_reward_model or checkpoint:
                source = checkpoint / "value" if checkpoint else adapter_of(args.value_model, args.model)
                if not source:
                    sys.exit(f"--value_model {args.value_model}: with --lora_r an adapter of {args.model}, or sft")
                self.policy.load_adapter(source, "value", is_trainable=True)
            else:
                config = copy.deepcopy(self.policy.peft_config["default"])
                config.modules_to_save = ["score_head"]
                self.policy.add_adapter("value", config)
            reward = "reward_model" in args.raters and adapter_of(args.reward_model, args.model)
            if reward:
                self.adapters["reward"] = "reward"
                self.policy.load_adapter(reward, "reward")
            self.reference = reference_of(self.policy)
        else:
            value_start = args.value_model if from_reward_model else args.model
            self.value, self.value_processor = load(checkpoint / "value" if checkpoint else value_start)
            add_scalar_head(self.value)
            self.reference = reference_of(load(args.model)[0] if checkpoint else self.policy)
        if self.value_processor.tokenizer.get_vocab() != self.processor.tokenizer.get_vocab():
            sys.exit(f"--value_model {args.value_model}: its tokens are not those of the policy {args.model}")
        self.params = {name: self.trained(name) for name in ("policy", "value")}

    @contextmanager
    def as_(self, name):
        """`with roles.as_("value") as model`; PEFT makes the parameters of the chosen adapter trainable, no others."""
        if name in self.adapters:
            self.policy.set_adapter(self.adapters[name], inference_mode=name == "reward")
        yield self.value if name == "value" else self.policy

    def trained(self, name):
        """{name: parameter} of one role; a value model has no use for the language model's last layer."""
        with self.as_(name) as model:
            unused = "lm_head" if name == "value" else "score_head"
            own = f".{self.adapters[name]}." if self.adapters else ""  # PEFT leaves other adapters' heads trainable
            return {n: p for n, p in model.named_parameters() if p.requires_grad and unused not in n and own in n}

    def rescale_head(self, mean, gain):
        """A head that predicts a score predicts (score - mean) * gain."""
        with torch.no_grad():
            for name, p in self.params["value"].items():
                if "score_head" in name:
                    p.sub_(mean if name.endswith("bias") else 0).mul_(gain)

    def save_policy(self, file):
        """The trained weights of the policy, written aside and renamed."""
        aside = Path(file).with_suffix(".tmp.safetensors")
        save_file({name: p.detach().cpu().contiguous() for name, p in self.params["policy"].items()}, aside)
        aside.replace(file)

    def only_policy(self, best):
        """The end of training: the weights of the file `best`, if any, and no adapter but the policy's."""
        if best:
            for name, p in load_file(best).items():
                self.params["policy"][name].data.copy_(p)
        for role in sorted(self.adapters):  # "policy" first
            if role == "policy":
                self.policy.set_adapter("default")
            else:
                self.policy.delete_adapter(self.adapters[role])


def adapter_of(folder, base):
    """The adapter in `folder` or in `adapter/` beside it (a run's final/ is merged), if its base network is `base`."""
    for path in (Path(folder), Path(folder).parent / "adapter"):
        file = path / "adapter_config.json"
        if file.exists():
            theirs = json.loads(file.read_bytes())["base_model_name_or_path"]
            return path if Path(theirs).resolve() == Path(base).resolve() else None
    return None


def value_prompts(args, roles, oracle, device):
    """-> function(questions, clips, prefix of the policy) that makes the prompts of the value model: those of the
    policy, with the narrative before them where it started from a reward model that reads one."""
    file = Path(args.value_model, "reward_model.json")
    about = json.loads(file.read_text()) if file.exists() else dict(narrative_clips=0)
    cache, teller = FeatureCache(unwrap(roles.value), roles.value_processor, args.cache), None
    if about["narrative_clips"]:
        same = getattr(oracle, "told_by", None) == (about["narrative_model"], about["narrative_clips"])
        teller = oracle.teller if same else JudgeOracle(
            about["narrative_model"], args.cache, True, device, clips=about["narrative_clips"],
            dtype=args.oracle_dtype, tokens=args.oracle_tokens)

    def build(questions, clips, prefix):
        if args.value_model == "sft":
            return prefix
        stories = teller.narratives(clips) if teller else [None] * len(clips)
        asked = [reward_prompt(q, story) for q, story in zip(questions, stories)]
        return Prefix.build(roles.value_processor, cache, asked, clips, device)

    return build
