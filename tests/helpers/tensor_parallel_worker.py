"""A process of the tensor-parallel test: ``tensor_parallel_worker.py FOLDER RANK`` fails if its tokens differ."""

import os
import sys
from pathlib import Path

import torch
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest
from transformers import AutoModelForCausalLM


def main(folder: Path, rank: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=int(rank), world_size=2)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    case = torch.load(folder / "case.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    expected = case.pop("expected")
    cache = enable_quest(model, QuestConfig(budget=48, page_size=16, dense_layers=1), max_tokens=96)
    out = model.generate(**case, past_key_values=cache, max_new_tokens=expected.shape[1], do_sample=False)
    assert cache.layers[1].keys.shape[1] == 1, "each process holds one of the two KV heads"
    assert torch.equal(out[:, case["input_ids"].shape[1] :], expected)
    torch.distributed.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2])
