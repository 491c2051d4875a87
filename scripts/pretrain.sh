#!/usr/bin/env bash
# Makes the weights in mila_jax/weights again, in runs/pretrain; some hours on two CPU cores. Goes on where it stopped.
#   bash scripts/pretrain.sh [--config.train.steps=N …]    arguments go to the last stage
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
  --config.data.foreground=True --config.autoencoder.path="$autoencoder"
plain="--config.model.detail=0"  # all but the last stage
nothing_weighed="--config.model.mixture=False $plain"  # all but the last two
six="--config.model.sweep=6 --config.model.evidence=False $nothing_weighed"  # all but the last three stages: the guide stays so
short="--config.window.frames=8 --config.window.conditioning=2 --config.train.optimizer=adamw $six"  # as they were trained
# A first network, smaller and without the sweep; the three stages grow it.
$python -m mila_jax train --config=configs/tiny.py --config.data.dir="$runs/encoded" --config.train.dir="$runs/base" --config.train.steps=4000 \
  $short --config.train.single_frame=0.1 --config.model.depth=4 --config.model.sweep=0 --config.train.context_rate=0 --config.window.tpd_strength=0.5

data="$runs/encoded"
stage() {  # number, weights to start from, further arguments
  local number="$1" from="$2"; shift 2
  $python -m mila_jax train --config="configs/tiny.py:stage${number%[b-i]}" --config.data.dir="$data" --config.train.dir="$runs/stage$number" \
    --config.train.init_from="$from" --config.train.learning_rate=8e-4 --config.train.single_frame=0.2 --config.train.checkpoint_every=100 "$@"
}
# Windows of 2 + 12 frames at 1 Hz are longer than the scenes, so stage 1 has two rates; the patch embedding is new where the sweep enters.
first="$short --config.model.sweep=4 --config.window.tpd_strength=0.5"  # as the first three were trained
stage 1 "$runs/base/model.safetensors" $first --config.window.frames=14 --config.train.steps=240 --config.train.warmup=50 --config.train.decay=False \
  --config.train.fps="(12.0,2.0)" --config.train.fps_weights="(0.5,0.5)" \
  --config.train.trainable="('patch.*','conditions.*','pairs.spatial.attn.*','pairs[-1].*','final_table','final.*')"
stage 2 "$runs/stage1/model.safetensors" $first --config.train.steps=900 --config.train.warmup=50 --config.train.decay=False \
  --config.train.fps_weights="(0.4,0.5,0.1)"
stage 3 "$runs/stage2/model.safetensors" $first --config.train.steps=1300 --config.train.warmup=30 --config.train.fps_weights="(0.45,0.5,0.05)"
# The third stage goes on with corridors that move as traffic does, and with windows from four frames.
stage 3b "$runs/stage3/model.safetensors" $short --config.train.steps=1300 --config.train.warmup=50 --config.train.fps_weights="(0.4,0.55,0.05)" \
  --config.train.single_frame=0.15 --config.train.four_frames=0.2 --config.seed=2
# Then windows of ten frames, and Muon: first with vehicles weighing more, then without, since that weight makes them more likely than they are.
longer=($six --config.window.conditioning=2 --config.train.warmup=20 --config.train.fps="(12.0,2.0)" --config.train.fps_weights="(0.4,0.6)")
stage 3c "$runs/stage3b/model.safetensors" "${longer[@]}" --config.train.steps=2480 --config.train.foreground_weight=2 --config.train.four_frames=0.6 \
  --config.seed=4
stage 3d "$runs/stage3c/model.safetensors" "${longer[@]}" --config.train.steps=2700 --config.train.four_frames=0.7 --config.train.single_frame=0.15 \
  --config.seed=5
# Then the same on other scenes, many short ones: what is learned from the first hardly carries over any more.
$python -m mila_jax simulate --config=configs/tiny.py --out="$runs/nuscenes_more" --config.simulate.seed=100 \
  --config.simulate.scenes=290 --config.simulate.seconds=5 --config.simulate.val_scenes=2
$python -m mila_jax prepare --config=configs/tiny.py --config.data.nuscenes="$runs/nuscenes_more" --config.data.dir="$runs/encoded_more" \
  --config.autoencoder.path="$autoencoder"
