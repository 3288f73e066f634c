"""Train a PyTorch model with dtl: `python -m dtl.cli.examples.pytorch_cnn OUT_FOLDER`.

It lives beside the commands because commands and files are all that it uses. For a model of your
own change the layers, `load_shard` and `train`; BatchNorm's integer counters are not for dtl.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NAMES = ("alice", "bob", "carol")


def dtl(command: str) -> None:
    """Run a command as in a shell; one that fails says why itself, so just stop."""
    if code := subprocess.run(["dtl", *command.split(), "--quiet"], check=False).returncode:
        raise SystemExit(code)


def load_shard(name: str) -> tuple[Tensor, Tensor]:
    """Read somebody's images and labels."""
    x, y = (torch.from_numpy(np.load(f"shards/{name}.npz")[array]) for array in "xy")
    return x.float().reshape(-1, 1, 8, 8), y


def train(model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    """Train three local epochs: plain PyTorch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.cat([torch.randperm(len(labels)) for _ in range(3)]).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def contribute(model: nn.Sequential, name: str, n: int) -> str:
    """Participant, round n: train on the own shard, encrypt what that took from the weights."""
    base = f"{name}-{n - 1}.safetensors" if n > 1 else "w0.safetensors"
    model.load_state_dict(before := load_file(base))
    train(model, *load_shard(name))
    taken = {key: before[key] - after for key, after in model.state_dict().items()}
    save_file(taken, f"{name}-{n}.grads.safetensors")
    options = f"--key job/{name}.key --model {base} --rounding-seed {name}-{n}"  # seed: repeatable
    dtl(f"encrypt-grads {name}-{n}.grads.safetensors {options} -o {name}-{n}.upload")
    return f"{name}-{n}.upload"


def main(
    folder: Path, rounds: int = 6, modulus_bits: int = 3072, insecure: bool = False, seed: int = 0
) -> None:
    """Play all parties in a new folder, and print the test accuracy after every round."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.manual_seed(seed)
    size = f"--modulus-bits {modulus_bits} {'--insecure' * insecure}"
    dtl(f"keygen job --participants {','.join(NAMES)} {size}")
    dtl(f"split-data digits --participants {','.join(NAMES)} --out shards")
    layers = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))
    save_file(model.state_dict(), "w0.safetensors")
    for n in range(1, rounds + 1):
        uploads = " ".join([contribute(model, name, n) for name in NAMES])
        base = f"--model model-{n - 1}.enc" if n > 1 else "--initial w0.safetensors"
        dtl(f"aggregate {uploads} --key job/server.key {base} -o model-{n}.enc")
        dtl(f"release-model model-{n}.enc --key job/server.key -o model-{n}.release")
        for name in NAMES:
            dtl(f"open-model model-{n}.release --key job/{name}.key -o {name}-{n}.safetensors")
        model.load_state_dict(load_file(f"alice-{n}.safetensors"))
        images, labels = load_shard("test")
        print(f"round {n}: test accuracy {(model(images).argmax(1) == labels).float().mean():.3f}")


if __name__ == "__main__":
    typer.run(main)
