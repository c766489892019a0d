#!/bin/sh
# Draws docs/segment.png: results of a CLIPSeg trained on the toy world for one of its scenes.
#
#   maskmill train clipseg --recipe toy --dataset toyworld --split seed-3 --output finder/
#   sh docs/segment.sh finder/
#
# The script draws the scene, the example and its mask; the rest is the program's own output.
set -eu
weights=${1:?"Name the folder of a trained toy CLIPSeg."}
docs=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$docs/..${PYTHONPATH:+:$PYTHONPATH}"

python - "$work" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

from pipeline.toyworld.scenes import CLASSES, scene

folder = Path(sys.argv[1])
Image.fromarray(scene(2026, 34, 128).image).save(folder / "scene.png")
example = scene(2026, 31, 128)
Image.fromarray(example.image).save(folder / "example.png")
Image.fromarray(example.labels == CLASSES.index("sunflower")).convert("L").save(folder / "mask.png")
PYTHON
python -m jobs.cli segment "$work/scene.png" --weights "$weights" --output "$work/found" --threshold 0.6 \
  --prompt "something red" --prompt "a photo of a zebra." \
  --prompt-image "$work/example.png" --prompt-mask "$work/mask.png"
mv "$work/found/scene/overview.png" "$docs/segment.png"
