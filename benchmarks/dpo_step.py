"""Seconds and memory of one DPO step: this repository, a plain version, and TRL's DPOTrainer,
taking turns.

Run      pip install -r benchmarks/requirements.txt
         python benchmarks/dpo_step.py --out docs/results/dpo_step   15 minutes on two CPU cores
         python benchmarks/dpo_step.py --points 64,32,4 --rounds 2   one point

One point is P,R,B: B pairs of answers of R tokens to prompts of P; `embedded` is the default of
dpo_iter_w2s.py. The reference is a frozen copy, asked in every step, as in the scripts. The rest is
as in grpo_step.py:

  ours     both answers behind one prefix (`token_logprobs`), the loss of dpo_iter_w2s.py
  plain    forward passes over 2*B rows of P + R tokens
  trl      DPOTrainer as it comes; its checkpointing and bfloat16 are off

Before a point is measured, `ours` and `plain` give the gradient of one batch: they must agree to
1e-5.
"""

import turns
from grpo_step import prefix_of

POINTS = ["64,32,8", "256,64,4", "1024,64,2", "embedded"]
LR, BETA = 1e-4, 0.1


def shape_of(point):
    P, R, _, B = turns.EMBEDDED
    return (P, R, B) if point == "embedded" else tuple(map(int, point.split(",")))


def name_of(p):
    base = "" if p["base"] == "float32" else f" {p['shape']} {p['base']}"
    return f"P={p['P']} R={p['R']} B={p['B']}" + base + (" (embedded)" if p["shape"] == "tiny"
                                                         else "")


def batch(P, R, B, step):
    """Prompts (B,P), chosen and rejected answers (B,2,R), the same on all sides."""
    both = turns.random_ids((B, P + 2 * R), step)
    return both[:, :P], both[:, P:].view(B, 2, R)


# --------------------------------------------------------------------------------------------------
# The three sides. Each is a generator that takes a step per `next`.
# --------------------------------------------------------------------------------------------------
def our_loss(model, reference, prompts, answers):
    import torch

    from dpo_iter_w2s import dpo_loss
    from video_llm import token_logprobs

    prefix, lengths = (prefix_of(prompts, answers.device),
                       torch.full(answers.shape[:2], answers.shape[2]))
    logps_of = lambda m: token_logprobs(m, prefix, answers,
                                        lengths.to(answers.device))[0].sum(-1).view(-1, 2)
    with torch.no_grad(), reference() as ref:
        ref_logps = logps_of(ref)
    return dpo_loss(logps_of(model), ref_logps, BETA)[0].mean()


def plain_loss(model, reference, prompts, answers):
    import torch
    import torch.nn.functional as F

    B, _, R = answers.shape
    rows = torch.cat([prompts.repeat_interleave(2, 0), answers.reshape(2 * B, R)], 1)

    def logps_of(m):
        logits = m(rows, logits_to_keep=R + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, rows[:, -R:, None]).sum((1, 2)).view(B, 2)

    with torch.no_grad(), reference() as ref:
        ref_logps = logps_of(ref)
    rewards = BETA * (logps_of(model) - ref_logps)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


def steps_of(args, loss, around, P, R, B):
    import torch

    from video_llm import reference_of

    model = around(turns.decoder(args))
    params = [p for p in model.parameters() if p.requires_grad]
    reference, optimizer = reference_of(model), torch.optim.AdamW(params, lr=LR)
    yield
    for step in range(10**9):
        loss(model, reference, *(x.to(args.device) for x in batch(P, R, B, step))).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def ours(args, P, R, B):
    return steps_of(args, our_loss, turns.video_llm_around, P, R, B)


def plain(args, P, R, B):
    from peft import get_peft_model

    lora = (lambda model: model if args.base == "float32"
            else get_peft_model(model, turns.lora_config()))
    return steps_of(args, plain_loss, lora, P, R, B)


def trl(args, P, R, B):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, text = turns.word_tokenizer()
    rows = []
    for step in range(args.rounds + 2):
        for prompt, (chosen, rejected) in zip(*(x.tolist() for x in batch(P, R, B, step))):
            end = " </s>"  # which the trainer would add: the answer's last token
            rows.append(dict(prompt=text(prompt), chosen=f" {text(chosen[:-1])}{end}",
                             rejected=f" {text(rejected[:-1])}{end}"))
    config = turns.trainer_config(args, DPOConfig, learning_rate=LR, per_device_train_batch_size=B,
                                  beta=BETA, max_length=None)
    model = turns.decoder(args)
    lora = None if args.base == "float32" else turns.lora_config()
    return turns.stepwise(lambda callback: DPOTrainer(model=turns.saved(model) if lora is None
                                                      else model, peft_config=lora, args=config,
                                                      callbacks=[callback],
                                                      processing_class=tokenizer,
                                                      train_dataset=Dataset.from_list(rows)))


# --------------------------------------------------------------------------------------------------
# Before, and what comes out
# --------------------------------------------------------------------------------------------------
def check(args, point, P, R, B):
    pairs = batch(P, R, B, 0)
    return turns.checked(args, point, lambda m, ref: our_loss(m, ref, *pairs),
                         lambda m, ref: plain_loss(m, ref, *pairs))


def floor_seconds(weights, P, R, B, flops, base):
    """Reference forward, policy forward and backward; the gradient of frozen weights is not
    computed."""
    return (8 if base == "float32" else 6) * weights * B * (P + 2 * R) / flops


def measured(args, point, flops):
    P, R, B = shape_of(point)
    args.shape = "tiny" if point == "embedded" else args.shape
    note = check(args, point, P, R, min(B, 2))
    rows = turns.measure(args, __file__, point)
    floor = floor_seconds(turns.weights_of(args.shape), P, R, B, flops, args.base)
    note += f"; prompts read once save {2 * (P + R) / (P + 2 * R):.2f} times the floor's arithmetic"
    return dict(P=P, R=R, B=B, shape=args.shape, base=args.base, rounds=rows, floor=floor,
                note=note, sides=turns.summary(rows, floor, floor, 2 * B * R))


def main(args):
    if args.side:
        return turns.child(args, globals()[args.side](args, *shape_of(args.points[0])))
    flops, bandwidth = turns.machine(args)
    about, shape = turns.about_machine(args, flops, bandwidth), args.shape
    points = []
    for point in args.points:
        args.shape = shape
        points.append(measured(args, point, flops))
    command = ("python benchmarks/dpo_step.py --device cuda --shape 7b --points 1024,64,2 "
               f"--out {args.out} --base")
    turns.write(args, about, points, name_of,
                [(f"7b-shaped, {base}, LoRA r = 64", f"{command} {base}")
                 for base in ("nf4", "bfloat16")])


if __name__ == "__main__":
    main(turns.parser_of(__doc__, POINTS, rounds=5).parse_args())
