#!/bin/sh
# The first round of the README's tour, every party's step by hand, on real data.
# Usage: [CIPHER=direct] demo.sh FOLDER   (the folder is removed first)
set -eu

folder=${1:?usage: demo.sh FOLDER}
cipher=${CIPHER:-lattice}
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"

party() { printf '\n== %s\n' "$*"; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

party "Key generation center: makes the job, hands out the keys, goes offline"
run dtl keygen job --participants alice,bob,carol --cipher "$cipher"

party "Everybody: a shard of the data for each, and public initial weights"
run dtl split-data digits --participants alice,bob,carol --out shards
run dtl init-model --data shards/alice.npz --hidden 32 --seed 0 -o w0.safetensors

for p in alice bob carol; do
  party "Participant $p: computes gradients on its own shard, encrypts them"
  run dtl compute-grads --model w0.safetensors --data "shards/$p.npz" -o "$p.grads.safetensors"
  run dtl encrypt-grads "$p.grads.safetensors" --key "job/$p.key" -o "$p.upload"
done

party "Parameter server: adds the uploads up, releases a model that it cannot read"
run dtl aggregate alice.upload bob.upload carol.upload --key job/server.key \
  --initial w0.safetensors -o model-1.enc
run dtl release-model model-1.enc --key job/server.key -o model-1.release

party "Participant alice: recomputes the server's result, opens the model of round 1"
run dtl open-model model-1.release --key job/alice.key \
  --uploads alice.upload bob.upload carol.upload --initial w0.safetensors -o w1.safetensors
printf '\nbefore and after one gradient step, on samples that nobody trained on:\n'
run dtl evaluate --model w0.safetensors --data shards/test.npz
run dtl evaluate --model w1.safetensors --data shards/test.npz
