# Shared by tools/test and tools/demo: what they need, how it gets there, and how it is built. Sourced, not run; the working directory is the repository.
#
# Everything comes from the distribution (Debian 12, Ubuntu 24.04) and, for Python, from the package index into .venv. What stands is left alone, so a
# second call installs nothing and needs no network.

PACKAGES=(build-essential cmake ninja-build pkg-config ccache python3 python3-venv git
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev libspdlog-dev libgtest-dev libgmock-dev libhwy-dev
  nlohmann-json3-dev)
# For tools/test only, in its whole run: the fuzz targets and the linters.
TEST_PACKAGES=(clang clang-format clang-tidy libclang-rt-dev)
VENV=.venv
TORCH=torch==2.13.0

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

note() { printf '\n== %s\n' "$*"; }

# Children die with the script: on Ctrl-C, SIGTERM and at its end. The script ignores the signal it sends to its own group.
stop_children() {
  trap '' TERM
  pkill -TERM -P $$ 2>/dev/null || true
  wait 2>/dev/null || true
}
trap stop_children EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "installing packages needs root or sudo: run this as root once, or install: ${missing[*]}"
  fi
}

missing_packages() {
  local name
  for name in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null) == ii* ]] || echo "$name"
  done
}

install_packages() {
  command -v dpkg-query >/dev/null || die "this is not Debian or Ubuntu (no dpkg): install the counterparts of: $*"
  local missing
  mapfile -t missing < <(missing_packages "$@")
  if ((${#missing[@]} == 0)); then
    echo "distribution packages: all there"
    return
  fi
  note "installing ${#missing[@]} distribution packages: ${missing[*]}"
  # A mirror may be busy for a moment; one that is not there stays not there.
  as_root apt-get update -q || { sleep 5; as_root apt-get update -q; } || die "apt-get update failed: is there a network?"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# install_python FILE...: requirement files into .venv, each once for each content.
install_python() {
  local file stamp missing=()
  for file in "$@"; do
    cmp -s "$file" "$VENV/.installed-$(basename "$file")" || missing+=("$file")
  done
  if ((${#missing[@]} == 0)); then
    echo "Python packages: all there"
    return
  fi
  note "installing Python packages into $VENV: ${missing[*]}"
  # Not `python3` of a version manager or an active environment: the distribution's own, which python3-venv belongs to.
  [[ -x $VENV/bin/python ]] || /usr/bin/python3 -m venv "$VENV"
  for file in "${missing[@]}"; do
    stamp="$VENV/.installed-$(basename "$file")"
    if grep -q '^torch==' "$file"; then install_torch; fi
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -r "$file"
    cp "$file" "$stamp"
  done
}

# The CPU build of torch (about 200 MB to download) where a local file or an index that pip knows offers it; else the index's own build, which on x86-64 brings
# CUDA libraries along. PyTorch's own CPU index can be named in PIP_EXTRA_INDEX_URL.
install_torch() {
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
  "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "${TORCH#torch==}" 2>/dev/null && return
  "${pip[@]}" install -q "$TORCH+cpu" 2>/dev/null && return
  echo "pip finds no CPU build of $TORCH; taking the index's own: about 3 GB to download and 7 GB on disk with its CUDA libraries"
  "${pip[@]}" install -q "$TORCH"
}

# Compilers of this tree take up to 1.5 GB each.
build_jobs() {
  local memory_gb cores jobs
  memory_gb=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  cores=$(nproc)
  jobs=$((memory_gb * 2 / 3))
  ((jobs > cores)) && jobs=$cores
  ((jobs < 1)) && jobs=1
  echo "$jobs"
}

# build PRESET [TARGET...]
build() {
  local preset=$1 log="build/$1.log"
  shift
  mkdir -p build
  note "building preset $preset (log: $log)"
  cmake --preset "$preset" >"$log" 2>&1 || { cat "$log" >&2; die "cmake --preset $preset failed"; }
  # ninja's own progress on a terminal, nothing but errors elsewhere.
  if [[ -t 1 ]]; then
    cmake --build --preset "$preset" -j "$(build_jobs)" ${1:+--target "$@"} || die "the build failed"
  else
    cmake --build --preset "$preset" -j "$(build_jobs)" ${1:+--target "$@"} >>"$log" 2>&1 || { grep -v '^\[' "$log" | tail -60 >&2; die "the build failed"; }
  fi
}

check_room() {
  local need_disk_gb=$1 need_memory_gb=$2 disk memory
  disk=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  memory=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  ((disk >= need_disk_gb)) || die "needs $need_disk_gb GB of disk here, there are $disk"
  ((memory >= need_memory_gb)) || die "needs $need_memory_gb GB of free memory, there are $memory"
}
