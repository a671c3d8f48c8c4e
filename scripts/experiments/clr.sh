# Cyclical learning rates against others on Fashion-MNIST, five seeds (14 minutes of one core)
experiment() {
  local data=${FASHION_MNIST_DIR:-data/fashion-mnist} options="" seed commands=()
  if [ "$smoke" = yes ]; then
    # The digits do where Fashion-MNIST cannot be had.
    scripts/fetch-mnist.sh
    data=${MNIST_DIR:-data/mnist} options=--smoke
  else
    scripts/fetch-mnist.sh --fashion
  fi
  build --example clr
  rm -f "$out"/seed-*.csv
  for seed in 0 1 2 3 4; do
    commands+=("$programs/clr --data '$data' --seed $seed --out '$out' $options")
  done
  at_once "${commands[@]}"
  "$programs/clr" --data "$data" --out "$out" --summary $options
  cat "$out/summary.md"
  [ "$smoke" = yes ] || cp "$out/range.svg" docs/clr-range.svg
  [ "$smoke" = yes ] || cp "$out/accuracy.svg" docs/clr.svg
}
