"""``make finetune``: SmolLM2-135M-Instruct on GSM8K, answers behind solved problems, on whatever device there is.

Prepares model and data, and calls finetune.py, whose arguments work here too (``--dense``, ``--steps``, ``--resume``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import finetune
import torch
from gsm8k_prompts import right_answers, write_prompts
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
# device: solved problems of a prompt, problems that the trained model answers, and arguments of finetune.py
SETTINGS = {
    "cuda": (8, 256, ["--steps=300", "--batch-size=8", "--length=2048", "--eval-size=256"]),
    "cpu": (1, 0, ["--steps=8", "--batch-size=2", "--length=384", "--eval-size=8", "--evals=1"]),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Further arguments: finetune.py --help", allow_abbrev=False
    )
    parser.add_argument("--device", choices=SETTINGS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shots", type=int, help="solved problems of a prompt: 8 on CUDA, 1 on a CPU")
    parser.add_argument("--accuracy", type=int, help="test problems to answer after training: 256 on CUDA, 0 on a CPU")
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"), help="folder of the model and the prompts")
    args, further = parser.parse_known_args(argv)
    shots, accuracy, arguments = SETTINGS[args.device]
    shots = shots if args.shots is None else args.shots
    accuracy = accuracy if args.accuracy is None else args.accuracy

    train, test = write_prompts(ROOT / "data" / "gsm8k", args.work / f"gsm8k-{shots}-shots", shots)
    arguments = [f"--model={smollm2(args.work / 'model')}", f"--train={train}", f"--test={test}", *arguments]
    arguments = [*arguments, f"--device={args.device}", *further]
    code = finetune.main(arguments)
    if code == 0 and accuracy:
        folder = finetune.parse_arguments(arguments).out / "model"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        share = right_answers(
            model, tokenizer, test, accuracy, progress=lambda done, right: print(f"{right} of {done} answers are right")
        )
        print(f"Greedy answers to the first {accuracy} test problems: {share:.1%} right")
    if code == 0 and args.device == "cpu":
        print(
            "So few steps on a CPU show how it works, not what it gains: neither the speed nor the loss says anything "
            "about training on a GPU, behind 8 solved problems."
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
