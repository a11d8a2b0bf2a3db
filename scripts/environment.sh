# Sourced by the scripts beside it: gives the repository a complete .venv. Nothing outside the repository is changed.

# prepare_environment EXTRAS: install moecompress, editable, with the given extras ("" or "test,eval") and the locked
# versions. Takes some minutes the first time and no time when .venv is complete: it carries a stamp made of the
# versions asked for and the place of the repository. MOECOMPRESS_TORCH_INDEX names the package index torch comes from.
prepare_environment() {
  local extras="$1" root="$PWD" venv="$PWD/.venv" python wanted torch
  local index=(${MOECOMPRESS_TORCH_INDEX:+--index-url "$MOECOMPRESS_TORCH_INDEX"})

  # A .venv that was copied or moved along with the repository still runs the old place's programs.
  if [[ -e "$venv" ]] && ! grep -qF -- " $venv" "$venv/pyvenv.cfg" 2>/dev/null; then
    echo "Removing .venv: it was made for another place" >&2
    rm -rf -- "$venv"
  fi
  if [[ ! -x "$venv/bin/pip" ]]; then
    python="$(find_python)" || return 2
    rm -rf -- "$venv"
    "$python" -m venv "$venv"
  fi

  wanted="$(cat pyproject.toml constraints.txt | "$venv/bin/python" -I -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  if grep -qsF -- "$wanted [$extras]" "$venv/installed"; then
    return 0
  fi

  echo "Installing into .venv (some minutes the first time)" >&2
  torch="$(grep -E '^torch==' constraints.txt)"
  # torch first and by itself, so that an index for it is asked for nothing else
  pip_install ${index[@]+"${index[@]}"} "$torch"
  pip_install -c constraints.txt -e "$root${extras:+[$extras]}"
  echo "$wanted [$extras]" >>"$venv/installed"
  # the base is part of every set of extras
  echo "$wanted []" >>"$venv/installed"
}

# -qq leaves only errors; .venv/bin/pip rather than `python -m pip` keeps the repository off sys.path
pip_install() {
  .venv/bin/pip install -qq --disable-pip-version-check --no-input "$@"
}

# Print the name of a Python from 3.11 up that can make virtual environments.
find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "No usable Python found. Needed: 3.11 or newer with the venv module (on Debian and Ubuntu: python3-venv)" >&2
  return 1
}
