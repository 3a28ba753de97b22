# Sourced by a recipe, `runs/NAME.sh [FOLDER [OPTIONS]]`: `stage NAME OPTIONS` runs one train.py with
# the run folder FOLDER/NAME; OPTIONS of the recipe go to every stage and come last. A complete stage
# says so, a stopped one goes on. Signals go to the running stage, which saves; then the recipe ends.
set -eum # -m: a stage has a process group of its own, so a terminal's interrupt reaches it once
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=$(basename "$0" .sh) run=${1:-runs/$(basename "$0" .sh)} stopped=
options=("${@:2}")
for option in "${@:2}"; do
  option=${option%%=*}
  case $option in
    --config | --init-from | --init_from)
      echo "--recipe names the ${option//_/-} of every stage itself; leave it out, or run the stages one by one" >&2
      exit 2 ;;
  esac
done
# A stage whose recipe was killed must not go on: typed again, both would write into one folder.
with_us=$(command -v setpriv >/dev/null && echo setpriv --pdeathsig TERM || true)

stop() { stopped=yes; kill -s "$1" "$!" 2>/dev/null || true; }
trap 'stop TERM' TERM HUP
trap 'stop INT' INT

stage() {
  local name=$1 code=0
  echo "== $recipe: stage $name"
  $with_us "${PYTHON:-$root/.venv/bin/python}" "$root/train.py" \
    --run-dir "$run/$name" "${@:2}" ${options[@]+"${options[@]}"} &
  [ -z "$stopped" ] || kill -s TERM $! # a signal that came while the stage was started
  wait $! || code=$?
  while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal ends `wait`, not the stage
  [ -z "$stopped" ] || { code=0; wait $! || code=$?; }
  [ "$code$stopped" != 0 ] || return 0
  if [ -z "$stopped" ]; then why="ended with $code"; else why="was stopped"; fi
  echo "recipe $recipe: stage $name $why; run again to go on" >&2
  exit "$code"
}
