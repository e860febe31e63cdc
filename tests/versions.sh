#!/usr/bin/env bash
# For each interpreter that it is given, installs metajax as a package with the newest packages that pip resolves, runs
# the quick start by the installed command, and then the checkout's tests marked `smoke`:
#
#   tests/versions.sh python3.12 python3.13
#
# Without one it takes the newest that it finds besides `python3`: $METAJAX_OTHER_PYTHON, else python3.14, python3.13
# and so on, on the PATH or among pyenv's. It says which versions it ran, and that it ran none where there is no other.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

minor() { # of an interpreter that can make virtual environments
  "$1" -c 'import ensurepip, sys, venv; print(sys.version_info.minor)' 2>/dev/null
}

newest_other() {
  local own version candidate
  if [[ -n ${METAJAX_OTHER_PYTHON:-} ]]; then
    echo "$METAJAX_OTHER_PYTHON"
    return
  fi
  own=$(minor python3 || true)
  for version in 14 13 12 11; do
    [[ $version == "$own" ]] && continue
    for candidate in "python3.$version" $(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$version".*/bin/python 2>/dev/null | sort -rV); do
      if [[ $(minor "$candidate" || true) == "$version" ]]; then
        echo "$candidate"
        return
      fi
    done
  done
}

interpreters=("$@")
if (($# == 0)); then
  found=$(newest_other)
  interpreters=(${found:+"$found"})
fi
if ((${#interpreters[@]} == 0)); then
  echo 'versions.sh: found no Python besides python3, so no other version was tested'
  exit 0
fi

for interpreter in "${interpreters[@]}"; do
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  "$interpreter" -m venv "$folder/venv"
  python=$folder/venv/bin/python
  rm -rf "$root/build" # of an earlier build: setuptools would put what it holds into the package
  "$python" -m pip install --quiet "$root[test]"
  export METAJAX_CACHE=$folder/cache
  (
    cd "$folder" # away from the checkout, where only what was installed is there
    venv/bin/metajax --version
    venv/bin/metajax train --config=quickstart --config.total_steps=100
  )
  "$python" -m pytest -n 2 -m smoke
  versions=$("$python" -m pip list --format=freeze | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy)==' | xargs)
  echo "versions.sh: passed on $("$python" --version) with $versions"
  rm -rf "$folder"
done
