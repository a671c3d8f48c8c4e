#!/usr/bin/env bash
# Compares optimizer steps, whole training, or distributed training with tch's own and PyTorch's, and prints
# Markdown tables of medians and ratios.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: scripts/bench.sh [--help] [--table] [steps | training | distributed | compiled | weights]

Sets up libtorch (.libtorch/) where it is missing, measures, and prints Markdown tables.

  steps        steps of all optimizers, clipping and averages (the default), in turns: about a quarter
               of an hour for each number of threads, and 12 GB of memory; --table prints the last
               run's again
  training     an epoch of Fashion-MNIST (scripts/fetch-mnist.sh --fashion), contenders in turns
  distributed  all-reduce and a step of data-parallel training
  compiled     whole training of models that PyTorch compiled, beside tch's, PyTorch's eager and
               torch.compile (needs TORCH_PYTHON; exporting takes minutes)
  weights      reading 1 GB of weights, beside reading the bytes and torch.load (1 GB of disk,
               3 GB of memory)

Each compares with PyTorch (training: with ignite too) where TORCH_PYTHON has it.

environment:
  BENCH_THREADS  the numbers of threads (steps: default "1 2"; else OMP_NUM_THREADS, default 1)
  BENCH_ROUNDS   how often each contender has its turn (default 3; steps: 9)
  BENCH_SHAPE    steps: one of "200 of 16x16", "ResNet-18", "4 of 4M", "GPT-2 small" (default all)
  BENCH_GROUPS   steps: a regular expression for the groups to measure, such as "^(EMA|gradients)"
  TORCH_PYTHON   a Python with torch (default python3)
and what scripts/setup-libtorch.sh names in its --help.
EOF
}
say() { printf 'scripts/bench.sh: %s\n' "$*" >&2; }

what=steps table=no
for argument in "$@"; do
  case "$argument" in
    --table) table=yes ;;
    steps|training|distributed|compiled|weights) what=$argument ;;
    -h|--help) usage; exit 0 ;;
    *) usage >&2; say "error: unknown argument '$argument'"; exit 1 ;;
  esac
done

python=${TORCH_PYTHON:-python3}
out="${CARGO_TARGET_DIR:-target}/criterion"
mkdir -p "$out"
[ "$table" = yes ] || scripts/setup-libtorch.sh
has() { "$python" -c "import $1" 2>/dev/null || { say "$python has no $1 (TORCH_PYTHON=...): compared without it"; return 1; }; }

steps() {
  shapes=("200 of 16x16" "ResNet-18" "4 of 4M" "GPT-2 small")
  if [ -n "${BENCH_SHAPE:-}" ]; then shapes=("$BENCH_SHAPE"); fi
  for threads in ${BENCH_THREADS:-1 2}; do
    lines="$out/steps-$threads.jsonl"
    if [ "$table" = no ]; then
      export OMP_NUM_THREADS="$threads"
      cargo bench --bench steps --no-run
      : > "$lines"
      for shape in "${shapes[@]}"; do
        contenders=("cargo bench -q --bench steps -- --shape '$shape'")
        if has torch; then contenders+=("$python benches/steps.py --threads $threads --shape '$shape'"); fi
        python3 scripts/bench-turns.py "$lines" "${contenders[@]}"
      done
    fi
    [ -s "$lines" ] || { say "error: nothing was measured with $threads thread(s)"; exit 1; }
    clock="wall time"
    [ "$threads" != 1 ] || clock="CPU time of the thread"
    printf '\n%s thread(s), %s\n\n' "$threads" "$clock"
    python3 scripts/bench-table.py steps "$lines"
  done
}

training() {
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  data="${FASHION_MNIST_DIR:-data/fashion-mnist}"
  lines="$out/training.jsonl"
  [ -f "$data/train-images-idx3-ubyte" ] || scripts/fetch-mnist.sh --fashion
  ways="ours tch"
  if has torch; then ways="$ways torch"; fi
  if has ignite; then ways="$ways ignite"; fi
  cargo bench --bench training --no-run
  : > "$lines"
  for round in $(seq "${BENCH_ROUNDS:-3}"); do
    for model in mlp cnn; do
      for batch in 64 256; do
        for way in $ways ours-keep-freed ours-channels-last; do
          arguments=(--data "$data" --model "$model" --batch-size "$batch")
          case "$way $model" in
            "ours-channels-last mlp"|"ours-keep-freed cnn") continue ;;
            ours-keep-freed*) run=(cargo bench -q --bench training -- --keep-freed-memory) ;;
            ours-channels-last*) run=(cargo bench -q --bench training -- --channels-last) ;;
            ours*|tch*) run=(cargo bench -q --bench training -- --way "$way") ;;
            *) run=("$python" benches/training.py --way "$way") ;;
          esac
          result=$("${run[@]}" "${arguments[@]}" 2>/dev/null)
          printf '{"model": "%s", "batch": %s, "way": "%s", "result": %s}\n' "$model" "$batch" "$way" "$result" >> "$lines"
          say "round $round: $model, batch $batch, $way: $result"
        done
      done
    done
  done
  printf '\n%s thread(s)\n\n' "$OMP_NUM_THREADS"
  python3 scripts/bench-table.py training "$lines"
}

distributed() {
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  cargo bench --features distributed --bench distributed
}

compiled() {
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  has torch || exit 1
  lines="$out/compiled.jsonl"
  models="$out/compiled-models"
  cargo bench --bench compiled --no-run
  : > "$lines"
  for model in mlp cnn gpt; do
    grep -qs '"train_outputs": true' "$models/$model/manifest.json" || "$python" benches/compiled.py export --model "$model" --folder "$models/$model"
  done
  for round in $(seq "${BENCH_ROUNDS:-3}"); do
    for model in mlp cnn gpt; do
      for way in compiled eager torch torch.compile; do
        case "$way" in
          torch*) run=("$python" benches/compiled.py "$way") ;;
          *) run=(cargo bench -q --bench compiled -- --way "$way") ;;
        esac
        result=$("${run[@]}" --model "$model" --folder "$models/$model" 2>/dev/null)
        printf '{"model": "%s", "way": "%s", "samples_per_second": %s}\n' "$model" "$way" "$result" >> "$lines"
        say "round $round: $model, $way: $result samples/s"
      done
    done
  done
  printf '\n%s thread(s)\n\n' "$OMP_NUM_THREADS"
  python3 scripts/bench-table.py compiled "$lines"
}

weights() {
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  lines="$out/weights.jsonl"
  file="$(realpath "$out")/weights.pt"
  trap 'rm -f "$file"' EXIT
  ways=(bytes buffer tensors store)
  if has torch; then ways+=("load" "load into model" "mmap into model"); fi
  cargo bench --bench weights --no-run
  cargo bench -q --bench weights -- --way write --file "$file"
  : > "$lines"
  for round in $(seq "${BENCH_ROUNDS:-3}"); do
    for way in "${ways[@]}"; do
      case "$way" in
        load*|mmap*) run=("$python" benches/weights.py) ;;
        *) run=(cargo bench -q --bench weights --) ;;
      esac
      result=$("${run[@]}" --way "$way" --file "$file" 2>/dev/null)
      printf '{"way": "%s", "result": %s}\n' "$way" "$result" >> "$lines"
      say "round $round: $way: $result"
    done
  done
  printf '\n%s thread(s) of libtorch\n\n' "$OMP_NUM_THREADS"
  python3 scripts/bench-table.py weights "$lines"
}

"$what"
