"""HF checkpoint to GGUF: mconv and llama.cpp's own converter, side by side in one run.

    MCONV_LLAMACPP=path/to/llama.cpp python benchmarks/to_gguf.py [--rounds 3] [--type bf16]

The model is a random Llama of about 1.2 B parameters in BF16, with the real sentencepiece model of
the test data. The two files are compared tensor by tensor at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from measure import Measurement, best, run, table, warm

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def make_model(folder: Path, tokenizer: Path) -> Path:
    """Write a random 1.1 B Llama as sharded safetensors, with config and tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    h, f, v, kv = 2048, 5632, 32000, 256
    layer = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }
    shapes = {
        "model.embed_tokens.weight": (v, h),
        "lm_head.weight": (v, h),
        "model.norm.weight": (h,),
    }
    for k in range(CONFIG["num_hidden_layers"]):  # type: ignore[call-overload]
        shapes |= {f"model.layers.{k}.{name}.weight": s for name, s in layer.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: (torch.randn(s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items()
    }
    names = list(tensors)
    half = len(names) // 2
    index = {}
    for k, part in enumerate((names[:half], names[half:])):
        file = f"model-{k + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def compare(a: Path, b: Path) -> str:
    """Compare the tensors of two GGUF files byte by byte with gguf-py."""
    from gguf import GGUFReader

    left = {t.name: t for t in GGUFReader(a).tensors}
    right = {t.name: t for t in GGUFReader(b).tensors}
    if sorted(left) != sorted(right):
        return f"tensor names differ: {sorted(set(left) ^ set(right))[:5]}"
    bad = [n for n in left if left[n].data.tobytes() != right[n].data.tobytes()]
    order = "in the same order" if list(left) == list(right) else "in another order"
    return f"DIFFER: {bad[:3]}" if bad else f"{len(left)} tensors, byte-identical, {order}"


def main() -> None:
    """Make the model, run the race, compare the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--type", default="bf16")
    parser.add_argument("--folder", type=Path, default=None, help="where the model is made")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    data = Path(os.environ.get("MCONV_TEST_DATA", root.parent / "shared" / "data"))
    official = Path(os.environ["MCONV_LLAMACPP"]) / "convert_hf_to_gguf.py"
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        work = Path(tmp)
        model = make_model(work / "model", data / "llama2-tokenizer.model")
        warm(model)
        ours, theirs, plain = work / "mconv.gguf", work / "official.gguf", work / "copy"
        tools = {
            "cp": ["cp", "-r", model, plain],
            "mconv to-gguf": [
                sys.executable,
                "-m",
                "mconv",
                "to-gguf",
                "-q",
                model,
                ours,
                "--type",
                args.type,
            ],
            "convert_hf_to_gguf.py": [
                sys.executable,
                official,
                model,
                "--outfile",
                theirs,
                "--outtype",
                args.type,
            ],
        }
        runs: dict[str, list[Measurement]] = {name: [] for name in tools}
        for _ in range(args.rounds):
            for name, command in tools.items():
                for old in (ours, theirs) if name != "cp" else ():
                    if str(old) in map(str, command):
                        old.unlink(missing_ok=True)
                shutil.rmtree(plain, ignore_errors=True)
                runs[name].append(run(name, command))
        table(f"1.1 B Llama BF16 -> {args.type}", [best(r) for r in runs.values()], "mconv to-gguf")
        print(compare(ours, theirs))


if __name__ == "__main__":
    main()
