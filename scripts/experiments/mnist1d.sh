# The four models of MNIST-1D's paper, here and in PyTorch, three seeds each (14 minutes of one core)
experiment() {
  local options=() python
  [ "$smoke" = no ] || options=(--smoke)
  build --example mnist1d
  "$programs/mnist1d" --out "$out" "${options[@]}"
  python=$(torch_python) || return 0
  "$python" benches/mnist1d.py "$out/data.pt" "${options[@]}"
}