data="$runs/encoded_more"
# The guide, a weaker network that generation keeps away from: two pairs, from random weights.
$python -m mila_jax train --config=configs/tiny.py --config.data.dir="$data" --config.train.dir="$runs/guide" "${longer[@]}" --config.model.depth=2 \
  --config.train.warmup=100 --config.train.steps=1500 --config.train.four_frames=0.7 --config.train.single_frame=0.15 --config.seed=3
stage 3e "$runs/stage3d/model.safetensors" "${longer[@]}" --config.train.steps=2700 --config.train.four_frames=0.7 --config.train.single_frame=0.15 \
  --config.seed=7
# Then network and guide go on with scenes of a third seed. To here, the shipped weights, those of the autoencoder, too, were made from cars whose
# cabins were one dark patch; this script draws the windows from the start.
$python -m mila_jax simulate --config=configs/tiny.py --out="$runs/nuscenes_new" --config.simulate.seed=300 \
  --config.simulate.scenes=130 --config.simulate.seconds=5 --config.simulate.val_scenes=2
$python -m mila_jax prepare --config=configs/tiny.py --config.data.nuscenes="$runs/nuscenes_new" --config.data.dir="$runs/encoded_new" \
  --config.autoencoder.path="$autoencoder"
data="$runs/encoded_new"
last=($six --config.window.conditioning=2 --config.train.warmup=20 --config.train.fps="(12.0,2.0)" --config.train.fps_weights="(0.35,0.65)"
  --config.train.four_frames=0.7 --config.train.single_frame=0.15)
$python -m mila_jax train --config=configs/tiny.py --config.data.dir="$data" --config.train.dir="$runs/guide2" "${last[@]}" --config.model.depth=2 \
  --config.train.init_from="$runs/guide/model.safetensors" --config.train.learning_rate=8e-4 --config.train.steps=400 --config.seed=10
stage 3f "$runs/stage3e/model.safetensors" "${last[@]}" --config.train.steps=1800 --config.seed=9
# The network alone goes on with those and 200 scenes more of that seed, three corridors more and evidence for them.
$python -m mila_jax simulate --config=configs/tiny.py --out="$runs/nuscenes_new2" --config.simulate.seed=300 \
  --config.simulate.scenes=330 --config.simulate.seconds=5 --config.simulate.val_scenes=2
$python -m mila_jax prepare --config=configs/tiny.py --config.data.nuscenes="$runs/nuscenes_new2" --config.data.dir="$runs/encoded_new2" \
  --config.autoencoder.path="$autoencoder"
data="$runs/encoded_new2"
from_four=(--config.window.conditioning=2 --config.train.fps="(12.0,2.0)" --config.train.fps_weights="(0.4,0.6)" --config.train.four_frames=0.7
  --config.train.single_frame=0.15)
stage 3g "$runs/stage3f/model.safetensors" "${from_four[@]}" $nothing_weighed --config.train.warmup=20 --config.train.steps=2500 --config.seed=12
# And then weighs what the corridors show, on scenes of a fourth seed.
$python -m mila_jax simulate --config=configs/tiny.py --out="$runs/nuscenes_last" --config.simulate.seed=500 \
  --config.simulate.scenes=314 --config.simulate.seconds=5 --config.simulate.val_scenes=2
$python -m mila_jax prepare --config=configs/tiny.py --config.data.nuscenes="$runs/nuscenes_last" --config.data.dir="$runs/encoded_last" \
  --config.autoencoder.path="$autoencoder"
data="$runs/encoded_last"
stage 3h "$runs/stage3g/model.safetensors" "${from_four[@]}" $plain --config.train.warmup=100 --config.train.steps=2500 --config.seed=16
# On the same scenes with convolutions at the latents' places. This file says that its windows start from two frames; the shipped one was made to
# say four, which is generate.conditioning=4 here.
stage 3i "$runs/stage3h/model.safetensors" "${from_four[@]}" --config.train.warmup=100 --config.train.steps=2600 --config.seed=17 "$@"
echo "$autoencoder"
echo "$runs/stage3i/model.safetensors"
echo "$runs/guide2/model.safetensors"
