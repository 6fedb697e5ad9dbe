# Sourced by the other scripts: a virtual environment with locked requirements, made once.
# The files are complete, so no package brings what they do not name (torch-fidelity would bring torchvision and CUDA).
# Usage: setup_venv REQUIREMENTS_FILE...            the environment is .venv, or $venv

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
    fail "no Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

setup_venv() {
    local python file venv=${venv:-.venv}
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python) || exit 2
        echo "making $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv" || fail "$python cannot make a virtual environment; install its venv module"
    fi
    for file in "$@"; do
        cmp -s "$file" "$venv/installed-$file" && continue
        echo "installing $file into $venv, once" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$file" ||
            fail "$file could not be installed; see pip's message above"
        cp "$file" "$venv/installed-$file"
    done
}
