#!/usr/bin/env bash
# Makes the weights in mila_jax/weights again, in runs/pretrain; about an hour and a half on two CPU cores. Goes on where it stopped.
#   bash scripts/pretrain.sh [--config.train.steps=N …]    arguments go to `mila train`
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
cd "$root"
python=.venv/bin/python
runs=runs/pretrain
autoencoder="$runs/autoencoder/autoencoder.safetensors"

$python -m mila_jax simulate --out="$runs/nuscenes" \
  --config.simulate.scenes=40 --config.simulate.seconds=12 --config.simulate.val_scenes=3
$python -m mila_jax.train.autoencoder --data="$runs/nuscenes" --out="$runs/autoencoder" --steps=4000 --batch-size=8
$python -m mila_jax prepare --config.data.nuscenes="$runs/nuscenes" --config.data.dir="$runs/encoded" --config.autoencoder.path="$autoencoder"
$python -m mila_jax train --config.data.dir="$runs/encoded" --config.train.dir="$runs/train" \
  --config.train.steps=3900 --config.train.eval_every=600 "$@"
echo "$autoencoder"
echo "$runs/train/model.safetensors"
