"""`kamim export-hf`: any encoder that loads here, for Hugging Face."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kamim.evaluate.cli import What, app
from shards.errors import UserError
from shards.files import check_local
from train.request import CONFIG, PREPROCESSOR, check_encoders


@app.command(short_help="Write a ViT's encoder for Hugging Face.")
def export_hf(
    encoder: What,
    target: Annotated[
        Path,
        typer.Argument(
            help="Folder to write, for from_pretrained; or one file, if it ends in .safetensors."
        ),
    ],
) -> None:
    """Write a ViT's encoder for Hugging Face: config.json and model.safetensors for ViTModel.

    ViTModel.from_pretrained(TARGET, add_pooling_layer=False) loads it and gives the same features.
    """
    check_encoders([encoder])
    check_local(target)
    alone = target.suffix == ".safetensors"
    path = target if alone else target / "model.safetensors"
    if target.is_file() or path.exists() or (target / CONFIG).exists():
        kind = "file" if alone else "folder"
        raise UserError(f"{target} exists; name another {kind} or remove it")
    from shards.files import write_atomically
    from shards.progress import waiting

    with waiting(f"loading PyTorch and {encoder}"):
        import torch

        from kamim.evaluate.encoder import load_encoder
        from train.export import write_tensors
        from train.huggingface import config_of, from_timm, preprocessor_of

        loaded = load_encoder(encoder, torch.device("cpu"))
        model = loaded.model
    if not hasattr(model, "blocks"):
        raise UserError(f"{encoder} is no ViT; its tensors have no names in Hugging Face's ViT")
    config = json.dumps(config_of(model), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = json.dumps(preprocessor_of(loaded.size, loaded.mean, loaded.std), indent=2) + "\n"
    facts = {"format": "pt", "config": config, "preprocessor": shown}
    write_tensors(from_timm(model.state_dict()), path, facts)
    if alone:
        print("note: from_pretrained wants a folder with a config.json; name one", file=sys.stderr)
    else:
        write_atomically(target / CONFIG, config.encode("ascii"))
        write_atomically(target / PREPROCESSOR, shown.encode("ascii"))
    print(target)
