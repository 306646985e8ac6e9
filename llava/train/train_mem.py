"""`train.py` with FlashAttention-2, under the name that LLaVA's scripts call."""

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main(["--attn_implementation", "flash_attention_2", *sys.argv[1:]]))
