#!/usr/bin/env bash
# ./run.sh --demo   drawn coal scenes: environment, data, three trainings, fusion; nothing to download but packages
# ./run.sh          the same on CoalAD with the pretrained networks, both of which it downloads
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/environment.sh

DEMO_NOTE="Synthetic scenes with the bundled wavelet network: a smoke test, not a reproduction of the paper."

usage="usage: ./run.sh [--demo]   (--demo: drawn scenes; without: CoalAD with pretrained networks)"
[ $# -le 1 ] || die "too many arguments; $usage"
case "${1-}" in
  "") category=coal_ad; training=(); testing=() ;;
  --demo) category=coal_demo; training=(--weights demo); testing=(--false-alarm-rate 0.05) ;;
  -h | --help) echo "$usage"; exit 0 ;;
  *) die "unknown argument $1; $usage" ;;
esac
trained=trained_models/$category
saved=saved_models/$category
copied=$saved/.copied_by_run_sh  # checksums of every checkpoint that this script has put there

refuse_to_overwrite() {
  local file
  for file in "$saved"/*.safetensors; do
    [ -f "$file" ] || continue
    grep -qxF "$(cksum <"$file")" "$copied" 2>/dev/null ||
      die "$file was not put there by run.sh; move $saved away, or train and test with the plain commands in README.md"
  done
}

copy_checkpoints() {
  local file name sum
  mkdir -p "$saved"
  for file in "$trained"/*.safetensors; do
    name=$(basename "$file")
    sum=$(cksum <"$file")
    grep -qxF "$sum" "$copied" 2>/dev/null || echo "$sum" >>"$copied"
    cp "$file" "$saved/.$name.new"
    mv -f "$saved/.$name.new" "$saved/$name"
  done
  echo "Copied the checkpoints from $trained to $saved"
}

step() {
  echo
  echo "== $1"
  shift
  "$VENV_PYTHON" "$@"
}

refuse_to_overwrite
prepare_environment requirements.txt
if [ "$category" = coal_demo ]; then
  echo "$DEMO_NOTE"
  step "Drawing the scenes" make_demo_data.py
fi
# ${…[@]+…}: an empty list is an error to the Bash of macOS.
step "MACLU" train_ma_clu.py --category "$category" ${training[@]+"${training[@]}"}
step "MA2Patch" train_ma2patch.py --category "$category" ${training[@]+"${training[@]}"}
step "PatchCore" train_pc.py --category "$category" ${training[@]+"${training[@]}"}
copy_checkpoints
step "Fusion" test_fusion.py --category "$category" ${testing[@]+"${testing[@]}"}

results=result/$category/fusion
echo
echo "Done. Look at:"
for name in report.html sheet.jpg heatmaps metrics.json scores.csv config.json; do
  [ ! -e "$results/$name" ] || echo "  $results/$name"
done
[ "$category" != coal_demo ] || echo "$DEMO_NOTE"
