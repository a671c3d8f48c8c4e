# nanoGPT's setting for a CPU: AdamW here and in PyTorch, Muon here, three seeds each (18 minutes on two cores)
experiment() {
  local text="${TEXT_DIR:-data/text}/input.txt" seeds="1 2 3" iterations=2000 options="" python seed run
  local adamw="" muon="" torch="" commands=()
  if [ "$smoke" = yes ]; then
    text=docs/DIFFERENCES.md seeds="1 2" iterations=2 options=--smoke
  else
    scripts/fetch-text.sh
  fi
  python=$(torch_python) || python=
  build --example chargpt --example curves
  for seed in $seeds; do
    for run in adamw muon; do
      commands+=("$programs/chargpt --text '$text' --optimizer $run --seed $seed --iterations $iterations --out $out/$run-$seed $options > $out/$run-$seed.txt")
    done
    adamw+=",$out/adamw-$seed/log.csv" muon+=",$out/muon-$seed/log.csv"
    [ -z "$python" ] || {
      commands+=("$python benches/chargpt.py '$text' --seed $seed --iterations $iterations --log $out/torch-$seed.csv > $out/torch-$seed.txt")
      torch+=",$out/torch-$seed.csv"
    }
  done
  at_once "${commands[@]}"
  grep -H 'iterations in\|training took' "$out"/*.txt
  "$programs/curves" --tag val/loss --title "validation loss" --reach 2.2 --reach 2 --reach 1.91 --out "$pictures/chargpt.svg" \
    "AdamW=${adamw#,}" "Muon + AdamW=${muon#,}" ${torch:+"AdamW, PyTorch=${torch#,}"}
}
