"""One mixed batch in an engine of its own: `python batch.py FOLDER FAMILY tp|compile`; which answers are as PEFT."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main(folder: Path, family: str, mode: str) -> None:
    from cases import PROMPTS, TOKENS, peft_answers, save_adapter, save_model
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base = save_model(folder / "base", family)
    names = (None, "lora", "dora", "dora2")
    adapters = {name: save_adapter(folder / name, base, family, name) for name in names if name}
    llm = LLM(
        str(base),
        dtype="float32",
        enable_lora=True,
        max_loras=3,
        max_lora_rank=8,
        max_model_len=128,
        max_num_seqs=12,
        enforce_eager=mode != "compile",
        tensor_parallel_size=2 if mode == "tp" else 1,
    )
    asked = [(prompt, name) for prompt in PROMPTS for name in names]
    outputs = llm.generate(
        [prompt for prompt, _ in asked],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        lora_request=[LoRARequest(n, names.index(n), str(adapters[n])) if n else None for _, n in asked],
        use_tqdm=False,
    )
    expected = {name: peft_answers(base, adapters.get(name)) for name in names}
    for (prompt, name), output in zip(asked, outputs, strict=True):
        same = list(output.outputs[0].token_ids) == expected[name][PROMPTS.index(prompt)][0]
        print("ANSWER", repr(prompt), name, "as PEFT" if same else "DIFFERS", flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file again
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
