# Shared by scripts/demo and scripts/test: make or reuse .venv, pick the extra for this platform, find a fast BLAS.
# Usage: source scripts/environment.sh EXTRAS     (for example "dev")

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here"

python_fits() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 to 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 2
}

# MLX on Linux comes as an extra: cpu, or the one of the installed CUDA driver.
platform_extra() {
    [ "$(uname -s)" = Linux ] || return 0
    local cuda
    cuda="$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' || true)"
    case "$cuda" in
        12) echo cuda12 ;;
        1[3-9]) echo cuda13 ;;
        *) echo cpu ;;
    esac
}

# The mlx wheel's own BLAS is about 30 times slower; OpenBLAS is one package on Debian-like systems.
ensure_blas() {
    [ "$(uname -s)" = Linux ] || return 0
    if ldconfig -p 2>/dev/null | grep -qE 'lib(openblas|blis|mkl_rt)\.so'; then return 0; fi
    local packages="libopenblas0-pthread"
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        local sudo=""
        [ "$(id -u)" = 0 ] || sudo="sudo -n"
        echo "installing $packages (a fast BLAS for MLX on the CPU)"
        $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq "$packages" >/dev/null && return 0
    fi
    echo "hint: training is about 30x slower without a fast BLAS; run: sudo apt-get install $packages" >&2
}

ensure_environment() {
    local extras="$1" platform python stamp wanted
    platform="$(platform_extra)"
    extras="${extras}${extras:+${platform:+,}}${platform}"
    if [ ! -x .venv/bin/python ]; then
        python="$(find_python)" || return 2
        "$python" -m venv .venv
    fi
    stamp=".venv/.mlxkd-${extras//,/-}"
    wanted="$(cksum pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        echo "installing mlxkd[$extras] into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
        echo "$wanted" > "$stamp"
    fi
}

ensure_blas
ensure_environment "${1:-}"
