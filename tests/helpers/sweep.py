import logging, time, traceback, sys
import torch
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest
from helpers.hf_models import generate, prompt
from helpers.tiny_models import CAUSAL_LM_TYPES, tiny_config, tiny_model

def verdict(t):
    t0=time.time()
    try: model = tiny_model(t)
    except Exception as e: return ("unbuilt", f"{type(e).__name__}: {str(e)[:300]}")
    n=sum(p.numel() for p in model.parameters())
    t1=time.time()
    res=[f"{n/1e6:.1f}M build {t1-t0:.1f}"]
    try:
        enable_quest(model, QuestConfig(budget=112, dense_layers=0), max_tokens=200)
    except ValueError as e:
        return ("refused", f"{e} {res}")
    except Exception as e:
        return ("BADREFUSE", f"{type(e).__name__} {e}"+traceback.format_exc()[-600:])
    for pad in ((0,), (0, 23)):
        inputs = prompt(70, padding=pad)
        model=tiny_model(t)
        try: want, wl = generate(model, inputs, new=5)
        except Exception as e:
            if pad==(0,): return ("DENSEFAIL", f"{type(e).__name__}: {str(e)[:300]}"+traceback.format_exc()[-600:])
            res.append("dense padded fails"); continue
        try:
            cache = enable_quest(model, QuestConfig(budget=112, dense_layers=0), max_tokens=200)
            cache.start_report()
            got, gl = generate(model, inputs, cache, new=5)
        except Exception as e:
            return ("FAIL", f"{pad} {type(e).__name__}: {str(e)[:300]} "+traceback.format_exc()[-500:]+str(res))
        err=(wl-gl).abs().max().item()/max(wl.abs().max().item(),1e-9)
        ok = torch.equal(want,got) and err<1e-3
        res.append(f"{'ok' if ok else 'DIFF'} {err:.1e} max {wl.abs().max():.2g}")
        if not ok: return ("DIFF", str(res)+str([p.path[0] for p in cache.plan()])+str([r.steps for r in cache.report()]))
        rep=[(p.plan.path[0],p.steps) for p in cache.report()]
    res.append(str(rep)); res.append(f"{time.time()-t1:.1f}s")
    return ("equal", " ".join(res))
if __name__=="__main__":
    logging.getLogger("quest_ops").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for t in (sys.argv[1:] or CAUSAL_LM_TYPES):
        print(t, *verdict(t), flush=True)
