"""Run by test_machines.py, two processes: a sharded model against the whole one, part by part."""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.distributed.tensor import DTensor

import plumbing.run
from plumbing import processes
from video_llm import Prefix, add_lora, generate, load_model, token_logprobs, unwrap

policy, folder = sys.argv[1], Path(sys.argv[2])
# who waits for ever says so, and at which line
processes.STEP = processes.PATIENCE = timedelta(minutes=2)
rank, world, device = processes.setup_dist()


def prefix_of(processor, rank):
    ids, mask = processor.pad([processor.prompt_ids(q)
                               for q in ("what happens?", "where is the red circle?")], "left")
    features = torch.randn(2, 3, 5, 48, generator=torch.Generator().manual_seed(rank))
    return Prefix(ids, mask, features, torch.ones(2, 3, dtype=torch.bool))


def fresh(lora):
    torch.manual_seed(0)
    model, processor = load_model(policy, dtype=torch.bfloat16 if lora else torch.float32,
                                  gradient_checkpointing=lora)
    return add_lora(model, 4, 8, train_bridge=True) if lora else model, processor


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                             weight_decay=0.0)


def step(model, optimizer, processor, ranks):
    """One step on the batches of `ranks`; the mean gradient over them is DDP's and FSDP's. -> loss,
    gradient norm."""
    losses = []
    for r in ranks:
        tokens = torch.randint(6, 60, (2, 3, 5), generator=torch.Generator().manual_seed(10 + r))
        logprobs, _ = token_logprobs(model, prefix_of(processor, r), tokens, torch.full((2, 3), 5))
        losses.append(-logprobs.mean())
        (losses[-1] / len(ranks)).backward()
    norm = processes.clip_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).mean().detach(), norm


def same(a, b, what, within):
    a, b = (torch.as_tensor(x).float() for x in (a, b))
    assert torch.allclose(a, b, rtol=within, atol=within), (what, a, b)


# LoRA: a frozen bfloat16 base beside float32 adapters, layers computed again
for lora in (False, True):
    within = 2e-2 if lora else 1e-5
    (whole, processor), (model, _) = fresh(lora), fresh(lora)
    model = processes.distribute(model, device, sharded=True)
    layer = unwrap(model).language_model.model.layers[0].self_attn.q_proj.weight if not lora else \
        unwrap(model).language_model.model.layers[0].self_attn.q_proj.base_layer.weight
    # half of it lies here
    assert isinstance(layer, DTensor) and layer.to_local().shape[0] * 2 == layer.shape[0]
    assert not isinstance(next(unwrap(model).vision_tower.parameters()), DTensor)
    ours, theirs = optimizer_of(model), optimizer_of(whole)

    # 1. Sampling: the answers of the ranks end at different tokens, and every rank waits for the
    # last one
    uniforms, eos = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(rank)), 0
    # draws token 0: here an answer ends
    uniforms.scatter_(-1, torch.tensor([[[0], [1]], [[2], [2]]]) + 4 * rank, 0.0)
    found = generate(model, prefix_of(processor, rank), uniforms, eos)
    with torch.no_grad():
        expected = generate(whole, prefix_of(processor, rank), uniforms, eos)
    assert processes.all_gather(expected[1].tolist()) == [[[1, 2], [3, 3]], [[5, 6], [7, 7]]]
    assert found[0].shape[-1] == 7
    if not lora:  # bfloat16 may turn a tie
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0][..., : expected[0].shape[-1]], expected[0])

    # 2. Training: two steps of both
    for _ in range(2):
        loss, norm = step(model, ours, processor, [rank])
        expected_loss, expected_norm = step(whole, theirs, processor, range(world))
        same(processes.all_sum(loss) / world, expected_loss, "loss", within)
        same(norm, expected_norm, "gradient norm", within)

    # 3. Saved as a whole by rank 0, loaded, sharded again: the third step is that of the run that
    # went on
    plumbing.run.save_checkpoint(folder, f"checkpoint-{int(lora)}", model, processor, ours, 2)
    processes.barrier()
    saved, _ = load_model(folder / f"checkpoint-{int(lora)}",
                          dtype=torch.bfloat16 if lora else torch.float32,
                          gradient_checkpointing=lora)
    state = whole.state_dict()
    assert saved.state_dict().keys() == state.keys()
    for name, p in saved.state_dict().items():
        same(p, state[name], name, 5e-3 if lora else 1e-4)
    again = processes.distribute(saved, device, sharded=True)
    resumed = optimizer_of(again)
    assert plumbing.run.load_trainer(folder / f"checkpoint-{int(lora)}", resumed, again) == 2
    went_on, continued = (step(m, o, processor, [rank])
                          for m, o in ((model, ours), (again, resumed)))
    assert torch.equal(went_on[0], continued[0]) and torch.equal(went_on[1], continued[1])
    last = (step(m, o, processor, [rank])[0] for m, o in ((model, ours), (again, resumed)))
    assert torch.equal(*last)  # the optimizer's state as well
    processes.barrier()
    print("equal", "LoRA" if lora else "all weights") if rank == 0 else None
torch.distributed.destroy_process_group()
