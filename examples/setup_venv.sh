# Goes to the repository's root and activates a .venv that holds what requirements.txt asks for, making or mending it
# where need be. Sourced by examples/quickstart.sh and tests/run.sh.
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made with.

cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
VENV="$PWD/.venv"
STAMP="$VENV/.installed"        # says what was installed; written when all of it was
UNFINISHED="$VENV/.installing"  # there while pip runs: found at a start, it means that the last one was cut short
PACKAGES="python3 python3-venv python3-dev git g++"

stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

# The first interpreter that is new enough, on stdout.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    local found
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "not there")
    stop "Reelpipe needs Python 3.10 or newer, and ${PYTHON:-python3} is $found." \
        "On Debian and Ubuntu:  sudo apt-get install $PACKAGES" \
        "Where that one is older, install a newer one and name it:  PYTHON=/path/to/python3.11 bash $0"
}

# Stops with a list of all that is missing to make .venv and to compile what DeepSpeed compiles on its first start.
check_tools() {
    local python=$1 missing=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("Python's venv module (python3-venv)")
    "$python" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' \
        2>/dev/null || missing+=("Python's header files (python3-dev)")
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || missing+=("a C++ compiler (g++)")
    [[ ${#missing[@]} -eq 0 ]] && return
    stop "Missing for $python, which is $("$python" --version):" "${missing[@]/#/  - }" \
        "On Debian and Ubuntu:  sudo apt-get install $PACKAGES" \
        "Where python3 is not the system's own, the packages have its version: python3.12-venv python3.12-dev"
}

# Whether .venv works and belongs here: one that was copied or moved still points to its old place.
venv_is_sound() {
    [[ ! -e $UNFINISHED && "$("$VENV/bin/pip" --version 2>/dev/null)" == *" $VENV/"* ]]
}

make_venv() {
    local wanted=$1 python
    if ! venv_is_sound; then
        python=$(find_python)
        check_tools "$python"
        [[ -e $VENV ]] && echo "$VENV is not complete; making it anew"
        "$python" -m venv --clear "$VENV"
    fi
    echo "Installing requirements.txt into $VENV. The first time this takes minutes and, for a GPU, some gigabytes."
    touch "$UNFINISHED"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -r requirements.txt ||
        stop "The packages could not be installed; see above. Run this again to try once more."
    echo "$wanted" >"$STAMP"
    rm -f "$UNFINISHED"
}

if [[ $VENV == *[[:space:]]* ]]; then
    stop "The path '$PWD' has a space in it, and DeepSpeed's start script does not work from such a path." \
        "Move this folder to a path without one."
fi

# What the stamp says when nothing needs to be done.
WANTED=$({ echo "$VENV"; cat requirements.txt; } | sha256sum)
if [[ -e $UNFINISHED || ! -x $VENV/bin/python || "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]]; then
    exec 9<requirements.txt  # two starts at once: the second waits for the first, and finds its work done
    flock 9
    [[ -e $UNFINISHED || "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]] && make_venv "$WANTED"
    exec 9<&-
fi

# shellcheck disable=SC1091
source "$VENV/bin/activate"
# DeepSpeed compiles a small module on its first start. Kept in here, it goes away with the .venv it was made for.
export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
