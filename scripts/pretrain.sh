#!/usr/bin/env bash
# Makes the weights in mila_jax/weights again, in runs/pretrain; two to three hours on two CPU cores. Goes on where it stopped.
#   bash scripts/pretrain.sh [--config.train.steps=N …]    arguments go to `mila train`
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv/bin/python
runs=runs/pretrain
autoencoder="$runs/autoencoder/autoencoder.safetensors"

$python -m mila_jax simulate --config=configs/tiny.py --out="$runs/nuscenes" \
  --config.simulate.scenes=96 --config.simulate.seconds=8 --config.simulate.val_scenes=4
$python -m mila_jax.train.autoencoder --data="$runs/nuscenes" --out="$runs/autoencoder" --steps=6000 --batch-size=8
$python -m mila_jax prepare --config=configs/tiny.py --config.data.nuscenes="$runs/nuscenes" --config.data.dir="$runs/encoded" \
  --config.autoencoder.path="$autoencoder"
$python -m mila_jax train --config=configs/tiny.py --config.data.dir="$runs/encoded" --config.train.dir="$runs/train" \
  --config.train.steps=5000 "$@"
echo "$autoencoder"
echo "$runs/train/model.safetensors"
