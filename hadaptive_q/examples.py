"""What `hadaptive-q COMMAND --help` closes with: commands to copy."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "train --data path/to/images --out runs/float",
        "train --model hadaptive_net_m --data glyphs --set float.epochs=30",
    ),
    "qat": (
        "qat --recipe int8 --data digits",
        "qat --checkpoint model.safetensors --data path/to/images --out runs/mine",
        "qat --recipe int8_static --input uint8 --set fit.epochs=6",
    ),
    "ptq": (
        "ptq --recipe int4_ptq --checkpoint model.safetensors --data path/to/images",
        "ptq --checkpoint authors.pt --data hf:name/of/dataset --to pte,onnx",
    ),
    "eval": ("eval runs/mine/model.pte --data path/to/images",),
    "bench": (
        "bench runs/mine/model.pte --compare runs/mine/float.pte",
        "bench runs/mine/model.pte --core cortex-a76 --operators",
    ),
    "check": (
        "check runs/mine --budget 'accuracy.drop <= 0.5' --budget 'coverage.delegates == 1'",
        "check runs/mine --baseline gate.json --strict",
    ),
    "compare": (
        "compare hadaptive_net_s mobilenet_v3_small starnet_s1 --data glyphs --out runs/compared",
        "compare trained.safetensors runs/mine --data path/to/images --recipe int8_ptq --recipe trained=int4_ptq",
    ),
    "verify": ("verify runs/mine", "verify runs/mine/model.pte --json"),
    "explain": ("explain runs/mine", "explain runs/mine --layer blocks.3.expansion --samples 256"),
    "search": (
        "search runs/mine --target-size 1.6MB --out runs/mixed",
        "search model.safetensors --max-drop 0.3 --data path/to/images",
    ),
    "export": ("export runs/mine --to onnx",),
    "import": ("import authors.pt --out runs/imported",),
    "info": ("info hadaptive_net_s --classes 100", "info model.safetensors --image-size 160"),
    "push": ("push runs/mine user/flowers-int8", "push runs/mine user/flowers-int8 --private"),
    "pull": ("pull user/flowers-int8 --out runs/flowers", "pull path/to/shared --out runs/flowers"),
    "recipes": ("recipes --json",),
    "doctor": ("doctor", "doctor --run --json"),
}


def epilog(command: str) -> str | None:
    """Return the examples of `command` as the end of its help, lines kept as they are."""
    lines = EXAMPLES.get(command)
    return "\n".join(["\b", "Examples:", *(f"  hadaptive-q {line}" for line in lines)]) if lines else None
