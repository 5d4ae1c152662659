"""One run of transformers' generate, in a process of its own: tools/bench_cpu starts it with a JSON object as its
argument, and reads one from its last line.
"""

import json
import os
import resource
import sys
import time


def main():
    spec = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(spec["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every sequence runs to its full length, as on the other side
    prompts = torch.tensor(spec["prompts"])

    def run(new_tokens):
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - begin
        if out.shape[1] != prompts.shape[1] + new_tokens:
            raise AssertionError(f"generate gave {out.shape[1]} tokens, want {prompts.shape[1] + new_tokens}")
        return seconds

    run(2)
    whole, first = [], []
    for _ in range(spec["repeats"]):
        whole.append(run(spec["new_tokens"]))
        first.append(run(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"whole_s": min(whole), "first_s": min(first), "peak_bytes": peak}))


if __name__ == "__main__":
    main()
