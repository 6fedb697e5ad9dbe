# Sourced by the other scripts: creates a virtual environment with locked requirements, once.
# The requirement files are complete, so dependencies are not resolved (torch-fidelity would pull in torchvision and CUDA).
# Usage: setup_venv REQUIREMENTS_FILE...            in .venv, or in $venv

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer was not found; install it, or give its path: PYTHON=/path/to/python3.11 bash $0"
}

setup_venv() {
    local python file venv=${venv:-.venv}
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python) || exit 2
        echo "creating $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv" || fail "$python cannot create a virtual environment; install its venv module"
    fi
    for file in "$@"; do
        cmp -s "$file" "$venv/installed-$file" && continue
        echo "installing $file into $venv, once" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$file" ||
            fail "$file could not be installed; see pip's message above"
        cp "$file" "$venv/installed-$file"
    done
}
