# Cyclical learning rates against others on Fashion-MNIST, five seeds each (TIME on one core)
experiment() {
  local data=${FASHION_MNIST_DIR:-data/fashion-mnist} options=()
  if [ "$smoke" = yes ]; then
    # Where Fashion-MNIST cannot be had, the digits do.
    scripts/fetch-mnist.sh
    data=${MNIST_DIR:-data/mnist} options=(--smoke)
  else
    scripts/fetch-mnist.sh --fashion
  fi
  build --example clr
  "$programs/clr" --data "$data" --out "$out" "${options[@]}"
  [ "$smoke" = yes ] || cp "$out/range.svg" "$pictures/clr-range.svg"
  [ "$smoke" = yes ] || cp "$out/accuracy.svg" "$pictures/clr.svg"
}
