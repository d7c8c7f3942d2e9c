"""Random-weight checkpoints of the real shapes of well-known models, to measure time and memory on.

python -m tests.benchmarks.shapes gpt2-xl FOLDER [--dtype bfloat16] [--shards]
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as tf

BUNDLED = Path(__file__).parents[2] / "fixtures" / "bundled"
SHAPES = {
    "gpt2": lambda: tf.GPT2Config(),
    "gpt2-medium": lambda: tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-xl": lambda: tf.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "pythia-1.4b": lambda: tf.GPTNeoXConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        rotary_pct=0.25,
        use_parallel_residual=True,
        max_position_embeddings=2048,
    ),
    "tinyllama-1.1b": lambda: tf.LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "llama-7b": lambda: tf.LlamaConfig(tie_word_embeddings=False),
}


def write(
    shape: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    shards: bool = False,
    seed: int = 0,
) -> Path:
    """A checkpoint of that shape, with the bundled model's tokenizer, so that the built-in prompts
    can be written.
    """
    torch.manual_seed(seed)
    model: Any = tf.AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32).to(dtype)
    model.save_pretrained(folder, max_shard_size="1GB" if shards else "200GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(next(BUNDLED.rglob(name)), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--shards", action="store_true")
    options = parser.parse_args()
    print(
        write(options.shape, options.folder, getattr(torch, options.dtype), shards=options.shards)
    )


if __name__ == "__main__":
    main()
